"""The kinds of part a transformer has, as data: which hook points and weights each kind has, and where."""

from clearspan.components.altup import AltUpBlockBridge, AltUpBridge, StreamMapsBridge
from clearspan.components.attention import (
    AttentionBridge,
    GeneralAttentionBridge,
    HeadAttentionBridge,
    JointQKVAttentionBridge,
)
from clearspan.components.base import Binding, GeneralizedComponent, PerLayer, check_parts, hook_points, logits_point
from clearspan.components.beside import MLPBesideMixtureBridge
from clearspan.components.block import BlockBridge, Identity
from clearspan.components.cut_gate import CutGateMLPBridge
from clearspan.components.deep_router import DeepRouterBridge
from clearspan.components.embedding import (
    EmbeddingBridge,
    LogitHeadBridge,
    PosEmbedBridge,
    TypeEmbedBridge,
    UnembeddingBridge,
)
from clearspan.components.gated_norm import GatedNormBridge as GatedNormBridge
from clearspan.components.gated_norm import InnerNormBridge as InnerNormBridge
from clearspan.components.latent_attention import LatentAttentionBridge
from clearspan.components.linear import LateBiasLinearBridge, LinearBridge, TransposedLinearBridge
from clearspan.components.mixer import MixerBridge, Part, WeightsBridge
from clearspan.components.mixer_kinds import KINDS, MixerKind, kind_among
from clearspan.components.mlp import (
    ActivationBridge,
    ExpertsBridge,
    GatedMLPBridge,
    JointGateMLPBridge,
    MLPBridge,
    MoEBridge,
    RouterBridge,
)
from clearspan.components.multi_stream import (
    HyperConnectionBridge,
    MultiStreamBlockBridge,
    StreamsBridge,
    StreamsLayout,
)
from clearspan.components.normalization import NormalizationBridge
from clearspan.components.opaque import AddingBridge, OpaqueBridge
from clearspan.components.opaque_attention import OpaqueAttentionBridge
from clearspan.components.per_layer_input import PerLayerInputBridge
from clearspan.components.remainder import RemainderBridge
from clearspan.components.shared_attention import SharedKeysAttentionBridge
from clearspan.components.stream_block import StreamBlockBridge
from clearspan.components.sublayer import Sublayer, SublayerKind, part_kind, projection_input, stream_at
from clearspan.components.weights import LinearMap, WeightTensor

__all__ = [
    "AddingBridge",
    "ActivationBridge",
    "AltUpBlockBridge",
    "AltUpBridge",
    "AttentionBridge",
    "Binding",
    "BlockBridge",
    "CutGateMLPBridge",
    "DeepRouterBridge",
    "EmbeddingBridge",
    "ExpertsBridge",
    "GatedMLPBridge",
    "GatedNormBridge",
    "GeneralAttentionBridge",
    "GeneralizedComponent",
    "HeadAttentionBridge",
    "HyperConnectionBridge",
    "Identity",
    "InnerNormBridge",
    "JointGateMLPBridge",
    "JointQKVAttentionBridge",
    "KINDS",
    "LatentAttentionBridge",
    "LateBiasLinearBridge",
    "LinearBridge",
    "LinearMap",
    "LogitHeadBridge",
    "MLPBesideMixtureBridge",
    "MLPBridge",
    "MixerBridge",
    "MixerKind",
    "MoEBridge",
    "MultiStreamBlockBridge",
    "NormalizationBridge",
    "OpaqueAttentionBridge",
    "OpaqueBridge",
    "Part",
    "PerLayer",
    "PerLayerInputBridge",
    "PosEmbedBridge",
    "RemainderBridge",
    "RouterBridge",
    "SharedKeysAttentionBridge",
    "StreamBlockBridge",
    "StreamMapsBridge",
    "StreamsBridge",
    "StreamsLayout",
    "Sublayer",
    "SublayerKind",
    "TransposedLinearBridge",
    "TypeEmbedBridge",
    "UnembeddingBridge",
    "WeightTensor",
    "WeightsBridge",
    "check_parts",
    "hook_points",
    "kind_among",
    "logits_point",
    "part_kind",
    "projection_input",
    "stream_at",
]
