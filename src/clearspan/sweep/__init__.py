"""Sweeps: many interventions on one input, planned into few batched forwards that change no number."""

from clearspan.effects import Effects as Effects
from clearspan.sweep.experiment import Experiment as Experiment
from clearspan.sweep.grid import Grid as Grid
from clearspan.sweep.grid import grid as grid
from clearspan.sweep.metrics import KLDivergence as KLDivergence
from clearspan.sweep.metrics import LogitDifference as LogitDifference
from clearspan.sweep.metrics import LogitMetric as LogitMetric
from clearspan.sweep.metrics import Metric as Metric
from clearspan.sweep.metrics import NextTokenLoss as NextTokenLoss
from clearspan.sweep.metrics import Probability as Probability
from clearspan.sweep.pair import Direction as Direction
from clearspan.sweep.pair import Pair as Pair
from clearspan.sweep.plan import SweepPlan as SweepPlan
from clearspan.sweep.sweep import Sweep as Sweep
