"""The kinds of part a transformer has, as data: which hook points and weights each kind has, and where."""

from clearspan.components.attention import JointQKVAttentionBridge as JointQKVAttentionBridge
from clearspan.components.base import Binding as Binding
from clearspan.components.base import GeneralizedComponent as GeneralizedComponent
from clearspan.components.base import hook_points as hook_points
from clearspan.components.block import BlockBridge as BlockBridge
from clearspan.components.embedding import EmbeddingBridge as EmbeddingBridge
from clearspan.components.embedding import PosEmbedBridge as PosEmbedBridge
from clearspan.components.embedding import UnembeddingBridge as UnembeddingBridge
from clearspan.components.linear import LinearBridge as LinearBridge
from clearspan.components.mlp import MLPBridge as MLPBridge
from clearspan.components.normalization import NormalizationBridge as NormalizationBridge
