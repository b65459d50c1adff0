"""Lines: series of numbers over one axis, as a plotly figure and as a still picture."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from . import marks
from .charts import Span, lines, marked
from .colors import SERIES
from .labels import as_plotly

if TYPE_CHECKING:
    import plotly.graph_objects as go

WIDTH, HEIGHT, TOP = 480, 210, 24
"""Of the ground that the still picture's lines are on, and what is above it."""
MOST_SERIES, MOST_POINTS = 12, 240


@dataclass(frozen=True, eq=False)
class LineChart:
    """A line with points for each series.

    Attributes:
        series: Values by name, each as long as `x`; NaN leaves a gap.
        x: Where the values are: numbers, or names.
        x_title: What `x` is.
        unit: What a value is, with its unit.
        title: Above the figure.
        errors: Standard errors of each series, or None.
        base: A value that all are compared with, or None.
        span: The least and the greatest possible value, or None.
        is_joined: Whether points are joined.
        is_log: Whether `x` is laid out by its logarithm.

    Example:
        >>> LineChart({"loss": [2.0, 1.5]}, [0, 1], "step", "nats").svg().count('class="line0"')
        1
    """

    series: Mapping[str, Sequence[float]]
    x: Sequence[object]
    x_title: str = ""
    unit: str = ""
    title: str = ""
    errors: Sequence[Sequence[float]] | None = None
    base: float | None = None
    span: Span | None = None
    is_joined: bool = True
    is_log: bool = False

    def figure(self) -> "go.Figure":
        """Returns a plotly figure."""
        are_numbers = all(isinstance(place, int | float) for place in self.x)
        figure = lines(
            dict(zip(as_plotly(list(self.series)), self.series.values(), strict=True)),
            x=self.x if are_numbers else as_plotly(list(map(str, self.x))),
            x_title=self.x_title,
            value_title=as_plotly([self.unit])[0],
            title=self.title,
        )
        if not self.is_joined:
            figure.update_traces(mode="markers")
        if self.is_log:
            figure.update_xaxes(type="log")
        return marked(figure, self.errors, self.base, self.span)

    # --- a still picture ---------------------------------------------------------------------------------------------

    @property
    def note(self) -> str:
        """What the still picture leaves out."""
        left = len(self.series) - MOST_SERIES
        return f"{left} more lines are not drawn" if left > 0 else ""

    def svg(self) -> str:
        """Returns an SVG picture."""
        named = len(self.series) > 1
        height = TOP + HEIGHT + 48 + named * 16 * len(self._drawn)
        return marks.drawing(self._left + WIDTH + 24, height, self._parts())

    @cached_property
    def _drawn(self) -> dict[str, Sequence[float]]:
        return dict(list(self.series.items())[:MOST_SERIES])

    @cached_property
    def _places(self) -> list[float]:
        """Where each value is along the axis, from 0 to 1."""
        numbers = [float(place) for place in self.x if isinstance(place, int | float)]
        if len(numbers) < len(self.x) or len(set(numbers)) < 2:
            return [(place + 0.5) / len(self.x) for place in range(len(self.x))]
        if self.is_log and min(numbers) > 0:
            numbers = [math.log(number) for number in numbers]
        low, high = min(numbers), max(numbers)
        return [0.02 + 0.96 * (number - low) / (high - low) for number in numbers]

    @cached_property
    def _range(self) -> Span:
        if self.span is not None:
            return self.span
        known = [one for values in self._drawn.values() for one in values if math.isfinite(one)]
        known += [] if self.base is None else [self.base]
        low, high = min(known, default=0.0), max(known, default=1.0)
        room = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
        return low - room, high + room

    @cached_property
    def _ticks(self) -> list[float]:
        return marks.ticks(*self._range)

    @property
    def _left(self) -> float:
        return 14 + marks.LETTER * max(len(f"{tick:.4g}") for tick in self._ticks)

    def _at(self, place: float, value: float) -> tuple[float, float]:
        low, high = self._range
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return self._left + place * WIDTH, TOP + (1 - share) * HEIGHT

    def _parts(self) -> Iterator[str]:
        """Yields what is drawn."""
        yield marks.label(6, 11, self.unit, kind="muted")
        for tick in self._ticks:
            (x, y), end = self._at(0, tick), self._at(1, tick)
            yield marks.rule(x, y, *end)
            yield marks.label(self._left - 6, y, f"{tick:.4g}", anchor="end")
        if self.base is not None:
            yield marks.rule(*self._at(0, self.base), *self._at(1, self.base), kind="line5", dashes="2 3")
            yield marks.label(self._left + WIDTH, self._at(1, self.base)[1] - 8, "base", anchor="end", kind="muted")
        yield from self._names_drawn()
        for number, values in enumerate(self._drawn.values()):
            yield from self._series_drawn(number, values)
        if len(self.series) > 1:
            for number, name in enumerate(self._drawn):
                y = TOP + HEIGHT + 48 + 16 * number
                yield marks.rule(self._left, y, self._left + 18, y, kind=_kind(number))
                yield marks.label(self._left + 24, y, marks.cut(name, 64))

    def _names_drawn(self) -> Iterator[str]:
        names = [marks.cut(f"{place:.4g}" if isinstance(place, float) else str(place), 16) for place in self.x]
        room, end = (max(map(len, names), default=0) + 1) * marks.LETTER, -math.inf
        for name, place in zip(names, self._places, strict=True):
            x, _ = self._at(place, 0)
            if x - end >= room:
                yield marks.label(x, TOP + HEIGHT + 11, name, anchor="middle")
                end = x
        yield marks.label(self._left, TOP + HEIGHT + 29, self.x_title, kind="muted")

    def _series_drawn(self, number: int, values: Sequence[float]) -> Iterator[str]:
        step = -(-len(values) // MOST_POINTS)
        points = list(zip(self._places, values, strict=True))[::step]
        if self.is_joined:
            yield f'<path class="{_kind(number)}" fill="none" stroke-width="2" d="{self._path(points)}"/>'
        if len(points) * len(self._drawn) <= MOST_POINTS or not self.is_joined:
            for point in points:
                if math.isfinite(point[1]):
                    x, y = self._at(*point)
                    yield f'<circle class="fill{number % len(SERIES)}" cx="{x:z.1f}" cy="{y:z.1f}" r="2.5"/>'
        errors = [math.nan] * len(points) if self.errors is None else self.errors[number][::step]
        for (place, value), error in zip(points, errors, strict=True):
            if math.isfinite(value) and math.isfinite(error):
                ends = self._at(place, value - error), self._at(place, value + error)
                yield marks.rule(*ends[0], *ends[1], kind=_kind(number))

    def _path(self, points: Sequence[tuple[float, float]]) -> str:
        """Returns the way through points, begun anew after each that has no value."""
        parts, pen = [], "M"
        for place, value in points:
            if not math.isfinite(value):
                pen = "M"
                continue
            x, y = self._at(place, value)
            parts.append(f"{pen}{x:z.1f} {y:z.1f}")
            pen = "L"
        return "".join(parts)


def _kind(number: int) -> str:
    return f"line{number % len(SERIES)}"
