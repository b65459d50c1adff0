"""Weights under canonical names: views, factored products, composition, processing."""

from .composition import CompositionScores as CompositionScores
from .composition import composition_scores as composition_scores
from .factored_matrix import SVD as SVD
from .factored_matrix import FactoredMatrix as FactoredMatrix
from .heads import expand_kv_heads as expand_kv_heads
from .stacked import ModelWeights as ModelWeights
