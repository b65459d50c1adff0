"""The three charts: a heat map, bars, lines. Each is an ordinary plotly figure on a transparent ground."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    import plotly.graph_objects as go

MONOSPACE = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SEQUENTIAL = ("#f1f0ea", "#b9cfd9", "#5d96b5", "#215f86", "#0f3350")
DIVERGING = ("#1f6f78", "#8dbdb9", "#f1f0ea", "#e3a184", "#b0432a")
INK = "#215f86"
SERIES = ("#215f86", "#b0432a", "#1f6f78", "#8a6d1d", "#6b4c86", "#4d5a5f")
"""Colours of lines, in their order."""

_AXIS: Mapping[str, object] = {
    "showgrid": False,
    "zeroline": False,
    "automargin": True,
    "ticks": "outside",
    "ticklen": 5,
    "tickcolor": "rgba(0,0,0,0)",
}


def heatmap(
    values: Tensor,
    *,
    x: Sequence[str],
    y: Sequence[str],
    x_title: str = "",
    y_title: str = "",
    name: str = "value",
    title: str = "",
    sequential: bool = False,
    bound: float | None = None,
) -> "go.Figure":
    """Returns a heat map, rows from the top.

    Args:
        values: `[row, column]`.
        x: Names of the columns, each another.
        y: Names of the rows, each another.
        x_title: What the columns are.
        y_title: What the rows are.
        name: What a value is, with its unit, for the hover text.
        title: Above the chart.
        sequential: Whether colours run from 0 up, and not from both sides of 0.
        bound: The value at which the colours end; by default the largest.
    """
    bound = bound or max(values.abs().nan_to_num().max().item(), 1e-12)
    figure = heat(
        rounded(values),
        SEQUENTIAL if sequential else DIVERGING,
        x=list(x),
        y=list(y),
        zmin=0 if sequential else -bound,
        zmax=bound,
        hovertemplate=f"{y_title} %{{y}}, {x_title} %{{x}}<br>{name} %{{z:.4g}}<extra></extra>",
    )
    figure.update_layout(height=max(180, 26 * len(values) + 110), xaxis_title=x_title, yaxis_title=y_title)
    return titled(figure, title)


def bars(
    values: Sequence[float], *, names: Sequence[str], value_title: str = "", title: str = "", colors: str = INK
) -> "go.Figure":
    """Returns one bar for each name, from left to right.

    Args:
        values: Their lengths.
        names: Each another.
        value_title: What a value is, with its unit.
        title: Above the chart.
        colors: Of the bars.
    """
    import plotly.graph_objects as go

    hover = f"%{{x}}<br>{value_title} %{{y:.4g}}<extra></extra>"
    figure = plain(go.Figure(go.Bar(x=list(names), y=list(values), marker_color=colors, hovertemplate=hover)))
    figure.update_layout(height=320, yaxis_title=value_title, xaxis_type="category", bargap=0.25)
    return titled(figure, title)


def lines(
    series: Mapping[str, Sequence[float]],
    *,
    x: Sequence[float] | Sequence[str],
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
    """Returns the figure with a title at its left, where there is one."""
    if title:
        figure.update_layout(title={"text": title, "x": 0, "xanchor": "left", "font": {"size": 14}}, margin_t=44)
    return figure
