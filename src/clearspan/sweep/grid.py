"""Grids: many cells, each a few interventions, laid out on named axes. Data, with a JSON form."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

from clearspan.checks import check_fields, check_kind, wholes
from clearspan.effects import Label
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Action, Intervention
from clearspan.interventions.intervention import at_each, interventions_of

Cells = tuple[tuple[Intervention, ...], ...]

_FIELD_OF = {
    "layer": "layer",
    "position": "positions",
    "head": "heads",
    "neuron": "neurons",
    "key_position": "key_positions",
}
"""Names of axes, and the field of an intervention that each sets."""


@dataclass(frozen=True)
class Grid:
    """Cells on axes. One cell is one experiment: its interventions are made together.

    Attributes:
        axes: Names of the axes, with the labels of the places on each.
        cells: The interventions of each cell, the last axis running fastest.
    """

    axes: tuple[tuple[str, tuple[Label, ...]], ...]
    cells: Cells

    def __post_init__(self) -> None:
        is_axes = isinstance(self.axes, tuple) and all(isinstance(axis, tuple) and len(axis) == 2 for axis in self.axes)
        if not is_axes or not all(isinstance(labels, tuple) for _, labels in self.axes):
            raise InvalidArgumentError(
                f"axes={self.axes!r}"[:80], expected="((name, labels), ...)", fix="grid(...), or Grid.of(...)"
            )
        check_kind(tuple, cells=self.cells)
        if len(self.cells) != prod(self.shape) or not self.cells:
            raise InvalidArgumentError(
                "the cells do not fill the axes", expected=f"{prod(self.shape)}, more than 0", got=str(len(self.cells))
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Places on each axis."""
        return tuple(len(labels) for _, labels in self.axes)

    @classmethod
    def of(cls, interventions: Mapping[str, Intervention | Sequence[Intervention]], axis: str = "cell") -> Self:
        """Returns a grid of one axis, from the interventions of each cell by its label."""
        check_kind(Mapping, interventions=interventions)
        cells = tuple(map(interventions_of, interventions.values()))
        return cls(((axis, tuple(interventions)),), cells)

    @classmethod
    def stacked(cls, grids: "Mapping[str, Grid]", axis: str = "point") -> Self:
        """Returns grids of the same axes as one, with an axis more in front."""
        check_kind(Mapping, grids=grids)
        check_kind(Grid, **{f"grid {label}": one for label, one in grids.items()})
        first = next(iter(grids.values()), None)
        if first is None:
            raise InvalidArgumentError("there is no grid to stack", expected="grids by label")
        for label, grid in grids.items():
            if grid.axes != first.axes:
                raise InvalidArgumentError(
                    f"the grid {label!r} has other axes", expected=str(first.shape), got=str(grid.shape)
                )
        cells = itertools.chain.from_iterable(grid.cells for grid in grids.values())
        return cls(((axis, tuple(grids)), *first.axes), tuple(cells))

    def to_json(self) -> dict[str, Any]:
        """Returns the grid as plain data."""
        axes = [
            [name, [list(label) if isinstance(label, tuple) else label for label in labels]]
            for name, labels in self.axes
        ]
        return {"axes": axes, "cells": [[one.to_json() for one in cell] for cell in self.cells]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Returns the grid of its JSON form."""
        check_fields("grid", data, "axes", "cells")
        axes = tuple(
            (name, tuple(tuple(label) if isinstance(label, list) else label for label in labels))
            for name, labels in data["axes"]
        )
        return cls(axes, tuple(tuple(Intervention.from_json(one) for one in cell) for cell in data["cells"]))


def grid(what: str | Intervention, action: Action | None = None, **axes: Iterable[int | tuple[int, ...]]) -> Grid:
    """Returns the grid of one intervention at every place of a product of axes.

    Args:
        what: A hook point's short name, or an intervention whose other fields all cells keep.
        action: What is done; an intervention has its own.
        **axes: `layer`, `position`, `head`, `neuron`, `key_position`: the places on each, in the order of the result's
            axes. A place may be several, as a tuple.

    Raises:
        InvalidArgumentError: An unknown axis, one without places, or an action that is given twice or not at all.

    Example:
        >>> from clearspan.interventions import Patch
        >>> grid("z", Patch(), layer=range(2), head=range(4)).shape
        (2, 4)
    """
    if isinstance(what, str) == (action is None):
        raise InvalidArgumentError(
            "a grid has one action", expected="grid('z', Patch(), ...), or grid(Intervention('z', Patch()), ...)"
        )
    check_kind(str, Intervention, what=what)
    template = Intervention(what, action) if isinstance(what, str) and action is not None else what
    assert isinstance(template, Intervention), "checked above"
    places = {name: _labels(name, labels) for name, labels in axes.items()}
    for name, labels in places.items():
        if name not in _FIELD_OF or not labels:
            raise InvalidArgumentError(
                f"a grid cannot have the axis {name}={list(labels)}", expected=f"places on {', '.join(_FIELD_OF)}"
            )
    cells = at_each(template, {_FIELD_OF[name]: labels for name, labels in places.items()})
    return Grid(tuple(places.items()), tuple((cell,) for cell in cells))


def _labels(axis: str, labels: object) -> tuple[int | tuple[int, ...], ...]:
    """Returns the places on an axis: a place may be several, as a tuple."""
    one = wholes(labels)
    if one is not None:
        return one
    given = list(labels) if isinstance(labels, Iterable) else [labels]
    several = [wholes(label) for label in given]
    if not all(several):
        raise InvalidArgumentError(f"{axis}={labels!r}"[:80], expected="places, each a whole number or several")
    return tuple(
        found if isinstance(label, tuple) else found[0] if len(found) == 1 else found
        for label, found in zip(given, several, strict=True)
        if found
    )
