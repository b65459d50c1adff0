"""Charts of numbers with named axes, and how a token is written on them. plotly is imported when a chart is drawn."""

from .charts import DIVERGING as DIVERGING
from .charts import MONOSPACE as MONOSPACE
from .charts import SEQUENTIAL as SEQUENTIAL
from .charts import heatmap as heatmap
from .charts import lines as lines
from .charts import picture as picture
from .labels import plotly_text as plotly_text
from .labels import positions as positions
from .labels import visible as visible
from .network import Box as Box
from .network import Link as Link
from .network import Network as Network
from .shading import shaded_tables as shaded_tables
from .shading import shaded_tokens as shaded_tokens
