"""Weights under canonical names: views, factored products, composition, processing."""

from clearspan.weights.composition import CompositionScores, composition_scores
from clearspan.weights.factored_matrix import SVD, FactoredMatrix
from clearspan.weights.heads import expand_kv_heads
from clearspan.weights.stacked import ModelWeights

__all__ = ["CompositionScores", "FactoredMatrix", "ModelWeights", "SVD", "composition_scores", "expand_kv_heads"]
