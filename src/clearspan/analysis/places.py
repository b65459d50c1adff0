"""Until all of analysis imports `clearspan.analysis.activations` and `clearspan.inputs`."""

from clearspan.analysis.activations import depths_of as depths_of
from clearspan.analysis.activations import target_ids_of as target_ids_of
from clearspan.inputs import Input as Input
from clearspan.inputs import Place as Place
