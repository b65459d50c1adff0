"""Until all of analysis imports `clearspan.sweep.metrics`."""

from clearspan.sweep.metrics import Metric as Metric
from clearspan.sweep.readings import measured as measured
