"""Boxes joined by curves, from the bottom to the top: as a plotly figure, and as a picture that stands alone."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from .charts import MONOSPACE, plain, titled
from .colors import DARK, LIGHT

if TYPE_CHECKING:
    import plotly.graph_objects as go

INK, FRAME, GROUND, FAINT = "#1b1b1b", "#8f8c82", "#f6f5ef", "#c9c6bb"
HEIGHT = 24
MARGIN = 14
LEGEND = 26

_IN_THE_DARK = {
    LIGHT.ground: DARK.ground,
    INK: DARK.ink,
    FRAME: DARK.muted,
    GROUND: "#262521",
    FAINT: DARK.rule,
    **dict(zip(LIGHT.series, DARK.series, strict=True)),
}
_RULES = (
    f'[{paint}="{color}"]{{{paint}:{dark}}}' for color, dark in _IN_THE_DARK.items() for paint in ("fill", "stroke")
)
_DARK = f"<style>@media (prefers-color-scheme: dark) {{ {' '.join(_RULES)} }}</style>"

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A box with a text.

    Attributes:
        text: In it.
        x: Of its centre, in pixels.
        y: Of its centre, in pixels from the bottom.
        width: In pixels.
    """

    text: str
    x: float
    y: float
    width: float = 52


@dataclass(frozen=True)
class Link:
    """A curve from the top of a box to the bottom of another.

    Attributes:
        source: Name of the first box.
        target: Name of the other.
        weight: The curve's width, from 0 to 1; None for a thin dotted one.
        color: Of the curve.
        text: Under the pointer.
        is_dashed: Whether it is dashed.
    """

    source: str
    target: str
    weight: float | None
    color: str = FAINT
    text: str = ""
    is_dashed: bool = False

    @property
    def is_dotted(self) -> bool:
        """Whether it has no weight."""
        return self.weight is None

    @property
    def width(self) -> float:
        """The curve's width in pixels."""
        return 1.2 + 7 * (self.weight or 0.0)

    @property
    def dash(self) -> str:
        """How its line is broken: `solid`, `dash` or `dot`."""
        return "dot" if self.is_dotted else "dash" if self.is_dashed else "solid"


