"""Sites: interventions laid on the hook points of one model and the positions of one run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clearspan.errors import InvalidArgumentError, PointNotReachedError
from clearspan.interventions.actions import Action
from clearspan.interventions.intervention import Intervention, Places
from clearspan.points import HookPoint
from clearspan.shapes import Axes

_AXES_OF = {
    "positions": ("pos", "q_pos"),
    "heads": ("head", "kv_head"),
    "neurons": ("d_mlp", "expert", "d_model"),
    "key_positions": ("k_pos",),
}
"""The axes that each choice of places is about."""
_ALONG_TEXT = ("pos", "q_pos", "k_pos")


@dataclass(frozen=True)
class Site:
    """What is done to which part of the value at one hook point of a run.

    Attributes:
        name: The hook point.
        axes: Its axes.
        places: The places chosen on each axis but the batch's, from 0; None for all.
        action: What is done.
        length: Positions of the whole run.
        was_before: Whether it was written too in the run from which others go on, so that what lies before these is
            left as it is.
    """

    name: str
    axes: Axes
    places: tuple[Places, ...]
    action: Action
    length: int
    was_before: bool = False

    @property
    def first(self) -> int:
        """The first position at which the value changes."""
        for axis, places in zip(self.axes[1:], self.places, strict=True):
            if axis in ("pos", "q_pos") and places is not None:
                return min(places)
        return 0

    def write(self, value: Tensor, source: Tensor | None, rows: slice = slice(None)) -> None:
        """Writes into a value.

        Args:
            value: The value, of all positions or of the last ones.
            source: What the action's source run gives, with all positions and as many rows as are written, or one.
            rows: The rows of the value that are written.

        Raises:
            PointNotReachedError: A position chosen lies before those that the value has.
        """
        before = [self.length - size if axis in _ALONG_TEXT else 0 for axis, size in self._sizes(value)]
        chosen = [self._from(places, first) for places, first in zip(self.places, before, strict=True)]
        if () in chosen:
            return
        at = (rows, *_index([_less(places, first) for places, first in zip(chosen, before, strict=True)], value))
        part = value[at]
        if source is not None:
            every = [
                tuple(range(first, first + size)) if places is None and first else places
                for places, first, (_, size) in zip(chosen, before, self._sizes(value), strict=True)
            ]
            source = source[(slice(None), *_index(every, source))]
        value[at] = self.action.new(part, source)

    def _sizes(self, value: Tensor) -> list[tuple[str, int]]:
        return list(zip(self.axes[1:], value.shape[1:], strict=True))

    def _from(self, places: Places, first: int) -> Places:
        """Returns places of an axis that a value has from `first` on."""
        if places is None or min(places) >= first:
            return places
        if self.was_before:
            return tuple(place for place in places if place >= first)
        raise PointNotReachedError(
            f"position {min(places)} is not among those of this run",
            where=self.name,
            expected=f"{first} to {self.length - 1}",
        )


def located(intervention: Intervention, find: Callable[[str], HookPoint], n_layers: int, length: int) -> Site:
    """Returns an intervention as a site of a model and a run.

    Args:
        intervention: The intervention.
        find: Gives the hook point of a name.
        n_layers: Layers of the model.
        length: Positions of the run.

    Raises:
        UnknownPointError: The model has no such point.
        InvalidArgumentError: Places on an axis that the point does not have, or outside of it.
    """
    point = find(intervention.name(n_layers))
    sizes = {**point.sizes, "pos": length, "q_pos": length, "k_pos": length}
    chosen: dict[str, Places] = {}
    for field, axes in _AXES_OF.items():
        places = getattr(intervention, field)
        axis = next((axis for axis in axes if axis in point.axes), None)
        if places is None:
            continue
        if axis is None:
            raise InvalidArgumentError(
                f"{point.name} has no {field.replace('_', ' ')}",
                expected=f"places on its axes: {', '.join(point.axes[1:])}",
                got=f"{field}={places}",
            )
        chosen[axis] = _from_zero(places, sizes[axis], f"{field.replace('_', ' ')} of {point.name}")
    laid = tuple(chosen.get(axis) for axis in point.axes[1:])
    return Site(point.name, point.axes, laid, intervention.action, length)


def _from_zero(places: Sequence[int], size: int, what: str) -> tuple[int, ...]:
    for place in places:
        if not -size <= place < size:
            raise InvalidArgumentError(f"no {place} among the {what}", expected=f"-{size} to {size - 1}")
    return tuple(place % size for place in places)


def _less(places: Places, first: int) -> Places:
    return places if places is None or not first else tuple(place - first for place in places)


def _index(places: Sequence[Places], value: Tensor) -> tuple[slice | Tensor, ...]:
    """Returns the index of places on the axes after the batch's."""
    index = [slice(None) if chosen is None else _index_of(chosen) for chosen in places]
    if sum(isinstance(part, Tensor) for part in index) < 2:
        return tuple(index)
    return _meshed(index, value.shape[1:])


def _index_of(places: tuple[int, ...]) -> slice | Tensor:
    """Returns places as a slice where they lie next to each other, so that no index has to be made."""
    first, count = places[0], len(places)
    if places == tuple(range(first, first + count)):
        return slice(first, first + count)
    return torch.tensor(places)


def _meshed(index: list[slice | Tensor], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Returns an index that chooses the product of the places on all axes."""
    every = [
        torch.arange(size)[part] if isinstance(part, slice) else part for part, size in zip(index, sizes, strict=True)
    ]
    return torch.meshgrid(*every, indexing="ij")
