"""Choices of rows and positions for tensors on which they may have been made already."""

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clearspan.bridge.positions import BatchSlice, PosSlice, picked
from clearspan.errors import InvalidArgumentError

_ARGUMENTS = {"batch": "batch_slice", "pos": "pos_slice"}
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
        places = torch.arange(torch.Size(self.sizes.values()).numel()).reshape(tuple(self.sizes.values()))
        shape = value.shape[len(before) : value.ndim - len(after)]
        found: list[tuple[Tensor, tuple[str, ...]]] = []
        for done in self._subsets():
            held = self._at(places, done)
            if held.shape == shape and not any(torch.equal(held, other) for other, _ in found):
                found.append((held, done))
        if len(found) == 1:
            done = found[0][1]
            return self._at(value, set(self._open) - set(done), done=done, first=len(before))
        if found:
            raise InvalidArgumentError(
                f"{what} may be of all places or of those of {self}: both have this shape",
                got=str(list(value.shape)),
                fix="cache.apply_slice_to_pos_dim(...) or cache.apply_slice_to_batch_dim(...), and no slice here",
            )
        whole = ", ".join([*before, *(f"{axis} {size}" for axis, size in self.sizes.items()), *after])
        picked_sizes = ", ".join([*before, *map(str, self._at(places, self._open).shape), *after])
        raise InvalidArgumentError(
            f"{what} does not have the rows and positions of this cache",
            expected=f"[{whole}]" + (f", or [{picked_sizes}] after {self}" if self._open else ""),
            got=str(list(value.shape)),
        )

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
        return ", ".join(f"{_ARGUMENTS[axis]}={self.choices[axis]!r}" for axis in self._open)
