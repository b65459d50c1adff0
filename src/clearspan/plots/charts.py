"""Charts: bars, lines and heat maps of numbers on named axes, as ordinary plotly figures on a transparent ground."""

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from .colors import DIVERGING, SEQUENTIAL, SERIES

if TYPE_CHECKING:
    import plotly.graph_objects as go

MONOSPACE = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
INK = SERIES[0]

Span = tuple[float, float]

_AXIS: Mapping[str, object] = {
    "showgrid": False,
    "zeroline": False,
    "automargin": True,
    "ticks": "outside",
    "ticklen": 5,
    "tickcolor": "rgba(0,0,0,0)",
}


def bars(values: list[float], names: list[str], axis: str, unit: str, title: str) -> "go.Figure":
    """Returns a bar for each name.

    Args:
        values: The numbers.
        names: Of the bars, unique.
        axis: What the names are of.
        unit: What a value is, with its unit.
        title: Above the chart.
    """
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


def marked(
    figure: "go.Figure", errors: Sequence[Sequence[float]] | None, base: float | None, span: Span | None
) -> "go.Figure":
    """Returns bars or lines with standard errors, a dotted line at a base, and an axis that ends with the span."""
    for number, own in enumerate(errors or ()):
        figure.update_traces(error_y={"type": "data", "array": list(own), "thickness": 1, "width": 3}, selector=number)
    if base is not None:
        figure.add_hline(base, line={"color": INK, "dash": "dot", "width": 1}, annotation_text="base")
    return figure if span is None else figure.update_layout(yaxis_range=[span[0], span[1] + 0.03 * (span[1] - span[0])])


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
