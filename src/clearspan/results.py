"""Results: what every finding can do. It prints its strongest rows, draws itself, and exports a data frame.

`Summary` is what any object shows of itself, on a terminal and in a notebook.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from clearspan.plots import Chart, folded, fragment, heading, html_table, paragraph, still
from clearspan.plots.marks import cut

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

Columns = Mapping[str, Sequence[object]]
"""A table by its columns, all of one length."""


MOST_LINES, MOST_LETTERS = 36, 2900
"""Of what a last line shows as text."""


@dataclass(frozen=True)
class Summary:
    """What an object says of itself: on a terminal, and in a notebook.

    Attributes:
        heading: One line that says what it is.
        columns: Names of a table's columns; none for no table.
        rows: The table.
        about: Lines above it.
        notes: Lines below it.
    """

    heading: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    about: Sequence[str] = ()
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Returns all of it as lines."""
        lines = table(self.columns, self.rows) if self.columns else []
        return "\n".join([self.heading, *self.about, *lines, *self.notes])

    def html(self, whole: str) -> str:
        """Returns the same as HTML."""
        return fragment(*self.parts(whole))

    def parts(self, whole: str, most: int = 60) -> list[str]:
        """Returns the parts of that HTML: the heading, lines, the table with at most so many rows, lines."""
        left = len(self.rows) - most
        more = [f"… and {left} more rows: {whole}"] if left > 0 else []
        rows = as_html(self.columns, self.rows[:most])
        about, notes = map(paragraph, self.about), map(paragraph, [*more, *self.notes[:24]])
        return [heading(self.heading), *about, rows, *notes]


class Summarised(ABC):
    """An object that has a table in a notebook."""

    @abstractmethod
    def _summary(self) -> Summary:
        """Returns what it says of itself."""

    def _repr_html_(self) -> str:
        """Returns what a notebook shows."""
        return self._summary().html("print(...)")


class Shown(Summarised):
    """An object that is a table: all of it with `print`, what fits on a screen by `repr`, HTML in a notebook."""

    def __str__(self) -> str:
        return self._summary().text()

    def __repr__(self) -> str:
        return shortened(str(self), "print(...)")


