"""The kinds of part a transformer has, as data: which hook points and weights each kind has, and where."""

from clearspan.components.attention import AttentionBridge as AttentionBridge
from clearspan.components.attention import GeneralAttentionBridge as GeneralAttentionBridge
from clearspan.components.attention import HeadAttentionBridge as HeadAttentionBridge
from clearspan.components.attention import JointQKVAttentionBridge as JointQKVAttentionBridge
from clearspan.components.base import Binding as Binding
from clearspan.components.base import GeneralizedComponent as GeneralizedComponent
from clearspan.components.base import PerLayer as PerLayer
from clearspan.components.base import hook_points as hook_points
from clearspan.components.base import logits_point as logits_point
from clearspan.components.block import BlockBridge as BlockBridge
from clearspan.components.block import Identity as Identity
from clearspan.components.embedding import EmbeddingBridge as EmbeddingBridge
from clearspan.components.embedding import PosEmbedBridge as PosEmbedBridge
from clearspan.components.embedding import UnembeddingBridge as UnembeddingBridge
from clearspan.components.latent_attention import LatentAttentionBridge as LatentAttentionBridge
from clearspan.components.linear import LinearBridge as LinearBridge
from clearspan.components.linear import LinearMap as LinearMap
from clearspan.components.linear import TransposedLinearBridge as TransposedLinearBridge
from clearspan.components.mlp import ActivationBridge as ActivationBridge
from clearspan.components.mlp import ExpertsBridge as ExpertsBridge
from clearspan.components.mlp import GatedMLPBridge as GatedMLPBridge
from clearspan.components.mlp import JointGateMLPBridge as JointGateMLPBridge
from clearspan.components.mlp import MLPBridge as MLPBridge
from clearspan.components.mlp import MoEBridge as MoEBridge
from clearspan.components.mlp import RouterBridge as RouterBridge
from clearspan.components.normalization import NormalizationBridge as NormalizationBridge
