"""Slices of an axis: one place (the axis goes), a range, a list, a slice, or a tensor of indices."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clearspan.checks import whole
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Batch

PosSlice = int | tuple[int, ...] | Sequence[int] | slice | Tensor | None
"""Positions to keep: one (its axis goes), `(start, stop[, step])`, a list, a slice, or a tensor of indices."""
BatchSlice = PosSlice
"""Rows to keep, said in the same ways."""


def plain(choice: PosSlice) -> PosSlice:
    """Returns a choice without numpy: one whole number as Python's, arrays as tensors."""
    match choice:
        case np.integer():
            return int(choice)
        case Tensor() | np.ndarray() if not choice.ndim:
            one = whole(choice)
            return choice if one is None else one
        case np.ndarray() if choice.dtype.kind in "biu":
            return torch.from_numpy(choice)
    return choice


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
    if isinstance(index, slice):
        is_there = len(_of_slice(index, length)) > 0
    else:
        is_index = index.dtype == torch.long and index.numel() > 0
        is_there = is_index and bool(index.min() >= -length) and bool(index.max() < length)
    if not is_there:
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


def _of_slice(index: slice, length: int) -> range:
    goes_forward = index.step is None or index.step > 0
    return range(length)[index if goes_forward else slice(0)]


def check_columns(pos_slice: PosSlice, batch: Batch) -> None:
    """Raises if a choice counts columns from the end where that is padding in some rows.

    Raises:
        InvalidArgumentError: It does.
    """
    match pos_slice:
        case int():
            given = [pos_slice]
        case slice():
            given = [pos_slice.start, pos_slice.stop]
        case None | Tensor():
            given = [] if pos_slice is None or pos_slice.dtype == torch.bool else pos_slice.flatten().tolist()
        case Sequence():
            given = list(pos_slice)
        case _:
            return
    counts_back = any(isinstance(one, int) and one < 0 for one in given)
    if counts_back and any(real[-1] != batch.width - 1 for real in batch.real_columns):
        raise InvalidArgumentError(
            f"pos_slice={pos_slice!r} counts columns from the end, where rows are padded",
            got=f"rows of {batch.lengths.tolist()} real tokens in {batch.width} columns",
            fix="cache.at(position), which counts each row's real tokens; or padding_side='left'",
        )


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


_SLICE_OF = {"batch": "batch_slice", "pos": "pos_slice"}
_PLACES = {"batch": "row", "pos": "position"}


@dataclass(frozen=True)
class Picks:
    """A choice on each axis of a cache, made where a tensor is still whole, and not made twice.

    Attributes:
        sizes: The axes with their whole sizes, in order: of `batch` and `pos`, those that there are.
        choices: The choice on each; None for all places.
    """

    sizes: Mapping[str, int]
    choices: Mapping[str, BatchSlice | PosSlice]

    def made(self, value: Tensor, what: str, before: tuple[str, ...] = (), after: tuple[str, ...] = ()) -> Tensor:
        """Returns a tensor at the chosen places.

        Args:
            value: On each axis whole, or as it is after the choice.
            what: What it is, for the error's text.
            before: Its axes before these.
            after: Its axes after them.

        Raises:
            InvalidArgumentError: It is of another shape, or of one that could be either.
        """
        if not isinstance(value, Tensor):
            raise InvalidArgumentError(f"{what} is no tensor", got=repr(value)[:80])
        found = self._fitting(value.shape[len(before) : value.ndim - len(after)])
        if len(found) == 1:
            done = found[0]
            return self._at(value, set(self._open) - set(done), done=done, first=len(before))
        if found:
            raise InvalidArgumentError(
                f"{what} may be of all places or of those of {self}: both have this shape",
                got=str(list(value.shape)),
                fix="cache.apply_slice_to_pos_dim(...) or cache.apply_slice_to_batch_dim(...), and no slice here",
            )
        whole = ", ".join([*before, *(f"{axis} {size}" for axis, size in self.sizes.items()), *after])
        picked_sizes = ", ".join([*before, *map(str, self._at(self._places(), self._open).shape), *after])
        raise InvalidArgumentError(
            f"{what} does not have the rows and positions of this cache",
            expected=f"[{whole}]" + (f", or [{picked_sizes}] after {self}" if self._open else ""),
            got=str(list(value.shape)),
        )

    def made_of_stack(self, stack: Tensor) -> Tensor:
        """Returns components of the residual stream at the chosen places.

        Args:
            stack: `[component, *batch_pos, d_model]`; without an axis of components, or with several, where it is not
                of that shape.

        Raises:
            InvalidArgumentError: As `made`.
        """
        if isinstance(stack, Tensor):
            for count in (1, 0, *range(2, stack.ndim)):
                if stack.ndim > count and self._fitting(stack.shape[count:-1]):
                    return self.made(stack, "the stack", ("component",) * count, ("d_model",))
        return self.made(stack, "the stack", ("component",), ("d_model",))

    def _fitting(self, shape: torch.Size) -> list[tuple[str, ...]]:
        """Returns on which axes a tensor of a shape may have been picked already, each way that gives other places."""
        found: list[tuple[Tensor, tuple[str, ...]]] = []
        for done in self._subsets():
            held = self._at(self._places(), done)
            if held.shape == shape and not any(torch.equal(held, other) for other, _ in found):
                found.append((held, done))
        return [done for _, done in found]

    def _places(self) -> Tensor:
        """Returns a number for each place of the axes."""
        sizes = torch.Size(self.sizes.values())
        return torch.arange(sizes.numel()).reshape(sizes)

    @property
    def _open(self) -> list[str]:
        """Axes on which there is a choice."""
        return [axis for axis in self.sizes if self.choices[axis] is not None]

    def _subsets(self) -> Iterator[tuple[str, ...]]:
        for count in range(len(self._open) + 1):
            yield from itertools.combinations(self._open, count)

    def _at(self, value: Tensor, axes: Collection[str], *, done: Collection[str] = (), first: int = 0) -> Tensor:
        """Returns a tensor at the choices on some axes.

        Args:
            value: The tensor.
            axes: On which a choice is made here.
            done: On which it was made before.
            first: Axes of the tensor before these.
        """
        there = [axis for axis in self.sizes if not (axis in done and isinstance(self.choices[axis], int))]
        for number, axis in reversed(list(enumerate(there))):  # the last one first, since an axis may go
            if axis in axes:
                value = picked(value, self.choices[axis], first + number, what=_PLACES[axis])
        return value

    def __str__(self) -> str:
        return ", ".join(f"{_SLICE_OF[axis]}={self.choices[axis]!r}" for axis in self._open)
