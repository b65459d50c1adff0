"""Charts: bars, lines and heat maps of numbers on named axes, as ordinary plotly figures on a transparent ground."""

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .labels import as_plotly

if TYPE_CHECKING:
    import plotly.graph_objects as go

MONOSPACE = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SEQUENTIAL = ("#f1f0ea", "#b9cfd9", "#5d96b5", "#215f86", "#0f3350")
DIVERGING = ("#1f6f78", "#8dbdb9", "#f1f0ea", "#e3a184", "#b0432a")
INK = "#215f86"
SERIES = ("#215f86", "#b0432a", "#1f6f78", "#8a6d1d", "#6b4c86", "#4d5a5f")
"""Colours of lines, in their order."""
MOST_BARS = 40
MOST_LINES = len(SERIES)

Span = tuple[float, float]
Kind = Literal["bars", "lines", "heat map"]

_AXIS: Mapping[str, object] = {
    "showgrid": False,
    "zeroline": False,
    "automargin": True,
    "ticks": "outside",
    "ticklen": 5,
    "tickcolor": "rgba(0,0,0,0)",
}


def picture(
    values: Float[Tensor, "*place"],
    axes: Mapping[str, Sequence[object]],
    labels: Mapping[str, Sequence[str]] | None = None,
    *,
    unit: str = "value",
    title: str = "",
    errors: Float[Tensor, "*place"] | None = None,
    base: float | None = None,
    span: Span | None = None,
    kind: Kind | None = None,
) -> "go.Figure":
    """Returns a picture of values on one axis or two.

    One axis is drawn as bars; as a line where its places are fractions or more than 40. Two axes are a heat map, the
    first from the top; lines where the first axis is a few names and the second one numbers.

    Args:
        values: Of one axis or two.
        axes: The places on each, by name, in the values' order.
        labels: A text for each place, by axis; by default the place. Texts of one axis differ.
        unit: What a value is, with its unit.
        title: Above the picture.
        errors: Standard errors, drawn on bars and lines.
        base: A value that bars and lines are compared with: a dotted line.
        span: The least and the greatest possible value. By default from 0, or as far to both sides of it.
        kind: What is drawn, where that is not to be chosen.

    Example:
        >>> import torch
        >>> picture(torch.eye(2), {"layer": [0, 1], "head": [0, 1]}, unit="score").data[0].type
        'heatmap'
        >>> [line.name for line in picture(torch.eye(2), {"lens": ["logit", "tuned"], "depth": [0, 1]}).data]
        ['logit', 'tuned']
    """
    texts = {axis: as_plotly((labels or {}).get(axis) or list(map(str, places))) for axis, places in axes.items()}
    (unit,), (*series, last) = as_plotly([unit]), axes
    match kind or _kind(axes):
        case "heat map":
            (first,) = series
            return heatmap(
                values, x=texts[last], y=texts[first], x_title=last, y_title=first, name=unit, title=title, span=span
            )
        case "bars":
            figure = _bars(values.tolist(), texts[last], last, unit, title)
        case "lines":
            named = zip(texts[series[0]], values.tolist(), strict=True) if series else [(unit, values.tolist())]
            x = list(axes[last]) if _are_numbers(axes[last]) else texts[last]
            figure = lines(dict(named), x=x, x_title=last, value_title=unit, title=title)
    if errors is not None:
        for number, own in enumerate(torch.atleast_2d(errors).tolist()):
            figure.update_traces(error_y={"type": "data", "array": own, "thickness": 1, "width": 3}, selector=number)
    if base is not None:
        figure.add_hline(base, line={"color": INK, "dash": "dot", "width": 1}, annotation_text="base")
    return figure if span is None else figure.update_layout(yaxis_range=[span[0], span[1] + 0.03 * (span[1] - span[0])])


def _kind(axes: Mapping[str, Sequence[object]]) -> Kind:
    *first, last = axes.values()
    if first:
        is_few_names = len(first[0]) <= MOST_LINES and all(isinstance(place, str) for place in first[0])
        return "lines" if is_few_names and _are_numbers(last) else "heat map"
    is_fraction = any(isinstance(place, float) for place in last)
    return "lines" if is_fraction or len(last) > MOST_BARS else "bars"


def _are_numbers(places: Sequence[object]) -> bool:
    return all(isinstance(place, int | float) for place in places)


def _bars(values: list[float], names: list[str], axis: str, unit: str, title: str) -> "go.Figure":
    import plotly.graph_objects as go

    hover = f"%{{x}}<br>{unit} %{{y:.4g}}<extra></extra>"
    figure = plain(go.Figure(go.Bar(x=names, y=values, marker_color=INK, hovertemplate=hover)))
    figure.update_layout(height=320, xaxis_title=axis, yaxis_title=unit, xaxis_type="category", bargap=0.25)
    return titled(figure, title)


