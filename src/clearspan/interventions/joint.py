"""Sites of one point that differ in their rows and places alone, written in one go: cells of a sweep."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clearspan.interventions.site import Taken, Written
from clearspan.transfers import on_device

Placed = tuple[Written, slice]
"""A site in a run, and the rows of the batch in which it is written."""
Places = Sequence[Sequence[int]]
"""Places on an axis, for each row of a batch."""


def write_all(value: Tensor, placed: Sequence[Placed], source_of: Callable[[Written], Taken | None]) -> None:
    """Writes sites into the value of their point, each in its rows, in their order.

    Args:
        value: The value, of all columns or of the last ones.
        placed: The sites, with the rows of the value that each writes.
        source_of: What a site's action takes from its source run.
    """
    for group in _alike(value, placed, source_of):
        if len(group) == 1:
            only = group[0]
            only.written.write(value, only.source, only.rows)
        else:
            _write_together(value, group)


@dataclass(frozen=True, eq=False)
class _Part:
    """A site in its rows, with what its action takes.

    Attributes:
        written: The site.
        rows: The rows of the value that it writes.
        source: What the action takes, or None.
        kind: What those have in common that can be written in one go; None for a site that is written alone.
    """

    written: Written
    rows: slice
    source: Taken | None
    kind: object

    @classmethod
    def of(cls, value: Tensor, written: Written, rows: slice, source: Taken | None) -> "_Part":
        """Returns a site in its rows."""
        return cls(written, rows, source, _kind(value, written, rows, source))

    def takes_as(self, other: Written) -> bool:
        """Whether another site takes the same from its source: a value that is taken column by column, as a whole."""
        own = self.written
        return (
            self.source is not None
            and self.source.is_by_column
            and own.site.point is other.site.point
            and own.site.intervention.action is other.site.intervention.action
            and own.batch is other.batch
            and not other.is_generating
        )

    def goes_with(self, other: "_Part") -> bool:
        """Whether another site, in rows after this one's, can be written in one go with it."""
        return self.kind is not None and self.kind == other.kind and other.rows.start >= self.rows.stop


def _kind(value: Tensor, written: Written, rows: slice, source: Taken | None) -> object:
    """Returns the action, how many places are written on each axis, and the source; None for what is written alone."""
    site, spots = written.site, written.rows
    count = written.batch.rows
    if not site.action.treats_rows_alone or site.axes[1] != "pos" or written.is_generating:
        return None
    if rows == slice(None) or rows.stop - rows.start != count:
        return None
    columns: int | None = None
    if spots is not None:
        columns = len(spots[0].columns)
        before = written.batch.width - value.shape[1]
        if not columns or any(len(one.columns) != columns or min(one.columns) < before for one in spots):
            return None
    elif source is not None and not (source.is_by_column or source.is_constant):
        return None
    fixed = tuple((axis, len(chosen)) for axis, chosen in site.fixed.items() if chosen is not None)
    if source is None:
        return site.action, columns, fixed
    return site.action, columns, fixed, id(source.values), source.is_by_column, source.is_constant, source.in_order


def _alike(
    value: Tensor, placed: Sequence[Placed], source_of: Callable[[Written], Taken | None]
) -> Iterator[list[_Part]]:
    """Yields sites in their order, those next to each other that can be written in one go together."""
    group: list[_Part] = []
    for written, rows in placed:
        source = group[-1].source if group and group[-1].takes_as(written) else source_of(written)
        part = _Part.of(value, written, rows, source)
        if group and not group[-1].goes_with(part):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _write_together(value: Tensor, group: Sequence[_Part]) -> None:
    """Writes sites of one action that have as many places each."""
    written, source = group[0].written, group[0].source
    written.site.action.check_value(value, written.site.name)
    before = written.batch.width - value.shape[1]
    rows = [[row] for part in group for row in range(part.rows.start, part.rows.stop)]
    columns = read = None
    if written.rows is not None:
        spots = [row for part in group for row in part.written.rows or ()]
        columns = [[column - before for column in row.columns] for row in spots]
        read = None if source is None else [row.read_from(source) for row in spots]
    elif before:
        read = [range(before, written.batch.width)] * len(rows)
    fixed = [_places(group, axis) for axis in written.site.axes[2:]]
    at = _index(value, [rows, columns, *fixed])
    given = None
    if source is not None:
        own = [[row if len(source.values) > 1 else 0] for _ in group for row in range(written.batch.rows)]
        read = [[0]] * len(own) if source.is_constant else read
        given = source.values[_index(source.values, [own, read, *fixed])]
    value[at] = written.site.action.new(value[at], given)


def _places(group: Sequence[_Part], axis: str) -> Places | None:
    """Returns the places of an axis that are written, for each row; None for all."""
    chosen = [(part.written.site.fixed.get(axis), part.rows) for part in group]
    if chosen[0][0] is None:
        return None
    return [places for places, rows in chosen if places is not None for _ in range(rows.start, rows.stop)]


def _index(value: Tensor, places: Sequence[Places | None]) -> tuple[Tensor, ...]:
    """Returns the index of a value's places, of which each row has its own; axes after the last of these are whole.

    Args:
        value: The value.
        places: For each axis the places in each row; None for all.
    """
    count = 1 + max(at for at, there in enumerate(places) if there is not None)
    index = []
    for at, there in enumerate(places[:count]):
        own = torch.arange(value.shape[at])[None] if there is None else torch.tensor([list(one) for one in there])
        shape = [own.shape[1] if axis == at else 1 for axis in range(count)]
        shape[0] = len(own)
        index.append(on_device(own.view(shape), value.device))
    return tuple(index)
