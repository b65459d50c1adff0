"""Tiny random models for draws, each built once, with its reference."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from tests.zoo import CONTINUOUS, MODELS, build

from .families import FAMILIES, Family
from .reference import Reference

LAYER_NAMES = ("num_hidden_layers", "n_layer", "n_layers")
SINGLE_ONLY = ("mixtral", "gpt_oss", "gpt2 upcast")
"""Variants whose own code runs in float32 alone."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and its reference.

    Attributes:
        variant: Its name in the zoo.
        model: The model.
        reference: A copy of it that is read and written by hooks.
    """

    variant: str
    model: Any
    reference: Reference

    @property
    def family(self) -> Family:
        """Where its parts are."""
        return self.reference.family


@functools.cache
def subject(variant: str, n_layers: int = 2, dtype: torch.dtype = torch.float32) -> Subject:
    """Returns a model of the zoo, of so many layers."""
    settings = dict(CONTINUOUS.get(variant, {}))
    settings |= {name: n_layers for name in MODELS[variant][1] if name in LAYER_NAMES}
    model = build(variant, **settings).to(dtype)
    return Subject(variant, model, Reference(model, FAMILIES[variant]))
