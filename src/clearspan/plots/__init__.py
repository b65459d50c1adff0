"""Charts of numbers with named axes, and how a token is written on them. plotly is imported when a chart is drawn."""

from clearspan.plots.charts import DIVERGING, MONOSPACE, SEQUENTIAL, heatmap, lines, picture
from clearspan.plots.labels import id_label, plotly_text, positions, visible
from clearspan.plots.network import Box, Link, Network
from clearspan.plots.shading import shaded_tables, shaded_tokens

__all__ = [
    "Box",
    "DIVERGING",
    "Link",
    "MONOSPACE",
    "Network",
    "SEQUENTIAL",
    "heatmap",
    "id_label",
    "lines",
    "picture",
    "plotly_text",
    "positions",
    "shaded_tables",
    "shaded_tokens",
    "visible",
]
