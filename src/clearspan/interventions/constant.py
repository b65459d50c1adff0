"""Constants: tensors as data, which can be compared, hashed and stored."""

from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor

from clearspan.errors import InvalidArgumentError


class Constant:
    """A tensor that does not change, kept in float64 on the CPU, which holds every floating-point number exactly.

    Args:
        values: Numbers.

    Example:
        >>> Constant([1.0, 2.0]) == Constant(torch.tensor([1.0, 2.0])), hash(Constant([1.0])) == hash(Constant([1.0]))
        (True, True)
    """

    def __init__(self, values: Sequence[float] | Sequence[Sequence[float]] | Tensor) -> None:
        try:
            given = values.detach() if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError("a constant is made of numbers", got=f"{values!r}"[:80]) from error
        if given.is_complex() or not given.numel() or not given.ndim:
            raise InvalidArgumentError(
                "a constant is a tensor of numbers with an axis", got=f"{values!r}"[:80], expected="[..., d], not empty"
            )
        self.tensor = given.to("cpu", torch.float64, copy=True)
        self._as: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._hash: int | None = None

    @classmethod
    def of(cls, values: "Constant | Sequence[float] | Sequence[Sequence[float]] | Tensor") -> Self:
        """Returns values as a constant."""
        return cast("Self", values) if isinstance(values, Constant) else cls(values)

    def like(self, value: Tensor) -> Tensor:
        """Returns the tensor in a value's dtype and on its device, checked to have the shape of its last axes.

        Raises:
            InvalidArgumentError: It has another shape.
        """
        if self.tensor.shape != value.shape[value.ndim - self.tensor.ndim :]:
            raise InvalidArgumentError(
                "the vector does not fit the values",
                expected=f"{list(value.shape[value.ndim - self.tensor.ndim :])}, as the value's last axes",
                got=str(list(self.tensor.shape)),
            )
        key = value.dtype, value.device
        if key not in self._as:
            self._as[key] = self.tensor.to(value)
        return self._as[key]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and torch.equal(self.tensor, other.tensor)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((tuple(self.tensor.shape), self.tensor.numpy().tobytes()))
        return self._hash

    def __repr__(self) -> str:
        values = self.tensor.flatten().tolist()
        return repr(self.tensor.tolist()) if len(values) < 9 else f"Constant({list(self.tensor.shape)})"
