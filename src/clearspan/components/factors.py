"""What a model multiplies by and adds outside of any module: numbers, and parameters."""

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clearspan.tree import module_at

Factor = float | str
"""A number, or the path of a parameter or buffer, `[d_model]` or a single number: in the block, or in the model."""
Terms = Sequence[Sequence[str]]
"""A sum of products of parameters and buffers, each by its path: `[["bias", "scale"]]` is `bias * scale`."""


@dataclass(frozen=True)
class BlockParameter:
    """A parameter or buffer by which a model multiplies, `[d_model]` or one number, looked up when it is needed.

    Attributes:
        model: The Hugging Face model.
        path: Its path in the model.
    """

    model: "weakref.ref[nn.Module]"
    path: str

    def __call__(self) -> Tensor:
        """Returns the live parameter or buffer."""
        model = self.model()
        assert model is not None, "the model is there while its block is"
        around, _, name = self.path.rpartition(".")
        module = module_at(model, around)
        found = module._parameters.get(name, module._buffers.get(name))
        assert found is not None, f"{self.path} is a parameter or a buffer"
        return found


Scale = float | BlockParameter
"""A factor of a live block."""


def value_of(scale: Scale) -> float | Tensor:
    """Returns a factor as it is now."""
    return scale() if isinstance(scale, BlockParameter) else scale


def is_one(scale: Scale) -> bool:
    """Whether a factor changes nothing, whatever the model's parameters are."""
    return not isinstance(scale, BlockParameter) and scale == 1


def scaled(value: Tensor, factor: float | Tensor) -> Tensor:
    """Returns a value `[..., d_model]` times a number or `[d_model]`; the value itself where that changes nothing."""
    if isinstance(factor, Tensor):
        return value * factor.to(value)
    return value if factor == 1 else value * factor


def scale_(value: Tensor, factor: float | Tensor) -> Tensor:
    """Multiplies a value `[..., d_model]` by a number or `[d_model]`, in place."""
    if isinstance(factor, Tensor):
        return value.mul_(factor.detach().to(value))
    return value if factor == 1 else value.mul_(factor)


@dataclass(frozen=True)
class Offset:
    """A vector `[d_model]` that a model adds, as its parameters are now.

    Attributes:
        terms: The products whose sum it is, each by its factors.
    """

    terms: tuple[tuple[BlockParameter, ...], ...]

    def __call__(self) -> Tensor:
        """Returns the live sum."""
        products = (functools.reduce(torch.mul, (factor() for factor in term)) for term in self.terms)
        return functools.reduce(torch.add, products)

    @classmethod
    def of(cls, model: nn.Module, terms: Terms, around: str = "") -> "Offset | None":
        """Returns the offset of some terms; None where there are none.

        Args:
            model: The Hugging Face model.
            terms: The terms.
            around: Path, with a dot at its end, of the module in which the paths are; empty for the model.
        """
        whole = weakref.ref(model)
        made = tuple(tuple(BlockParameter(whole, f"{around}{path}") for path in term) for term in terms)
        return cls(made) if made else None

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths, in the model, of what it is made of."""
        return tuple(dict.fromkeys(factor.path for term in self.terms for factor in term))
