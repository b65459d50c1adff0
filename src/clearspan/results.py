"""Results: what every finding can do. It prints its strongest rows, plots itself, and exports a data frame."""

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
    """Something found, as a table with a picture. Subclasses are frozen dataclasses with `eq=False, repr=False`.

    A subclass gives `columns` and `plot`, and says in `title` what it is.
    """

    ranked_by: ClassVar[str | None] = None
    """The column by whose size the printed rows are sorted, largest first; None for the table's own order."""
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

    def to_dataframe(self) -> "pandas.DataFrame":
        """Returns the whole table as a pandas data frame."""
        import pandas

        return pandas.DataFrame(dict(self.columns()))

    def __str__(self) -> str:
        columns = self.columns()
        rows = list(zip(*columns.values(), strict=True))
        if self.ranked_by is not None:
            at = list(columns).index(self.ranked_by)
            rows.sort(key=lambda row: -abs(float(row[at])))
        left = len(rows) - self.shown
        more = [f"… and {left} more rows: .to_dataframe()"] if left > 0 else []
        return "\n".join([self.title, *table(list(columns), rows[: self.shown]), *more])

    __repr__ = __str__


def table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    r"""Returns the lines of a table: numbers to the right, text to the left.

    Example:
        >>> print("\n".join(table(["head", "score"], [["L0H1", 0.98], ["L3H2", -0.5]])))
        head    score
        L0H1   0.9800
        L3H2  -0.5000
    """
    cells = [[_written(value) for value in row] for row in rows]
    numeric = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(names))]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [line(row) for row in [list(names), *cells]]


def _written(value: object) -> str:
    match value:
        case bool():
            return str(value)
        case float():
            return f"{value:z.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3e}"
        case _:
            return str(value)


def melted(values: Tensor, name: str, **axes: Sequence[object]) -> dict[str, list[object]]:
    """Returns a tensor as columns: one row a value, with where it is on each axis.

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
