"""Rows of token ids: which of them are real, and in which column a row's position lies."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Token ids `[row, column]` with a mask. A position counts a row's real tokens, negative from the last one.

    Attributes:
        ids: Token ids; anything where the mask is 0.
        mask: 1 for real tokens, 0 for padding.
    """

    ids: Tensor
    mask: Tensor

    @classmethod
    def unpadded(cls, ids: Tensor) -> "Rows":
        """Returns rows of one length."""
        return cls(ids, torch.ones_like(ids))

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.ids.shape[0], self.ids.shape[1]

    @cached_property
    def columns(self) -> list[list[int]]:
        """The columns of each row's real tokens, in order."""
        return [row.nonzero()[:, 0].tolist() for row in self.mask]

    @property
    def lengths(self) -> list[int]:
        """How many real tokens each row has."""
        return [len(columns) for columns in self.columns]

    @property
    def is_padded(self) -> bool:
        """Whether a row has padding."""
        return not bool(self.mask.all())

    def column(self, row: int, position: int) -> int:
        """Returns the column of a row's position."""
        return self.columns[row][position]

    def real(self, value: Tensor) -> Tensor:
        """Returns a value `[row, column, ...]` at real tokens: `[token, ...]`."""
        return value[self.mask.bool()]

    def laid_out_as(self, other: "Rows") -> "Rows":
        """Returns rows of the same real tokens in the columns of other rows of these lengths."""
        return Rows(laid_out(self, other, self.ids), other.mask)

    def __str__(self) -> str:
        if not self.is_padded:
            return f"ids {self.ids.tolist()}"
        return f"ids {self.ids.tolist()}, mask {self.mask.tolist()}"


def laid_out(source: Rows, like: Rows, value: Tensor, axes: tuple[int, ...] = (1,)) -> Tensor:
    """Returns a value of one batch with its real tokens in the columns that another batch has them in.

    Args:
        source: The batch that the value is of.
        like: The batch whose columns are wanted; its rows are as long as the source's, or longer.
        value: `[row, ...]`.
        axes: The axes of columns, which lie next to each other.

    Returns:
        The value, 0 where there is nothing in the source.
    """
    if torch.equal(source.mask, like.mask):
        return value
    shape = [like.size[1] if axis in axes else size for axis, size in enumerate(value.shape)]
    found = value.new_zeros(shape)
    for row, (old, new) in enumerate(zip(source.columns, like.columns, strict=True)):
        assert len(old) <= len(new), "rows as long as the source's"
        part = value[row]
        for axis in axes:
            part = part.index_select(axis - 1, torch.tensor(old))
        places = torch.meshgrid(*[torch.tensor(new[: len(old)])] * len(axes), indexing="ij")
        found[row][(*[slice(None)] * (axes[0] - 1), *places)] = part
    return found
