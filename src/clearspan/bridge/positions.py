"""Choices of places on an axis: one (the axis goes), a range, a list, a slice, or a tensor of indices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clearspan.errors import InvalidArgumentError

PosSlice = int | tuple[int, ...] | Sequence[int] | slice | Tensor | None
"""Positions to keep: one (its axis goes), `(start, stop[, step])`, a list, a slice, or a tensor of indices."""
BatchSlice = PosSlice
"""Rows to keep, said in the same ways."""


def position_index(pos_slice: PosSlice, length: int, *, what: str = "position") -> slice | Tensor | None:
    """Returns the positions of a run of this length as a slice or as indices from 0.

    Args:
        pos_slice: The choice.
        length: How many there are.
        what: What is chosen, for the error's text: `"position"`, `"row"` or `"neuron"`.

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
            index = _integers(pos_slice.reshape(-1), length)
        case (*positions,) if all(isinstance(position, int) for position in positions):
            index = torch.tensor(positions)
        case _:
            index = torch.tensor([])
    positions = _of_slice(index, length) if isinstance(index, slice) else index
    is_index = positions.dtype == torch.long and positions.numel() > 0
    if not is_index or positions.min() < -length or positions.max() >= length:
        raise InvalidArgumentError(
            f"{_ARGUMENTS[what]} names no {what} of this run",
            expected=f"-{length} to {length - 1}: one, (start, stop[, step]), a list, a slice, or a tensor of indices",
            got=repr(pos_slice),
        )
    return index if isinstance(index, slice) else index % length


_ARGUMENTS = {"position": "pos_slice", "row": "batch_slice", "neuron": "neuron_slice"}


def _integers(index: Tensor, length: int) -> Tensor:
    """Returns a tensor's indices; a mask's are those of its true places."""
    if index.dtype == torch.bool and len(index) == length:
        return index.nonzero()[:, 0]
    return index if index.is_floating_point() or index.dtype == torch.bool else index.long()


def _of_slice(index: slice, length: int) -> Tensor:
    goes_forward = index.step is None or index.step > 0
    return torch.arange(length)[index if goes_forward else slice(0)]


def picked(value: Tensor, pos_slice: PosSlice, axis: int, *, what: str = "position") -> Tensor:
    """Returns a tensor at chosen places of an axis: a view, but for a list or indices; for a single one the axis goes.

    Args:
        value: The tensor.
        pos_slice: The places.
        axis: Which axis.
        what: As in `position_index`.
    """
    index = position_index(pos_slice, value.shape[axis], what=what)
    if index is None:
        return value
    if isinstance(pos_slice, int):
        return value.select(axis, pos_slice)
    if isinstance(index, slice):
        return value[(slice(None),) * axis + (index,)]
    return value.index_select(axis, index.to(value.device))
