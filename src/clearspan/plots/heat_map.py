"""Heat maps: a matrix on named axes, as a plotly figure and as a still picture."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

import torch
from jaxtyping import Float
from torch import Tensor

from . import marks
from .charts import Span, ends, heatmap
from .colors import color_at, ink_on
from .labels import as_plotly, visible
from .png import png

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_ROWS, MOST_COLUMNS = 64, 96
"""What a still picture shows; of more, several share a cell."""
MOST_WRITTEN = 480
"""Cells whose texts a still picture shows."""
SHADES = 240


@dataclass(frozen=True, eq=False)
class HeatMap:
    """A matrix, rows from the top.

    Attributes:
        values: The numbers; NaN for none.
        x: Names of the columns, unique.
        y: Names of the rows, unique.
        x_title: What the columns are.
        y_title: What the rows are.
        unit: What a value is, with its unit.
        title: Above the figure.
        span: Where colours end. By default they run from 0, or as far to both sides of it.
        texts: In the cells, row by row.

    Example:
        >>> HeatMap(torch.eye(2), ["0", "1"], ["0", "1"], "head", "layer").svg().count("<image")
        2
    """

    values: Float[Tensor, "row column"]
    x: Sequence[str]
    y: Sequence[str]
    x_title: str = ""
    y_title: str = ""
    unit: str = "value"
    title: str = ""
    span: Span | None = None
    texts: Sequence[Sequence[str]] | None = None

    def figure(self) -> "go.Figure":
        """Returns a plotly figure."""
        figure = heatmap(
            self.values,
            x=as_plotly(self.x),
            y=as_plotly(self.y),
            x_title=self.x_title,
            y_title=self.y_title,
            name=as_plotly([self.unit])[0],
            title=self.title,
            span=self.span,
        )
        if self.texts is None:
            return figure
        texts = [as_plotly([visible(text, 11) for text in row]) for row in self.texts]
        return figure.update_traces(text=texts, texttemplate="%{text}")

    def last(self, rows: int) -> Self:
        """Returns the map of the last rows, at most so many."""
        texts = None if self.texts is None else self.texts[-rows:]
        return replace(self, values=self.values[-rows:], y=self.y[-rows:], texts=texts)

    # --- a still picture ---------------------------------------------------------------------------------------------

    def svg(self) -> str:
        """Returns an SVG picture."""
        _, width = marks.headings(self._left, self.y_title, self.unit)
        return marks.drawing(max(self._right + 96, width), self._bottom + self._below, self._parts())

    @property
    def note(self) -> str:
        """What a cell of the still picture is, where it is not one value."""
        (rows, columns), (down, across) = self.values.shape, self._pools
        if down == across == 1:
            return ""
        where = [f"{count} {name or 'places'}" for count, name in ((down, self.y_title), (across, self.x_title))]
        return f"each cell: the largest of {' x '.join(where)}, among {rows} x {columns}"

    @property
    def _pools(self) -> tuple[int, int]:
        """How many rows and columns share a cell."""
        rows, columns = self.values.shape
        return -(-rows // MOST_ROWS), -(-columns // MOST_COLUMNS)

    @property
    def _is_written(self) -> bool:
        return self.texts is not None and 0 < self.values.numel() <= MOST_WRITTEN and self.values.shape[1] <= 16

    @cached_property
    def _shown(self) -> Float[Tensor, "row column"]:
        """The values of cells: of several, the one of the largest size."""
        down, across = self._pools
        values = self.values.detach().double().cpu()
        rows, columns = values.shape
        padded = values.new_full((-(-rows // down) * down, -(-columns // across) * across), torch.nan)
        padded[:rows, :columns] = values
        apart = padded.unflatten(1, (-1, across)).unflatten(0, (-1, down)).movedim(1, 2).flatten(2)
        return apart.gather(2, apart.abs().nan_to_num(-1).argmax(2, keepdim=True))[..., 0]

    @cached_property
    def _shares(self) -> Float[Tensor, "row column"]:
        """How far each cell is through the colours."""
        (low, high), _ = self._ends
        return ((self._shown - low) / (high - low)).clamp(0, 1)

    @cached_property
    def _ends(self) -> tuple[Span, Sequence[str]]:
        return ends(self.values, self.span)

    @property
    def _cell(self) -> tuple[float, float]:
        """The width and height of a cell."""
        rows, columns = self._shown.shape
        if self._is_written:
            return 84.0, 19.0
        return min(max(560 / max(columns, 1), 4.0), 30.0), min(max(380 / max(rows, 1), 4.0), 22.0)

    @cached_property
    def _names(self) -> tuple[list[str], list[str]]:
        """Labels of the columns and rows shown, cut to what fits."""
        down, across = self._pools
        return [marks.cut(name, 20) for name in self.x[::across]], [marks.cut(name, 26) for name in self.y[::down]]

    @property
    def _left(self) -> float:
        return 14 + marks.LETTER * max([*map(len, self._names[1]), 2])

    @property
    def _right(self) -> float:
        return self._left + self._cell[0] * self._shown.shape[1]

    @property
    def _bottom(self) -> float:
        return 24 + self._cell[1] * self._shown.shape[0]

    @property
    def _are_upright(self) -> bool:
        """Whether names of columns run upward, as those do that are long and are no numbers."""
        longest = max(map(len, self._names[0]), default=0)
        return longest > 4 and longest * marks.LETTER > self._cell[0]

    @property
    def _below(self) -> float:
        """The height that names of columns take, with the title."""
        longest = max(map(len, self._names[0]), default=0)
        return 28 + (longest * marks.LETTER if self._are_upright else 12)

    def _parts(self) -> Iterator[str]:
        """Yields what is drawn."""
        rows, columns = self._shown.shape
        width, height = self._cell
        (low, high), colors = self._ends
        palette = [color_at(number / (SHADES - 1), colors) for number in range(SHADES)]
        numbers = (self._shares * (SHADES - 1)).round().nan_to_num(SHADES)
        if rows and columns:
            yield marks.image(self._left, 24, width * columns, height * rows, png(numbers, palette))
        yield marks.headings(self._left, self.y_title, self.unit)[0]
        yield marks.label(self._left, self._bottom + self._below - 12, self.x_title, kind="muted")
        yield from self._names_drawn()
        if self._is_written:
            yield from self._texts_drawn()
        tall = min(self._bottom - 24, 110)
        scale = torch.arange(SHADES - 1, -1, -12)[:, None]
        yield marks.image(self._right + 12, 24, 10, tall, png(scale, palette))
        for number, y in ((high, 29), (low, 24 + max(tall - 5, 17))):
            yield marks.label(self._right + 28, y, f"{number:.3g}")

    def _names_drawn(self) -> Iterator[str]:
        (across, down), (width, height) = self._names, self._cell
        for place in marks.every(down, height, 12):
            yield marks.label(self._left - 6, 24 + (place + 0.5) * height, down[place], anchor="end")
        longest = max(map(len, across), default=0)
        for place in marks.every(across, width, 12 if self._are_upright else longest * marks.LETTER + 4):
            x, anchor = self._left + (place + 0.5) * width, "end" if self._are_upright else "middle"
            y = self._bottom + (6 if self._are_upright else 10)
            yield marks.label(x, y, across[place], anchor=anchor, is_upright=self._are_upright)

    def _texts_drawn(self) -> Iterator[str]:
        _, colors = self._ends
        assert self.texts is not None, "it is asked only where cells have texts"
        yield '<g text-anchor="middle">'
        for row, (texts, shares) in enumerate(zip(self.texts, self._shares.tolist(), strict=True)):
            for column, (text, share) in enumerate(zip(texts, shares, strict=True)):
                x, y = self._left + (column + 0.5) * 84, 24 + (row + 0.5) * 19
                yield marks.label(x, y, visible(text, 11), kind=self._ink(share, colors))
        yield "</g>"

    @staticmethod
    def _ink(share: float, colors: Sequence[str]) -> marks.Kind:
        if share != share:
            return "muted"
        return "black" if ink_on(color_at(share, colors)) == "#000000" else "white"
