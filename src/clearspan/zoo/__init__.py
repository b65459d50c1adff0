"""The zoo: a tiny random model of each causal language model that transformers has, and what is right on it.

It owns the recipes of these models, and what fails on them because of transformers itself. How a model is adapted and
what is checked is not its business: it calls `boot` and `verify`.
"""

from clearspan.zoo.census import Row as Row
from clearspan.zoo.census import Zoo as Zoo
from clearspan.zoo.census import check as check
from clearspan.zoo.census import check_all as check_all
from clearspan.zoo.models import build as build
from clearspan.zoo.models import types as types
from clearspan.zoo.parts import parts_of as parts_of
from clearspan.zoo.pins import PINS as PINS
from clearspan.zoo.pins import Pin as Pin

__all__ = ["PINS", "Pin", "Row", "Zoo", "build", "check", "check_all", "parts_of", "types"]
