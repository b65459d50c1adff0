"""What an adapter is: one family's parts and layouts, as data without forward code; and the frame of a decoder."""

from collections.abc import Mapping
from typing import Any, ClassVar

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
from clearspan.conversions import ParamProcessingConversion, QKVConversionRule, RearrangeTensorConversion
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
"""`config_values` of families with layer norms, plain MLPs and learned positions; most differ in an entry or two."""

SIZES: Mapping[str, tuple[str, ...]] = {
    "n_ctx": ("max_position_embeddings", "max_seq_len", "seq_length"),
    "d_head": ("head_dim",),
    "d_mlp": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "act_fn": ("hidden_act", "activation_function", "hidden_activation", "activation"),
    "n_key_value_heads": ("num_key_value_heads",),
}
"""`sizes` of a family that does not say which entries its code reads."""

SPLIT_EVENLY: Mapping[str, tuple[str, ...]] = {"d_head": (), "n_key_value_heads": ()}
"""`sizes` of heads that share `d_model` evenly, each with a key and a value of its own, whatever the config says."""


class ArchitectureAdapter:
    """Where each canonical part of a family lives, and how its tensors convert.

    Attributes:
        cfg: The model's sizes, with the family's values set.
        component_mapping: Canonical names to component templates, in the order of the forward.
        weight_processing_conversions: Canonical weight names, with `{i}` for the layer, to conversions.

    Args:
        cfg: The model's sizes; the adapter sets the family's values on it.
    """

    config_values: ClassVar[dict[str, object]] = {}
    """Fields of `TransformerBridgeConfig` that the family fixes."""
    sizes: ClassVar[Mapping[str, tuple[str, ...]]] = SIZES
    """For fields of `TransformerBridgeConfig`, the entries of the model's config that its own code reads, of which the
    first that is set counts. Without one, a head is `d_model / n_heads` wide, an MLP `4 * d_model`, and keys and values
    have as many heads as queries."""
    default_cfg: ClassVar[dict[str, object]] = {}
    """Further fields: options of how the family is shown."""
    uses_combined_qkv: ClassVar[bool] = False
    """Whether queries, keys and values come from one linear map."""
    makes_positions_from_mask: ClassVar[bool] = False
    """Whether the model itself numbers positions by the padding mask."""
    whole_sequences: ClassVar[str | None] = None
    """Why a run cannot continue from the keys and values of earlier positions, or None if it can."""
    irrelevant: ClassVar[Mapping[str, str]] = {"*inv_freq": "frequencies of the rotation, which the config fixes"}
    """Parameters and buffers that no component accounts for, as patterns of their paths, each with the reason."""
    component_mapping: dict[str, GeneralizedComponent]
    weight_processing_conversions: dict[str, ParamProcessingConversion]

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        self.cfg = cfg
        cfg.update({**self.config_values, **self.default_cfg})

    def _qkvo_weight_conversions(
        self, n_kv_heads: int, rows: str = "(n h)", query_groups: int = 1
    ) -> dict[str, ParamProcessingConversion]:
        """Returns the conversions of attention's four weights, `[out, in]` to canonical axes.

        Args:
            n_kv_heads: Key and value heads.
            rows: The rows of the query, key and value weights as an einops pattern: joined, or by head already.
            query_groups: Size of the axis of groups in the query weight's rows, or 1 without such an axis.
        """
        heads = {"q": self.cfg.n_heads, "k": n_kv_heads, "v": n_kv_heads}
        conversions = {
            f"blocks.{{i}}.attn.{key}.weight": RearrangeTensorConversion(f"{rows} m -> n m h", n=n)
            for key, n in heads.items()
        }
        if query_groups > 1:
            conversions["blocks.{i}.attn.q.weight"] = RearrangeTensorConversion("g n h m -> (g n) m h", g=query_groups)
        conversions["blocks.{i}.attn.o.weight"] = RearrangeTensorConversion("m (n h) -> n h m", n=self.cfg.n_heads)
        return {name: ParamProcessingConversion(conversion) for name, conversion in conversions.items()}


class DecoderAdapter(ArchitectureAdapter):
    """A decoder: embedding, blocks, final norm, unembedding.

    A family sets the paths of these modules, and overrides the methods for what is its own.
    """

    embed_name: ClassVar[str]
    """Path of the token embedding in the Hugging Face model."""
    pos_embed_name: ClassVar[str | None] = None
    """Path of the learned position embedding, or None."""
    blocks_name: ClassVar[str]
    """Path of the list of blocks."""
    final_norm_name: ClassVar[str]
    """Path of the norm after the last block."""
    unembed_name: ClassVar[str] = "lm_head"
    """Path of the unembedding."""

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
        """Returns how many key and value heads there are."""
        return self.cfg.n_key_value_heads or self.cfg.n_heads

    def _weight_conversions(self) -> dict[str, ParamProcessingConversion]:
        """Returns the conversions of attention's weights."""
        return self._qkvo_weight_conversions(n_kv_heads=self._n_kv_heads())

    def _embed(self) -> EmbeddingBridge:
        """Returns the token embedding."""
        return EmbeddingBridge(name=self.embed_name)

    def _wiring(self) -> dict[str, Any]:
        """Returns settings of `BlockBridge`, for blocks that are not pre-norm and sequential."""
        return {}

    def _parts(self) -> dict[str, GeneralizedComponent]:
        """Returns the parts of a block by canonical name, such as `ln1`, `attn`, `ln2`, `mlp`."""
        raise NotImplementedError

    def _norm(self, name: str) -> NormalizationBridge:
        """Returns a norm of the residual stream."""
        return NormalizationBridge(name=name)

    def _attention(self) -> GeneralAttentionBridge:
        """Returns attention."""
        raise NotImplementedError

    def _linears(self, layout: Layout = Layout.TOKENS, **names: str) -> dict[str, GeneralizedComponent]:
        """Returns linear maps by canonical name, with their module's name; `in_` stands for `in`, a keyword."""
        return {key.rstrip("_"): LinearBridge(name=name, layout=layout) for key, name in names.items()}

    def _joint_attention(
        self, name: str, qkv: str, o: str, rule: QKVConversionRule, *, has_rotary: bool = False
    ) -> JointQKVAttentionBridge:
        """Returns attention with one linear map for queries, keys and values."""
        return JointQKVAttentionBridge(
            name=name, qkv_conversion_rule=rule, has_rotary=has_rotary, submodules=self._linears(qkv=qkv, o=o)
        )

    def _plain_mlp(self, name: str | None, inward: str, outward: str, layout: Layout = Layout.TOKENS) -> MLPBridge:
        """Returns an MLP without a gate: two linear maps around an activation function."""
        return MLPBridge(name=name, submodules=self._linears(layout, in_=inward, out=outward))
