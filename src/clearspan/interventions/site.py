"""Sites: interventions laid on the hook points of a model, and written in the rows and columns of a run."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from clearspan.errors import InvalidArgumentError, PointNotReachedError
from clearspan.inputs import Batch
from clearspan.interventions.actions import Action
from clearspan.interventions.intervention import ByRow, Intervention, Span, Spots
from clearspan.points import HookPoint
from clearspan.shapes import Axes
from clearspan.transfers import numbers_on

_FIXED = {"heads": ("head", "kv_head"), "neurons": ("d_mlp", "expert", "feature", "d_model")}
"""The fields that choose places of axes that the model fixes, and these axes."""
_QUERIES, _KEYS = ("pos", "q_pos"), ("k_pos",)
_AXES_OF = {**_FIXED, "positions": _QUERIES, "columns": _QUERIES, "key_positions": _KEYS}
"""The fields that choose places of an axis, and the axes that each may mean."""
Chosen = tuple[int, ...] | None
"""Places of an axis, from 0; None for all."""


@dataclass(frozen=True, eq=False)
class Site:
    """An intervention at a hook point of one model, whatever is run.

    Attributes:
        intervention: What is done, and where.
        point: The hook point.
        fixed: Heads and neurons chosen, by axis.
    """

    intervention: Intervention
    point: HookPoint
    fixed: dict[str, Chosen]

    @property
    def name(self) -> str:
        """The hook point's name."""
        return self.point.name

    @property
    def axes(self) -> Axes:
        """The hook point's axes."""
        return self.point.axes

    @property
    def action(self) -> Action:
        """What is done."""
        return self.intervention.action

    @property
    def sequence_axis(self) -> int:
        """Which axis has the positions that are written."""
        return self.axes.index("pos" if "pos" in self.axes else "q_pos")

    def on(self, batch: Batch, *, where_possible: bool = False) -> "Written":
        """Returns the site in a run of a batch.

        Args:
            batch: The whole sequence of a forward, or the prompt of a generation.
            where_possible: Whether rows that lack a position are left as they are. Otherwise they are an error.

        Raises:
            InvalidArgumentError: A row lacks a position, or there is not one list of positions for each row.
        """
        return Written(self, batch, where_possible)


