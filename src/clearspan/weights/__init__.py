"""Weights under canonical names: views, factored products, composition, processing."""

from clearspan.weights.composition import CompositionScores, composition_scores
from clearspan.weights.factored_matrix import SVD, FactoredMatrix
from clearspan.weights.model_weights import ModelWeights, expand_kv_heads

__all__ = ["CompositionScores", "FactoredMatrix", "ModelWeights", "SVD", "composition_scores", "expand_kv_heads"]
