"""Results: what every finding can do. It prints its strongest rows, draws itself, and exports a data frame."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

Columns = Mapping[str, Sequence[object]]
"""A table by its columns, all of one length."""


class Result(ABC):
    """A finding: a table with a title and a picture. Subclasses are frozen dataclasses with `eq=False, repr=False`."""

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
    def plot(self) -> "go.Figure":
        """Returns a plotly figure."""

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

    def __str__(self) -> str:
        columns = self.printed()
        rows = list(zip(*columns.values(), strict=True))
        if self.rank is not None:
            at = list(columns).index(self.rank)
            rows.sort(key=lambda row: -self._order(float(row[at])))
        left = len(rows) - self.shown
        more = [f"… and {left} more rows: .to_dataframe()"] if left > 0 else []
        return "\n".join([self.title, *table(list(columns), rows[: self.shown]), *more])

    __repr__ = __str__


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


def table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    r"""Returns the lines of a table: numbers to the right, text to the left.

    Example:
        >>> print("\n".join(table(["head", "score"], [["L0H1", 0.98], ["L3H2", -0.5]])))
        head    score
        L0H1   0.9800
        L3H2  -0.5000
    """
    cells = [[number(value) if isinstance(value, float) else str(value) for value in row] for row in rows]
    numeric = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(names))]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [line(row) for row in [list(names), *cells]]


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
