"""Weights under canonical names: views, factored products, composition, processing."""

from clearspan.weights.composition import CompositionScores as CompositionScores
from clearspan.weights.composition import composition_scores as composition_scores
from clearspan.weights.factored_matrix import SVD as SVD
from clearspan.weights.factored_matrix import FactoredMatrix as FactoredMatrix
from clearspan.weights.model_weights import ModelWeights as ModelWeights
from clearspan.weights.model_weights import expand_kv_heads as expand_kv_heads
