"""What a model does with a text, measured on the bridge's public names alone."""

from .effect import CausalEffect as CausalEffect
from .effect import causal_effect as causal_effect
from .heads import Head as Head
from .heads import HeadScores as HeadScores
from .heads import head_scores as head_scores
from .heads import strongest as strongest
from .lens import LogitLens as LogitLens
from .lens import logit_lens as logit_lens
from .predictions import NotFiniteError as NotFiniteError
from .predictions import Predictions as Predictions
from .predictions import predictions as predictions
from .report import ModelFacts as ModelFacts
from .report import Report as Report
from .report import report as report
