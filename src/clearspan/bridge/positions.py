"""Choices of positions: one (its axis goes), a range, a list, a slice, or a tensor of indices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clearspan.errors import InvalidArgumentError

PosSlice = int | tuple[int, ...] | Sequence[int] | slice | Tensor | None
"""Positions to keep: one (its axis goes), `(start, stop[, step])`, a list, a slice, or a tensor of indices."""


def position_index(pos_slice: PosSlice, length: int) -> slice | Tensor | None:
    """Returns the positions of a run of this length as a slice or as indices.

    Raises:
        InvalidArgumentError: It names no position of the run.
    """
    match pos_slice:
        case None:
            return None
        case bool():
            index: slice | Tensor = torch.tensor([])
        case int():
            index = torch.tensor([pos_slice])
        case slice():
            index = pos_slice
        case (*bounds,) if isinstance(pos_slice, tuple) and 1 <= len(bounds) <= 3:
            index = slice(*bounds)
        case Tensor():
            index = pos_slice.reshape(-1)
        case (*positions,) if all(isinstance(position, int) for position in positions):
            index = torch.tensor(positions)
        case _:
            index = torch.tensor([])
    positions = torch.arange(length)[index] if isinstance(index, slice) else index
    is_index = positions.dtype == torch.long and positions.numel() > 0
    if not is_index or positions.min() < -length or positions.max() >= length:
        raise InvalidArgumentError(
            "pos_slice names no position of this run",
            expected=f"-{length} to {length - 1}: one, (start, stop[, step]), a list, a slice, or a tensor of indices",
            got=repr(pos_slice),
        )
    return index if isinstance(index, slice) else index % length


def at_positions(value: Tensor, pos_slice: PosSlice, axis: int = -2) -> Tensor:
    """Returns a tensor at chosen places of an axis, counted from the end; for a single one the axis goes."""
    index = position_index(pos_slice, value.shape[axis])
    if index is None:
        return value
    if isinstance(index, slice):
        return value[(..., index, *(slice(None),) * (-1 - axis))]
    found = value.index_select(axis, index.to(value.device))
    return found.squeeze(axis) if isinstance(pos_slice, int) else found
