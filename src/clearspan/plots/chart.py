"""Which chart suits values on named axes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .bar_chart import BarChart
from .charts import Span
from .colors import SERIES
from .heat_map import HeatMap
from .line_chart import LineChart
from .network import Network

if TYPE_CHECKING:
    import plotly.graph_objects as go

Chart = BarChart | LineChart | HeatMap | Network
"""What a result draws: `figure()` is its plotly figure, `svg()` a still picture."""
Kind = Literal["bars", "lines", "heat map"]

MOST_BARS = 40
MOST_LINES = len(SERIES)


def chart_of(
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
) -> Chart:
    """Returns a chart of values on one axis or two.

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
        >>> chart_of(torch.eye(2), {"layer": [0, 1], "head": [0, 1]}, unit="score").figure().data[0].type
        'heatmap'
        >>> list(chart_of(torch.eye(2), {"lens": ["logit", "tuned"], "depth": [0, 1]}).series)
        ['logit', 'tuned']
    """
    texts = {axis: list((labels or {}).get(axis) or map(str, places)) for axis, places in axes.items()}
    (*series, last), numbers = axes, values.detach().cpu()
    spread = None if errors is None else torch.atleast_2d(errors).tolist()
    match kind or _kind(axes):
        case "heat map":
            (first,) = series
            return HeatMap(numbers, texts[last], texts[first], last, first, unit, title, span)
        case "bars":
            own = None if spread is None else spread[0]
            return BarChart(numbers.tolist(), texts[last], last, unit, title, own, base, span)
        case "lines":
            named = zip(texts[series[0]], numbers.tolist(), strict=True) if series else [(unit, numbers.tolist())]
            x = list(axes[last]) if _are_numbers(axes[last]) else texts[last]
            return LineChart(dict(named), x, last, unit, title, spread, base, span)


def picture(
    values: Float[Tensor, "*place"],
    axes: Mapping[str, Sequence[object]],
    labels: Mapping[str, Sequence[str]] | None = None,
    **settings: Any,
) -> "go.Figure":
    """Returns the plotly figure of the chart that suits values on named axes. Arguments are those of `chart_of`.

    Example:
        >>> import torch
        >>> picture(torch.eye(2), {"layer": [0, 1], "head": [0, 1]}, unit="score").data[0].type
        'heatmap'
    """
    return chart_of(values, axes, labels, **settings).figure()


def _kind(axes: Mapping[str, Sequence[object]]) -> Kind:
    *first, last = axes.values()
    if first:
        is_few_names = len(first[0]) <= MOST_LINES and all(isinstance(place, str) for place in first[0])
        return "lines" if is_few_names and _are_numbers(last) else "heat map"
    is_fraction = any(isinstance(place, float) for place in last)
    return "lines" if is_fraction or len(last) > MOST_BARS else "bars"


def _are_numbers(places: Sequence[object]) -> bool:
    return all(isinstance(place, int | float) for place in places)
