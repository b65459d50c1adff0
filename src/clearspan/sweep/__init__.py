"""Sweeps: many interventions on one input, planned into few batched forwards that change no number."""

from clearspan.effects import Effects
from clearspan.sweep.answers import answered
from clearspan.sweep.costs import Costs
from clearspan.sweep.experiment import Experiment
from clearspan.sweep.grid import Grid, grid
from clearspan.sweep.metrics import (
    AnswerLogProbability,
    KLDivergence,
    LogitDifference,
    LogitMetric,
    Metric,
    NextTokenLoss,
    Probability,
)
from clearspan.sweep.pair import Direction, Pair
from clearspan.sweep.plan import SweepPlan
from clearspan.sweep.sweep import Sweep
from clearspan.sweep.ways import Way

__all__ = [
    "AnswerLogProbability",
    "Costs",
    "Direction",
    "Effects",
    "Experiment",
    "Grid",
    "KLDivergence",
    "LogitDifference",
    "LogitMetric",
    "Metric",
    "NextTokenLoss",
    "Pair",
    "Probability",
    "Sweep",
    "SweepPlan",
    "Way",
    "answered",
    "grid",
]
