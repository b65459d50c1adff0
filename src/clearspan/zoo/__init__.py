"""The zoo: a tiny random model of each causal language model that transformers has.

It owns the recipes of these models. What is checked on them is `bridge.verify`'s business.
"""

from clearspan.zoo.models import build as build
from clearspan.zoo.models import types as types

__all__ = ["build", "types"]
