"""The kinds of part a transformer has, as data: which hook points and weights each kind has, and where."""

from clearspan.components.attention import (
    AttentionBridge,
    GeneralAttentionBridge,
    HeadAttentionBridge,
    JointQKVAttentionBridge,
)
from clearspan.components.base import Binding, GeneralizedComponent, PerLayer, check_parts, hook_points, logits_point
from clearspan.components.block import BlockBridge, Identity
from clearspan.components.embedding import (
    EmbeddingBridge,
    LogitHeadBridge,
    PosEmbedBridge,
    TypeEmbedBridge,
    UnembeddingBridge,
)
from clearspan.components.latent_attention import LatentAttentionBridge
from clearspan.components.linear import LinearBridge, TransposedLinearBridge
from clearspan.components.mlp import (
    ActivationBridge,
    ExpertsBridge,
    GatedMLPBridge,
    JointGateMLPBridge,
    MLPBridge,
    MoEBridge,
    RouterBridge,
)
from clearspan.components.normalization import NormalizationBridge
from clearspan.components.opaque import OpaqueBridge
from clearspan.components.remainder import RemainderBridge
from clearspan.components.sublayer import Sublayer, SublayerKind, part_kind, projection_input, stream_at
from clearspan.components.weights import LinearMap, WeightTensor

__all__ = [
    "ActivationBridge",
    "AttentionBridge",
    "Binding",
    "BlockBridge",
    "EmbeddingBridge",
    "ExpertsBridge",
    "GatedMLPBridge",
    "GeneralAttentionBridge",
    "GeneralizedComponent",
    "HeadAttentionBridge",
    "Identity",
    "JointGateMLPBridge",
    "JointQKVAttentionBridge",
    "LatentAttentionBridge",
    "LinearBridge",
    "LinearMap",
    "LogitHeadBridge",
    "MLPBridge",
    "MoEBridge",
    "NormalizationBridge",
    "OpaqueBridge",
    "PerLayer",
    "PosEmbedBridge",
    "RemainderBridge",
    "RouterBridge",
    "Sublayer",
    "SublayerKind",
    "TransposedLinearBridge",
    "TypeEmbedBridge",
    "UnembeddingBridge",
    "WeightTensor",
    "check_parts",
    "hook_points",
    "logits_point",
    "part_kind",
    "projection_input",
    "stream_at",
]