@dataclass(frozen=True, eq=False)
class Written:
    """A site in the rows and columns of one run.

    Attributes:
        site: The site.
        batch: The run's whole sequence, or a generation's prompt.
        where_possible: Whether rows that lack a position are left as they are.
        was_before: Whether the run that this one continues was written too; then earlier positions are left alone.
        is_generating: Whether the sequence grows beyond the batch.
    """

    site: Site
    batch: Batch
    where_possible: bool = False
    was_before: bool = False
    is_generating: bool = False

    def __post_init__(self) -> None:
        _ = self.rows  # checks the positions

    @cached_property
    def rows(self) -> "tuple[RowSpots, ...] | None":
        """What is written in each row, or None for all columns of all rows."""
        return self.up_to(self.batch.width)

    def up_to(self, width: int) -> "tuple[RowSpots, ...] | None":
        """Returns what is written in each row of a sequence that has so many columns by now, the batch's first."""
        if self._spots is None and self.site.intervention.key_spots is None:
            return None
        return tuple(self._in_row(row, real) for row, real in enumerate(self._real(width)))

    def at_site(self, site: Site) -> "Written":
        """Returns another site that is written at the same positions; what was looked up for these is kept."""
        new = object.__new__(type(self))
        vars(new).update(vars(self), site=site)
        return new

    @property
    def needed(self) -> "tuple[RowSpots, ...] | None":
        """What is written in each row in the end, also at tokens that are yet to be made; None if there is no end."""
        if not self.is_generating:
            return self._everywhere(self.batch.width) if self.rows is None else self.rows
        spots, keys = self._spots, self.site.intervention.key_spots
        is_open = any(isinstance(one, Span) and one.stop is None for one in (spots, keys))
        if spots is None or is_open or self.site.intervention.every_step:
            return None
        endless = range(sys.maxsize)
        return tuple(self._in_row(row, endless) for row in range(self.batch.rows))

    def _real(self, width: int) -> list[tuple[int, ...]]:
        """Returns the columns of each row's real tokens in a sequence that has so many columns by now."""
        new = range(self.batch.width, width)
        return [(*real, *new) for real in self.batch.real_columns] if new else list(self.batch.real_columns)

    def _everywhere(self, width: int) -> "tuple[RowSpots, ...]":
        """Returns all real tokens of each row."""
        return tuple(RowSpots.of(range(len(real)), real) for real in self._real(width))

    def _in_row(self, row: int, real: Sequence[int]) -> "RowSpots":
        """Returns what is written in a row whose real tokens are in these columns."""
        asked = self._of_row(self._spots, row, len(real), "position")
        keys = self.site.intervention.key_spots
        own = None if keys is None else self._of_row(keys, row, len(real), "key position")
        if asked is None or (keys is not None and own is None):
            return RowSpots.of((), real, is_left=True)
        if self.site.intervention.every_step:
            asked += [one for one in range(len(self.batch.real_columns[row]), len(real)) if one not in asked]
        return RowSpots.of(asked, real, own)

    @cached_property
    def _spots(self) -> Spots:
        """The positions that are written, also where columns were chosen."""
        columns = self.site.intervention.columns
        if columns is None:
            return self.site.intervention.spots
        width, by_row = self.batch.width, []
        for row, real in enumerate(self.batch.real_columns):
            place = {column: position for position, column in enumerate(real)}
            own = []
            for column in columns:
                at = column + width if column < 0 else column
                if at >= width and self.is_generating:
                    own.append(len(real) + at - width)
                elif at not in place:
                    raise InvalidArgumentError(
                        f"column {column} of row {row} has no real token", expected=f"one of {list(real)}"
                    )
                else:
                    own.append(place[at])
            by_row.append(tuple(own))
        return ByRow(tuple(by_row))

    def _of_row(self, spots: Spots, row: int, length: int, what: str) -> list[int] | None:
        """Returns the positions asked for in a row, from 0; None for a row that lacks one and is left as it is.

        Negative ones count from the batch's last real token. In generation some may be yet to come.
        """
        known = len(self.batch.real_columns[row])
        match spots:
            case None:
                return list(range(length))
            case Span():
                return spots.of(length, known)
            case ByRow(lists):
                if len(lists) != self.batch.rows:
                    raise InvalidArgumentError(
                        f"{what}s are not one list for each row",
                        expected=f"{self.batch.rows} lists",
                        got=str(len(lists)),
                        where=self.site.name,
                    )
                wanted = lists[row]
            case _:
                wanted = spots
        found = []
        for position in wanted:
            at = position + known if position < 0 else position
            if at < 0 or (at >= length and not self.is_generating):
                if self.where_possible:
                    return None
                self.batch.position_of(row, position, what)  # raises
            found.append(at)
        return found

    @cached_property
    def lacking(self) -> tuple[bool, ...]:
        """Whether each row lacks a position that was asked for, and is left as it is."""
        return (False,) * self.batch.rows if self.rows is None else tuple(row.is_left for row in self.rows)

    @cached_property
    def first(self) -> int:
        """The first column at which the value changes."""
        rows = self.rows
        return (
            0 if rows is None else min((column for row in rows for column in row.columns), default=self.batch.width - 1)
        )

    def write(
        self,
        value: Tensor,
        source: "Taken | None",
        rows: slice = slice(None),
        *,
        width: int | None = None,
    ) -> bool:
        """Writes into a value; returns whether anything was written.

        Args:
            value: The value, of all columns or of the last ones.
            source: What the action takes from its source run.
            rows: The rows of the value that are written: the batch's, or each of them several times.
            width: Columns of the whole sequence by now; by default the batch's.

        Raises:
            PointNotReachedError: A position lies before those that the value has.
            InvalidArgumentError: The action needs numbers, and the value holds none.
        """
        self.site.action.check_value(value, self.site.name)
        width = self.batch.width if width is None else width
        before = width - value.shape[self.site.sequence_axis]
        spots = self.rows if width == self.batch.width else self.up_to(width)
        if spots is None and source is not None and not (source.is_by_column or source.is_constant):
            spots = self._everywhere(width)
        if spots is not None and source is not None and not source.is_by_column and "k_pos" in self.site.axes:
            count = source.values.shape[self.site.axes.index("k_pos")]
            spots = tuple(
                one if one.keys is not None else replace(one, keys=tuple(range(len(real))), key_columns=real)
                for one, real in zip(spots, (real[:count] for real in self._real(width)), strict=True)
            )
        if spots is None:
            return self._write(value, rows, None, before, source, None)
        spots = [self._within(one, before) for one in spots]
        if all(one == spots[0] for one in spots):
            return self._write(value, rows, spots[0], before, source, None)
        written = range(*rows.indices(len(value)))
        copies = len(written) // len(spots)
        owners = [number // copies if self.is_generating else number % len(spots) for number in range(len(written))]
        is_even = all(one.keys is None and len(one.columns) == len(spots[0].columns) for one in spots)
        if is_even and self.site.sequence_axis == 1:
            return self._write_each(value, written, [spots[row] for row in owners], owners, before, source)
        wrote = False
        for number, row in zip(written, owners, strict=True):
            wrote |= self._write(value, slice(number, number + 1), spots[row], before, source, row)
        return wrote

    def _write_each(
        self,
        value: Tensor,
        rows: range,
        spots: "Sequence[RowSpots]",
        owners: Sequence[int],
        before: int,
        source: "Taken | None",
    ) -> bool:
        """Writes in rows that have as many positions each, at once."""
        if not spots[0].columns:
            return False
        at = numbers_on(value.device, rows)[:, None], numbers_on(value.device, [one.columns for one in spots]) - before
        there = value[at]  # a copy: [row, place, ...]
        part, index = self._chosen(there)
        part = _kept(part)
        given = None
        if source is not None:
            where = source.values.device
            own = numbers_on(where, owners if len(source.values) > 1 else [0] * len(owners))
            read = None if source.is_constant else numbers_on(where, [one.read_from(source) for one in spots])
            given, _ = self._chosen(source.values[own] if read is None else source.values[own[:, None], read])
        there[index] = self.site.action.new(part, given)
        value[at] = there
        return True

    def _chosen(self, value: Tensor) -> tuple[Tensor, tuple[slice | Tensor, ...]]:
        """Returns the heads and neurons chosen of values `[row, place, ...]`, and their index."""
        fixed = [self.site.fixed.get(axis) for axis in self.site.axes[2:]]
        index = slice(None), *_index([None, *fixed], value)
        return value[index], index

    def _write(
        self, value: Tensor, rows: slice, spots: "RowSpots | None", before: int, source: "Taken | None", row: int | None
    ) -> bool:
        """Writes in rows that have the same positions in the same columns."""
        if spots is not None and (not spots.columns or spots.key_columns == ()):
            return False
        chosen = dict(self.site.fixed)
        read = dict(self.site.fixed)
        for axis, size in zip(self.site.axes[1:], value.shape[1:], strict=True):
            if axis in _QUERIES:
                chosen[axis] = None if spots is None else tuple(column - before for column in spots.columns)
                everything = tuple(range(before, before + size)) if before else None
                read[axis] = everything if spots is None else spots.read_from(source)
            elif axis in _KEYS:
                chosen[axis] = None if spots is None else spots.key_columns
                read[axis] = None if spots is None else spots.keys_read_from(source)
        at = (rows, *_index([chosen.get(axis) for axis in self.site.axes[1:]], value))
        part = _kept(value[at])
        given = None
        if source is not None:
            read = {axis: None if source.is_constant and axis in _QUERIES else one for axis, one in read.items()}
            index = _index([read.get(axis) for axis in self.site.axes[1:]], source.values)
            own = slice(None) if row is None or len(source.values) == 1 else slice(row, row + 1)
            given = source.values[(own, *index)]
            if row is None and len(given) not in (1, len(part)):
                given = self._repeated(given, len(part) // len(given))
        value[at] = self.site.action.new(part, given)
        if self.site.action.hides_keys:
            queries = [chosen.get(axis) if axis in _QUERIES else None for axis in self.site.axes[1:]]
            self._check_keys(value[(rows, *_index(queries, value))])
        return True

    def _check_keys(self, scores: Tensor) -> None:
        """Raises if a query is left without a key that it can attend to."""
        if bool((scores.detach().amax(-1) <= torch.finfo(scores.dtype).min).any()):
            raise InvalidArgumentError(
                "a query has no key left to attend to", where=self.site.name, reason="Mask hides all that it could see"
            )

    def _repeated(self, given: Tensor, copies: int) -> Tensor:
        """Returns a source's rows as often as the batch's are there: side by side in generation, in turn in a sweep."""
        return (
            given.repeat_interleave(copies, 0) if self.is_generating else given.repeat(copies, *[1] * (given.ndim - 1))
        )

    def _within(self, spots: "RowSpots", before: int) -> "RowSpots":
        """Returns the places that a value has which starts at a column."""
        if not before or min(spots.columns, default=before) >= before:
            return spots
        if self.was_before or self.is_generating:
            return spots.only([at for at, column in enumerate(spots.columns) if column >= before])
        raise PointNotReachedError(
            f"position {min(spots.columns)} is not among those of this run",
            where=self.site.name,
            expected=f"{before} to {self.batch.width - 1}",
        )


@dataclass(frozen=True)
class RowSpots:
    """Where one row is written.

    Attributes:
        positions: Among its real tokens.
        columns: The same as columns.
        order: Which of the positions asked for each of them is, from 0.
        keys: Positions of keys, where some are chosen.
        key_columns: The same as columns.
        is_left: Whether the row lacks a position that was asked for, and is left as it is.
    """

    positions: tuple[int, ...]
    columns: tuple[int, ...]
    order: tuple[int, ...]
    keys: Chosen = None
    key_columns: Chosen = None
    is_left: bool = False

    @classmethod
    def of(
        cls, asked: Sequence[int], real: Sequence[int], keys: Sequence[int] | None = None, *, is_left: bool = False
    ) -> "RowSpots":
        """Returns those of the positions asked for that are there, in a row whose real tokens are in some columns."""
        order = tuple([at for at, one in enumerate(asked) if one < len(real)])
        positions = tuple([asked[at] for at in order])
        own = None if keys is None else tuple(one for one in keys if one < len(real))
        columns, key_columns = (None if one is None else tuple(real[at] for at in one) for one in (positions, own))
        return cls(positions, columns or (), order, own, key_columns, is_left)

    def only(self, some: Sequence[int]) -> "RowSpots":
        """Returns some of the positions, by their number in the row."""
        positions, columns, order = (
            tuple(one[at] for at in some) for one in (self.positions, self.columns, self.order)
        )
        return replace(self, positions=positions, columns=columns, order=order)

    @property
    def reach(self) -> int:
        """How many positions a source must have."""
        return 1 + max((*self.positions, *(self.keys or ())), default=-1)

    def read_from(self, source: "Taken | None") -> tuple[int, ...]:
        """Returns which places of the source's axis of positions are read."""
        if source is None:
            return self.positions
        return self.order if source.in_order else self.columns if source.is_by_column else self.positions

    def keys_read_from(self, source: "Taken | None") -> Chosen:
        """Returns which places of the source's axis of keys are read."""
        return self.key_columns if source is not None and source.is_by_column else self.keys


@dataclass(frozen=True, eq=False)
class Taken:
    """What an action takes from its source run.

    Attributes:
        values: The values: one row for all, or as many as the run has.
        is_by_column: Whether the source's columns are those of the run; otherwise its places are positions.
        is_constant: Whether it has one place, which all positions take.
        in_order: Whether its places are taken in the order of those that are written.
    """

    values: Tensor
    is_by_column: bool = False
    is_constant: bool = False
    in_order: bool = False


def all_located(
    interventions: Iterable[Intervention], find: Callable[[str], HookPoint], n_layers: int
) -> Iterator[Site]:
    """Yields interventions as sites of a model; those that differ in positions alone are looked up once.

    The arguments are those of `located`.
    """
    known: dict[object, Site] = {}
    for one in interventions:
        key = (
            one.point,
            one.layer,
            id(one.action),
            one.heads,
            one.neurons,
            one.positions is None,
            one.columns is None,
            one.key_positions is None,
        )
        like = known.get(key)
        if like is None:
            like = known[key] = located(one, find, n_layers)
        yield Site(one, like.point, like.fixed)


def all_written(sites: Iterable[Site], batch: Batch) -> "Iterator[Written]":
    """Yields sites in a run of a batch, in rows that have their positions; these are looked up once."""
    known: dict[object, Written] = {}
    for site in sites:
        one = site.intervention
        key = one.positions, one.columns, one.key_positions, one.every_step
        like = known.get(key)
        if like is None:
            like = known[key] = site.on(batch, where_possible=True)
            _ = like.lacking, like.first  # found once too
        yield like.at_site(site)


def located(intervention: Intervention, find: Callable[[str], HookPoint], n_layers: int) -> Site:
    """Returns an intervention as a site of a model.

    Args:
        intervention: The intervention.
        find: Gives the hook point of a name.
        n_layers: Layers of the model.

    Raises:
        UnknownPointError: The model has no such point.
        InvalidArgumentError: Places on an axis that the point does not have, or outside of it; or an action that the
            point cannot take.
    """
    point = find(intervention.name(n_layers))
    fixed: dict[str, Chosen] = {}
    for field, axes in _AXES_OF.items():
        places = getattr(intervention, field)
        if places is None:
            continue
        axis = next((axis for axis in axes if axis in point.axes), None)
        if axis is None:
            raise InvalidArgumentError(
                f"{point.name} has no {field.replace('_', ' ')}",
                expected=f"places on its axes: {', '.join(point.axes[1:])}",
                got=f"{field}={places}",
            )
        if field in _FIXED:
            fixed[axis] = _from_zero(places, point.sizes[axis], f"{field} of {point.name}")
    intervention.action.check_point(point, chooses_keys=intervention.key_positions is not None)
    return Site(intervention, point, fixed)


def _from_zero(places: Sequence[int], size: int, what: str) -> tuple[int, ...]:
    for place in places:
        if not -size <= place < size:
            raise InvalidArgumentError(f"no {place} among the {what}", expected=f"-{size} to {size - 1}")
    return tuple(place % size for place in places)


def _kept(part: Tensor) -> Tensor:
    """Returns a part of a value that is about to be written; a copy where autograd may need it later as it was."""
    return part.clone() if part.requires_grad else part


def _index(places: Sequence[Chosen], value: Tensor) -> tuple[slice | Tensor, ...]:
    """Returns the index of places on the axes after the batch's."""
    index = [slice(None) if chosen is None else _index_of(chosen, value.device) for chosen in places]
    if sum(isinstance(part, Tensor) for part in index) < 2:
        return tuple(index)
    return _meshed(index, value)


def _index_of(places: tuple[int, ...], device: torch.device) -> slice | Tensor:
    """Returns places as a slice where they lie next to each other, so that no index has to be made."""
    first, count = places[0], len(places)
    if places == tuple(range(first, first + count)):
        return slice(first, first + count)
    return numbers_on(device, places)


def _meshed(index: list[slice | Tensor], value: Tensor) -> tuple[Tensor, ...]:
    """Returns an index that chooses the product of the places on all axes after the batch's."""
    every = [
        torch.arange(size, device=value.device)[part] if isinstance(part, slice) else part
        for part, size in zip(index, value.shape[1:], strict=True)
    ]
    return torch.meshgrid(*every, indexing="ij")
