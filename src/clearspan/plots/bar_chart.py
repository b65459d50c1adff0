"""Bars: one number for each name, as a plotly figure and as a still picture."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import marks
from .charts import Span, bars, marked
from .labels import as_plotly

if TYPE_CHECKING:
    import plotly.graph_objects as go

WIDTH, ROW, TOP = 320, 17, 24
"""Of the still picture: the longest bar, the height of one with its gap, and what is above the first."""
MOST_BARS = 60


@dataclass(frozen=True, eq=False)
class BarChart:
    """A bar for each name.

    Attributes:
        values: The numbers; NaN for none.
        names: Of the bars, unique.
        axis: What the names are of.
        unit: What a value is, with its unit.
        title: Above the figure.
        errors: Standard errors, or None.
        base: A value that all are compared with, or None.
        span: The least and the greatest possible value, or None.

    Example:
        >>> BarChart([0.5, -1.0], ["a", "b"], "head", "score").svg().count('class="fill0"')
        2
    """

    values: Sequence[float]
    names: Sequence[str]
    axis: str = ""
    unit: str = "value"
    title: str = ""
    errors: Sequence[float] | None = None
    base: float | None = None
    span: Span | None = None

    def figure(self) -> "go.Figure":
        """Returns a plotly figure."""
        (unit,) = as_plotly([self.unit])
        figure = bars(list(self.values), as_plotly(self.names), self.axis, unit, self.title)
        return marked(figure, None if self.errors is None else [self.errors], self.base, self.span)

    # --- a still picture ---------------------------------------------------------------------------------------------

    @property
    def note(self) -> str:
        """What the still picture leaves out."""
        left = len(self.values) - MOST_BARS
        return f"{left} more bars are not drawn" if left > 0 else ""

    def svg(self) -> str:
        """Returns an SVG picture: bars from left to right, one below the other."""
        names = [marks.cut(name, 32) for name in self.names[:MOST_BARS]]
        left = 14 + marks.LETTER * max(map(len, names), default=0)
        width = max(left + WIDTH + 90, marks.headings(left, self.axis, self.unit)[1])
        return marks.drawing(width, TOP + ROW * len(names) + 8, self._parts(names, left))

    def _parts(self, names: Sequence[str], left: float) -> Iterator[str]:
        """Yields what is drawn."""
        known = [one for one in (*self.values, 0.0, self.base or 0.0) if math.isfinite(one)]
        low, high = self.span or (min(known), max(known))
        low, high = min(low, 0.0), max(high, 0.0) or float(low == 0)

        def at(value: float) -> float:
            return left + WIDTH * (min(max(value, low), high) - low) / (high - low)

        yield marks.headings(left, self.axis, self.unit)[0]
        bottom = TOP + ROW * len(names)
        for number, (name, value) in enumerate(zip(names, self.values, strict=False)):
            y = TOP + (number + 0.5) * ROW
            yield marks.label(left - 6, y, name, anchor="end")
            if not math.isfinite(value):
                continue
            start, end = sorted((at(0.0), at(value)))
            yield f'<rect class="fill0" x="{start:z.1f}" y="{y - 6:z.1f}" width="{end - start:z.1f}" height="12"/>'
            error = math.nan if self.errors is None else self.errors[number]
            if math.isfinite(error):
                yield marks.rule(at(value - error), y, at(value + error), y, kind="line1")
            yield marks.label(left + WIDTH + 8, y, f"{value:.4g}")
        yield marks.rule(at(0.0), TOP, at(0.0), bottom)
        if self.base is not None:
            yield marks.rule(at(self.base), TOP, at(self.base), bottom, kind="line5", dashes="2 3")
