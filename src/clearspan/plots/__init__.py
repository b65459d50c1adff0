"""Charts of numbers with named axes, and how a token is written on them. plotly is imported when a chart is drawn."""

from clearspan.plots.bar_chart import BarChart
from clearspan.plots.chart import Chart, chart_of, picture
from clearspan.plots.charts import MONOSPACE, heatmap, lines
from clearspan.plots.colors import DIVERGING, SEQUENTIAL, SERIES
from clearspan.plots.fragment import folded, fragment, heading, html_table, paragraph, still
from clearspan.plots.heat_map import HeatMap
from clearspan.plots.labels import id_label, numbered, plotly_text, positions, visible
from clearspan.plots.line_chart import LineChart
from clearspan.plots.network import Box, Link, Network
from clearspan.plots.shading import shaded_tables, shaded_tokens

__all__ = [
    "BarChart",
    "Box",
    "Chart",
    "DIVERGING",
    "HeatMap",
    "LineChart",
    "Link",
    "MONOSPACE",
    "Network",
    "SEQUENTIAL",
    "SERIES",
    "chart_of",
    "folded",
    "fragment",
    "heading",
    "heatmap",
    "html_table",
    "id_label",
    "lines",
    "numbered",
    "paragraph",
    "picture",
    "plotly_text",
    "positions",
    "shaded_tables",
    "shaded_tokens",
    "still",
    "visible",
]
