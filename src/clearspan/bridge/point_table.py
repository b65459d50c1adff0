"""The table of a model's hook points, as it is known without running the model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

from clearspan.points import Derived, HookPoint, entry_of
from clearspan.shapes import Axes


@dataclass(frozen=True)
class PointRow:
    """One hook point.

    Attributes:
        name: Its canonical name.
        axes: Its axes.
        sizes: The sizes that the model fixes, axis by axis; None where the input does.
        tap: How it is reached.
        value: What it shows.
        write: What a write changes.
        aliases: Other names of it.
    """

    name: str
    axes: Axes
    sizes: tuple[int | None, ...]
    tap: str
    value: str
    write: str
    aliases: tuple[str, ...]

    @classmethod
    def of(cls, point: HookPoint) -> "PointRow":
        """Returns the row of a point."""
        entry = entry_of(point.name)
        how = "computed from the " if isinstance(point.access, Derived) else ""
        sizes = tuple(point.sizes.get(axis) for axis in point.axes)
        return cls(point.name, point.axes, sizes, f"{how}{point.place}", entry.value, entry.write, point.aliases)

    @property
    def shape(self) -> str:
        """Axes and sizes as text."""
        known = (
            axis if size is None or axis == str(size) else f"{axis}={size}"
            for axis, size in zip(self.axes, self.sizes, strict=True)
        )
        return f"[{', '.join(known)}]"


class PointTable(Sequence[PointRow]):
    """Rows of hook points, in the order of the forward. Printing it shows names, axes with sizes, and places."""

    def __init__(self, rows: Iterable[PointRow]) -> None:
        self._rows = tuple(rows)

    @classmethod
    def of(cls, points: Iterable[HookPoint]) -> "PointTable":
        """Returns the table of some points."""
        return cls(map(PointRow.of, points))

    @overload
    def __getitem__(self, index: int) -> PointRow: ...

    @overload
    def __getitem__(self, index: slice) -> "PointTable": ...

    def __getitem__(self, index: int | slice) -> "PointRow | PointTable":
        """Returns a row, or a table of some."""
        return self._rows[index] if isinstance(index, int) else PointTable(self._rows[index])

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        names = max((len(row.name) for row in self._rows), default=0)
        shapes = max((len(row.shape) for row in self._rows), default=0)
        return "\n".join(f"{row.name:{names}}  {row.shape:{shapes}}  {row.tap}" for row in self._rows)
