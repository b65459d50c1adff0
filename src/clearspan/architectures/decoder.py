"""The frame of a decoder: embedding, blocks, final norm, unembedding. Families fill in names and parts."""

from typing import Any, ClassVar

from clearspan.architectures.base import ArchitectureAdapter
from clearspan.components import (
    BlockBridge,
    EmbeddingBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    JointQKVAttentionBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import ParamProcessingConversion, QKVConversionRule
from clearspan.points import Layout

LAYER_NORM: dict[str, object] = {
    "normalization_type": "LN",
    "positional_embedding_type": "standard",
    "final_rms": False,
    "gated_mlp": False,
    "attn_only": False,
    "uses_rms_norm": False,
    "eps_attr": "layer_norm_epsilon",
}
"""What families with layer norms and plain MLPs set on `cfg`; some differ in an entry."""


class DecoderAdapter(ArchitectureAdapter):
    """Builds the mapping from the names and parts that a family gives.

    A family says in class attributes where the frame's modules are, and overrides the methods for what is its own.
    """

    embed_name: ClassVar[str]
    pos_embed_name: ClassVar[str | None] = None
    blocks_name: ClassVar[str]
    final_norm_name: ClassVar[str]
    unembed_name: ClassVar[str] = "lm_head"

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        cfg.n_key_value_heads = self._n_kv_heads()
        self.weight_processing_conversions = self._weight_conversions()
        self.component_mapping = self._components()

    def _components(self) -> dict[str, GeneralizedComponent]:
        """Returns the mapping, in the order of the forward."""
        positions = {} if self.pos_embed_name is None else {"pos_embed": PosEmbedBridge(name=self.pos_embed_name)}
        return {
            "embed": self._embed(),
            **positions,
            "blocks": BlockBridge(name=self.blocks_name, submodules=self._parts(), **self._wiring()),
            "ln_final": self._norm(self.final_norm_name),
            "unembed": UnembeddingBridge(name=self.unembed_name),
        }

    def _n_kv_heads(self) -> int:
        """Returns the key and value heads."""
        return self.cfg.n_key_value_heads or self.cfg.n_heads

    def _weight_conversions(self) -> dict[str, ParamProcessingConversion]:
        """Returns the conversions of attention's weights."""
        return self._qkvo_weight_conversions(n_kv_heads=self._n_kv_heads())

    def _embed(self) -> EmbeddingBridge:
        """Returns the token embedding."""
        return EmbeddingBridge(name=self.embed_name)

    def _wiring(self) -> dict[str, Any]:
        """Returns the settings of `BlockBridge` in which the family's blocks are not pre-norm and sequential."""
        return {}

    def _parts(self) -> dict[str, GeneralizedComponent]:
        """Returns the parts of a block."""
        raise NotImplementedError

    def _norm(self, name: str) -> NormalizationBridge:
        """Returns a norm of the residual stream."""
        return NormalizationBridge(name=name)

    def _attention(self) -> GeneralAttentionBridge:
        """Returns attention."""
        raise NotImplementedError

    def _linears(self, layout: Layout = Layout.TOKENS, **names: str) -> dict[str, GeneralizedComponent]:
        """Returns linear maps by canonical name; a final underscore makes a keyword a name (`in_`)."""
        return {key.rstrip("_"): LinearBridge(name=name, layout=layout) for key, name in names.items()}

    def _joint_attention(
        self, name: str, qkv: str, o: str, rule: QKVConversionRule, *, has_rotary: bool = False
    ) -> JointQKVAttentionBridge:
        """Returns attention with one linear map for queries, keys and values."""
        return JointQKVAttentionBridge(
            name=name, qkv_conversion_rule=rule, has_rotary=has_rotary, submodules=self._linears(qkv=qkv, o=o)
        )

    def _plain_mlp(self, name: str | None, inward: str, outward: str, layout: Layout = Layout.TOKENS) -> MLPBridge:
        """Returns an MLP without a gate."""
        return MLPBridge(name=name, submodules=self._linears(layout, in_=inward, out=outward))
