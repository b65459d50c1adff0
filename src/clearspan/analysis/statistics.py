"""Temporary: `clearspan.statistics` has moved below the analysis layer."""

from clearspan.statistics import *  # noqa: F403
from clearspan.statistics import Interval, bootstrap_interval, permutation_p_value, standard_error  # noqa: F401