class Result(Shown):
    """A finding: a table with a title and a chart. Subclasses are frozen dataclasses with `eq=False, repr=False`."""

    ranked_by: ClassVar[str | None] = None
    """The column by whose size the printed rows are sorted, largest first; None keeps the table's own order."""
    shown: ClassVar[int] = 10
    """How many rows are printed."""

    @property
    @abstractmethod
    def title(self) -> str:
        """One line that says what was found, with units."""

    @abstractmethod
    def columns(self) -> Columns:
        """Returns the whole table, one row a value."""

    @abstractmethod
    def chart(self) -> Chart:
        """Returns the picture as data: `figure()` draws it with plotly, `svg()` as a still picture."""

    def plot(self) -> "go.Figure":
        """Returns a plotly figure."""
        return self.chart().figure()

    def printed(self) -> Columns:
        """Returns the table as it is printed."""
        return self.columns()

    @property
    def rank(self) -> str | None:
        """The column by which the printed rows are sorted."""
        return self.ranked_by

    def _order(self, value: float) -> float:
        """Returns a number by which rows are sorted, largest first."""
        return size(value)

    def to_dataframe(self) -> "pandas.DataFrame":
        """Returns the whole table as a pandas data frame."""
        import pandas

        return pandas.DataFrame(dict(self.columns()))

    def _summary(self) -> Summary:
        columns = self.printed()
        rows = list(zip(*columns.values(), strict=True))
        if self.rank is not None:
            at = list(columns).index(self.rank)
            rows.sort(key=lambda row: -self._order(float(row[at])))
        left = len(rows) - self.shown
        more = [f"… and {left} more rows: .to_dataframe()"] if left > 0 else []
        return Summary(self.title, list(columns), rows[: self.shown], notes=more)

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: the title, a still picture, and the rows that are printed."""
        first, rows, *notes = self._summary().parts(".to_dataframe()")
        picture = "".join(still(chart, self.title) for chart in self._stills())
        return fragment(first, picture, folded("numbers", rows + "".join(notes)) if picture else rows + "".join(notes))

    def _stills(self) -> Iterator[Chart]:
        """Yields what is drawn in a notebook."""
        yield self.chart()


def shortened(text: str, whole: str) -> str:
    r"""Returns the lines of a text that fit on a screen, and how all of them are seen.

    Args:
        text: The lines.
        whole: The call that shows all, such as `print(...)`.

    Example:
        >>> shortened("\n".join("abcd" * 10), "print(x)").splitlines()[-2:]
        ['d', '… and 4 more lines: print(x)']
    """
    lines = [cut(line, 400) for line in text.splitlines()]
    fitting = sum(end <= MOST_LETTERS for end in itertools.accumulate(len(line) + 1 for line in lines))
    shown = min(fitting, MOST_LINES)
    more = [] if shown == len(lines) else [f"… and {len(lines) - shown} more lines: {whole}"]
    return "\n".join([*lines[:shown], *more])


def size(value: float) -> float:
    """Returns a number's size to four digits, by which results are ranked; -1 for NaN.

    Numbers that differ by rounding rank as equal, so that the order is the same on every processor.

    Example:
        >>> size(-0.12345001) == size(0.12345002), size(float("nan"))
        (True, -1.0)
    """
    return -1.0 if value != value else float(f"{abs(value):.3e}")


def number(value: float) -> str:
    """Returns a number to four decimals, very large and very small ones by their exponent; 0 has no sign.

    Example:
        >>> number(-0.0), number(0.98), number(1.5e-7)
        ('0.0000', '0.9800', '1.500e-07')
    """
    return f"{value:z.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3e}"


def counted(count: int, what: str) -> str:
    """Returns a count with its noun.

    Example:
        >>> counted(1, "row"), counted(2, "row")
        ('1 row', '2 rows')
    """
    return f"{count} {what}{'s' * (count != 1)}"


def layer_ranges(layers: Sequence[int]) -> str:
    """Returns layers as text.

    Example:
        >>> layer_ranges([5, 0, 1, 2])
        '0-2, 5'
    """
    parts: list[list[int]] = []
    for layer in sorted(set(layers)):
        if parts and parts[-1][1] == layer - 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    r"""Returns the lines of a table: numbers to the right, text to the left.

    Example:
        >>> print("\n".join(table(["head", "score"], [["L0H1", 0.98], ["L3H2", -0.5]])))
        head    score
        L0H1   0.9800
        L3H2  -0.5000
    """
    cells, numeric = _written(rows), _are_numbers(names, rows)
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [line(row) for row in [list(names), *cells]]


def as_html(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns the same table as HTML."""
    return html_table(names, _written(rows), _are_numbers(names, rows))


def _written(rows: Sequence[Sequence[object]]) -> list[list[str]]:
    return [[number(value) if isinstance(value, float) else str(value) for value in row] for row in rows]


def _are_numbers(names: Sequence[str], rows: Sequence[Sequence[object]]) -> list[bool]:
    """Returns whether each column is of numbers."""
    return [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(names))]


def melted(values: Tensor, name: str, **axes: Sequence[object]) -> dict[str, list[object]]:
    """Returns a tensor as columns: one row a value, with its place on each axis.

    Args:
        values: Of as many axes as there are names.
        name: The column of the values.
        **axes: The places on each axis, in order.

    Example:
        >>> import torch
        >>> melted(torch.tensor([[1.0, 2.0]]), "score", layer=[3], head=[0, 1])
        {'layer': [3, 3], 'head': [0, 1], 'score': [1.0, 2.0]}
    """
    sizes = tuple(len(places) for places in axes.values())
    assert tuple(values.shape) == sizes, f"values of shape {tuple(values.shape)} on axes of sizes {sizes}"
    places = list(itertools.product(*axes.values()))
    columns: dict[str, list[object]] = {axis: [place[i] for place in places] for i, axis in enumerate(axes)}
    return {**columns, name: values.detach().flatten().tolist()}
