"""What a model does with a text, measured on the bridge's public names alone."""

from .effect import CausalEffect as CausalEffect
from .effect import causal_effect as causal_effect
from .heads import Head as Head
from .heads import HeadScores as HeadScores
from .heads import head_scores as head_scores
from .heads import strongest as strongest
from .lens import LogitLens as LogitLens
from .lens import logit_lens as logit_lens
from .lens_divergence import LensDivergence as LensDivergence
from .lens_divergence import lens_divergence as lens_divergence
from .lens_readings import LensReadings as LensReadings
from .lens_readings import lens_readings as lens_readings
from .predictions import NotFiniteError as NotFiniteError
from .predictions import Predictions as Predictions
from .predictions import predictions as predictions
from .report import ModelFacts as ModelFacts
from .report import Report as Report
from .report import report as report
from .statistics import Interval as Interval
from .statistics import bootstrap_interval as bootstrap_interval
from .statistics import permutation_p_value as permutation_p_value
from .statistics import standard_error as standard_error
from .streams import Translator as Translator
from .tuned_lens import TunedLens as TunedLens
from .tuned_lens_training import train_tuned_lens as train_tuned_lens
