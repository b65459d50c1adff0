"""A statement: what is computed of some points equals another."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clearspan.components import LinearBridge

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Statement:
    """One identity.

    Attributes:
        text: What it says.
        causes: Names of the points that it is computed of.
        result: Name of the point that it must equal.
        compute: Computes the left-hand side from the points' values.
        expected: Computes the right-hand side, where it is not the result as it is.
        through: The linear maps whose weights it computes with.
    """

    text: str
    causes: tuple[str, ...]
    result: str
    compute: Callable[[Values], Tensor]
    expected: Callable[[Values], Tensor] | None = None
    through: tuple[LinearBridge, ...] = ()

    @property
    def points(self) -> set[str]:
        """Names of the points that it is about."""
        return {*self.causes, self.result}

    def error(self, values: Values, row: int | None = None) -> float:
        """Returns the largest difference of the two sides over the largest value, in one row or in all."""
        left = self.compute(values)
        right = values[self.result] if self.expected is None else self.expected(values)
        if row is not None:
            left, right = left[row], right[row]
        return relative(left, right)


def relative(found: Tensor, expected: Tensor) -> float:
    """Returns the largest absolute difference over the largest absolute value; inf where one is not a number."""
    if found.shape != expected.shape:
        return float("inf")
    difference = (found.double() - expected.double()).abs().max()
    error = (difference / expected.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)).item()
    return error if error == error else float("inf")