@dataclass(frozen=True, eq=False)
class Network:
    """A drawing of boxes and links. The same places make the figure and the picture.

    Attributes:
        boxes: By name.
        links: Between them, the first one lowest.
        legend: Colours by what they mean.
        title: Above the figure.

    Example:
        >>> boxes = {"a": Box("embed", 40, 20), "b": Box("logits", 90, 120)}
        >>> Network(boxes, [Link("a", "b", 1.0)], {}).svg().count("<rect")
        3
    """

    boxes: Mapping[str, Box]
    links: Sequence[Link]
    legend: Mapping[str, str]
    title: str = ""

    @property
    def note(self) -> str:
        """What the still picture leaves out."""
        return ""

    @cached_property
    def size(self) -> Point:
        """Its width and height in pixels; the legend is below 0."""
        right = max((box.x + box.width / 2 for box in self.boxes.values()), default=0)
        top = max((box.y + HEIGHT / 2 for box in self.boxes.values()), default=0)
        return max(right, 110 * len(self.legend)) + 2 * MARGIN, top + MARGIN

    @cached_property
    def curves(self) -> list[tuple[Link, tuple[Point, Point, Point, Point]]]:
        """Each link with its cubic curve: start, two control points, end."""
        ends = [(link.source, link.target) for link in self.links]
        leaving, arriving = self._ends(ends, 0.5), self._ends([(target, source) for source, target in ends], 0.8)
        return [(link, self._curve(link, *at)) for link, *at in zip(self.links, leaving, arriving, strict=True)]

    def _ends(self, ends: Sequence[tuple[str, str]], share: float) -> list[float]:
        """Returns the x at which each link meets its own box: side by side, in the order of the boxes at the other end.

        Dotted links meet it in the middle.
        """
        places = {own: self.boxes[own].x for own, _ in ends}
        found = [places[own] for own, _ in ends]
        for name in places:
            own = [number for number, (one, _) in enumerate(ends) if one == name and not self.links[number].is_dotted]
            own.sort(key=lambda number: (self.boxes[ends[number][1]].x, -self.boxes[ends[number][1]].y))
            for rank, number in enumerate(own):
                found[number] += self.boxes[name].width * share * ((rank + 0.5) / len(own) - 0.5)
        return found

    def _curve(self, link: Link, start: float, end: float) -> tuple[Point, Point, Point, Point]:
        low, high = self.boxes[link.source].y + HEIGHT / 2, self.boxes[link.target].y - HEIGHT / 2
        reach = (high - low) * 0.5
        between = [
            box
            for box in self.boxes.values()
            if low < box.y < high and min(start, end) - 30 < box.x < max(start, end) + 30
        ]
        aside = 60 + 0.12 * (high - low) if between and abs(start - end) < 60 else 0
        return (start, low), (start + aside, low + reach), (end + aside, high - reach), (end, high)

    # --- drawn -------------------------------------------------------------------------------------------------------

    def figure(self) -> "go.Figure":
        """Returns a plotly figure; links tell their weight under the pointer."""
        import plotly.graph_objects as go

        width, height = self.size
        figure = plain(go.Figure())
        for link, curve in self.curves:
            figure.add_shape(
                type="path",
                path=_path(curve),
                layer="below",
                line={"color": link.color, "width": link.width, "dash": link.dash},
            )
        for box in self.boxes.values():
            sides = {"x0": box.x - box.width / 2, "x1": box.x + box.width / 2}
            sides |= {"y0": box.y - HEIGHT / 2, "y1": box.y + HEIGHT / 2}
            figure.add_shape(type="rect", fillcolor=GROUND, line={"color": FRAME, "width": 1}, layer="below", **sides)
        boxes = self.boxes.values()
        labels = {"text": [box.text for box in boxes], "textfont": {"family": MONOSPACE, "size": 12, "color": INK}}
        figure.add_scatter(
            x=[box.x for box in boxes],
            y=[box.y for box in boxes],
            mode="text",
            hoverinfo="skip",
            showlegend=False,
            **labels,
        )
        middles = [(_middle(curve), link.text) for link, curve in self.curves if link.text]
        figure.add_scatter(
            x=[point[0] for point, _ in middles],
            y=[point[1] for point, _ in middles],
            text=[text for _, text in middles],
            mode="markers",
            marker={"size": 12, "opacity": 0},
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
        )
        for name, color in self.legend.items():
            figure.add_scatter(x=[None], y=[None], mode="lines", name=name, line={"color": color, "width": 4})
        hidden = {"visible": False, "fixedrange": True}
        figure.update_layout(
            width=max(width, 480),
            height=height + LEGEND + 60,
            xaxis=hidden | {"range": [0, width]},
            yaxis=hidden | {"range": [0, height]},
            legend={"orientation": "h", "y": 0, "yanchor": "top", "x": 0},
        )
        return titled(figure, self.title)

    def svg(self) -> str:
        """Returns an SVG picture, light or dark as the page around it; links tell their weight under the pointer."""
        width, height = self.size
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:z.0f}" height="{height + LEGEND:z.0f}" '
                f'viewBox="0 {-height:z.0f} {width:z.0f} {height + LEGEND:z.0f}" '
                f'font-family="{html.escape(MONOSPACE)}" font-size="12">',
                _DARK,
                f'<rect y="{-height:z.0f}" width="100%" height="100%" fill="{LIGHT.ground}"/>',
                *self._drawn_links(),
                *self._drawn_boxes(),
                *self._drawn_legend(),
                "</svg>",
                "",
            ]
        )

    def _drawn_links(self) -> Iterator[str]:
        for link, curve in self.curves:
            dashes = {"solid": "", "dash": ' stroke-dasharray="8 5"', "dot": ' stroke-dasharray="2 4"'}[link.dash]
            path = _path([(x, -y) for x, y in curve])
            yield (
                f'<path d="{path}" fill="none" stroke="{link.color}" stroke-width="{link.width:z.1f}"{dashes}>'
                f"<title>{html.escape(link.text)}</title></path>"
            )

    def _drawn_boxes(self) -> Iterator[str]:
        for box in self.boxes.values():
            yield (
                f'<rect x="{box.x - box.width / 2:z.1f}" y="{-box.y - HEIGHT / 2:z.1f}" width="{box.width:z.1f}" '
                f'height="{HEIGHT}" rx="4" fill="{GROUND}" stroke="{FRAME}"/>'
                f'<text x="{box.x:z.1f}" y="{-box.y + 4:z.1f}" text-anchor="middle" fill="{INK}">'
                f"{html.escape(box.text)}</text>"
            )

    def _drawn_legend(self) -> Iterator[str]:
        for number, (name, color) in enumerate(self.legend.items()):
            x, y = MARGIN + 110 * number, LEGEND / 2
            yield (
                f'<path d="M {x} {y} h 18" stroke="{color}" stroke-width="4"/>'
                f'<text x="{x + 24}" y="{y + 4}" fill="{INK}">{html.escape(name)}</text>'
            )


def _path(curve: Sequence[Point]) -> str:
    start, *others = (f"{x:z.1f} {y:z.1f}" for x, y in curve)
    return f"M {start} C {', '.join(others)}"


def _middle(curve: tuple[Point, Point, Point, Point]) -> Point:
    xs, ys = zip(*curve, strict=True)
    return (xs[0] + 3 * xs[1] + 3 * xs[2] + xs[3]) / 8, (ys[0] + 3 * ys[1] + 3 * ys[2] + ys[3]) / 8