def ends(values: Tensor, span: Span | None = None) -> tuple[Span, Sequence[str]]:
    """Returns the values at which colours end, and the colours: from 0 up, or to both sides of 0.

    Example:
        >>> import torch
        >>> ends(torch.tensor([0.5, -2.0]))[0], ends(torch.tensor([0.5, 2.0]))[0]
        ((-2.0, 2.0), (0.0, 2.0))
    """
    known = values[~values.isnan()]
    bound = max(known.abs().max().item(), 1e-12) if known.numel() else 1.0
    found = span or (0.0 if bool((known >= 0).all()) else -bound, bound)
    return found, SEQUENTIAL if found[0] >= 0 else DIVERGING


def heatmap(
    values: Float[Tensor, "row column"],
    *,
    x: Sequence[str],
    y: Sequence[str],
    x_title: str = "",
    y_title: str = "",
    name: str = "value",
    title: str = "",
    span: Span | None = None,
) -> "go.Figure":
    """Returns a heat map, rows from the top. Names of columns, and of rows, are unique.

    Args:
        values: The numbers.
        x: Names of the columns.
        y: Names of the rows.
        x_title: What the columns are.
        y_title: What the rows are.
        name: What a value is, with its unit, for the hover text.
        title: Above the chart.
        span: Where the colours end. By default they run from 0, or as far to both sides of it.
    """
    (low, high), colors = ends(values, span)
    figure = heat(
        rounded(values),
        colors,
        x=list(x),
        y=list(y),
        zmin=low,
        zmax=high,
        hovertemplate=f"{y_title} %{{y}}, {x_title} %{{x}}<br>{name} %{{z:.4g}}<extra></extra>",
    )
    figure.update_layout(height=max(180, 26 * len(values) + 110), xaxis_title=x_title, yaxis_title=y_title)
    return titled(figure, title)


def lines(
    series: Mapping[str, Sequence[float]],
    *,
    x: Sequence[object],
    x_title: str = "",
    value_title: str = "",
    title: str = "",
) -> "go.Figure":
    """Returns a line with points for each series.

    Args:
        series: Values by name, each as long as `x`.
        x: Where the values are.
        x_title: What `x` is.
        value_title: What a value is, with its unit.
        title: Above the chart.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, (name, values) in enumerate(series.items()):
        figure.add_scatter(
            x=list(x),
            y=list(values),
            name=name,
            mode="lines+markers",
            line={"color": SERIES[number % len(SERIES)], "width": 2},
            hovertemplate=f"{name}, {x_title} %{{x}}<br>{value_title} %{{y:.4g}}<extra></extra>",
        )
    plain(figure).update_layout(height=340, xaxis_title=x_title, yaxis_title=value_title, showlegend=len(series) > 1)
    return titled(figure, title)


def heat(z: list, colors: Sequence[str], **trace: object) -> "go.Figure":
    """Returns a heat map of a plotly trace's own settings; `heatmap` is for plain values."""
    import plotly.graph_objects as go

    scale = [[i / (len(colors) - 1), color] for i, color in enumerate(colors)]
    bar = {"thickness": 8, "outlinewidth": 0, "tickfont": {"size": 11}, "nticks": 5}
    bar |= {"x": 1.01, "xpad": 0, "y": 1, "yanchor": "top", "ypad": 0, "len": 130, "lenmode": "pixels"}
    figure = plain(go.Figure(go.Heatmap(z=z, colorscale=scale, colorbar=bar, xgap=1, ygap=1, **trace)))
    axis = {"fixedrange": True, "type": "category"}
    return figure.update_layout(dragmode=False, xaxis=axis, yaxis=axis | {"autorange": "reversed"})


def rounded(values: Tensor, decimals: int = 4) -> list:
    """Returns a tensor as nested lists, rounded."""
    return values.detach().double().cpu().round(decimals=decimals).tolist()


def plain(figure: "go.Figure") -> "go.Figure":
    """Returns the figure without a ground and grid lines."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        font={"size": 12},
        hoverlabel={"font": {"family": MONOSPACE, "size": 12}, "align": "left"},
        xaxis=_AXIS,
        yaxis=_AXIS,
    )
    return figure


def titled(figure: "go.Figure", title: str) -> "go.Figure":
    """Returns the figure with a title at its left, shown as it is, where there is one."""
    if title:
        shown = {"text": html.escape(title, quote=False), "x": 0, "xanchor": "left", "font": {"size": 14}}
        figure.update_layout(title=shown, margin_t=44)
    return figure
