"""BLOOM and MPT: positions as a bias on attention's scores."""

from collections.abc import Mapping
from typing import Any, ClassVar

from clearspan.architectures.decoder import LAYER_NORM, SPLIT_EVENLY, DecoderAdapter
from clearspan.components import EmbeddingBridge, GeneralizedComponent
from clearspan.conversions import BlockedQKVConversionRule, GroupedQKVConversionRule, ParamProcessingConversion


class BloomArchitectureAdapter(DecoderAdapter):
    """BLOOM."""

    uses_combined_qkv = True
    config_values: ClassVar[dict[str, object]] = {**LAYER_NORM, "positional_embedding_type": "alibi"}
    sizes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **SPLIT_EVENLY,
        "n_ctx": ("seq_length",),
        "d_mlp": (),
        "act_fn": (),
    }
    embed_name = "transformer.word_embeddings"
    embed_norm_name: ClassVar[str] = "transformer.word_embeddings_layernorm"
    blocks_name = "transformer.h"
    final_norm_name = "transformer.ln_f"

    def _components(self) -> dict[str, GeneralizedComponent]:
        embed, *others = super()._components().items()
        return dict([embed, ("embed_norm", self._norm(self.embed_norm_name)), *others])

    def _embed(self) -> EmbeddingBridge:
        return EmbeddingBridge(name=self.embed_name, ends_at=self.embed_norm_name)

    def _weight_conversions(self) -> dict[str, ParamProcessingConversion]:
        return self._qkvo_weight_conversions(n_kv_heads=self.cfg.n_heads, rows="n h")

    def _wiring(self) -> dict[str, Any]:
        # Attention and MLP add the residual stream themselves: their own contribution is the output of their last map.
        return {
            "attn_out": "self_attention.dense",
            "mlp_out": "mlp.dense_4h_to_h",
            "residual_is_normed": self.cfg.hf["apply_residual_connection_post_layernorm"],
        }

    def _parts(self) -> dict[str, GeneralizedComponent]:
        rule = GroupedQKVConversionRule(self.cfg.n_heads, self.cfg.d_head, self.cfg.n_heads)
        attention = self._joint_attention("self_attention", "query_key_value", "dense", rule)
        attention.output_is_overwritten = True  # it is the residual stream: hook_resid_mid writes into it
        return {
            "ln1": self._norm("input_layernorm"),
            "attn": attention,
            "ln2": self._norm("post_attention_layernorm"),
            "mlp": self._plain_mlp("mlp", "dense_h_to_4h", "dense_4h_to_h"),
        }


class MPTArchitectureAdapter(DecoderAdapter):
    """MPT."""

    uses_combined_qkv = True
    config_values: ClassVar[dict[str, object]] = {
        **LAYER_NORM,
        "positional_embedding_type": "alibi",
        "has_table": True,
    }
    sizes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **SPLIT_EVENLY,
        "n_ctx": ("max_seq_len",),
        "d_mlp": (),
        "act_fn": (),
    }
    embed_name = "transformer.wte"
    blocks_name = "transformer.blocks"
    final_norm_name = "transformer.norm_f"

    def _wiring(self) -> dict[str, Any]:
        return {"attn_out": "resid_attn_dropout", "mlp_out": "ffn.down_proj"}

    def _parts(self) -> dict[str, GeneralizedComponent]:
        rule = BlockedQKVConversionRule(self.cfg.n_heads, self.cfg.d_head, self.cfg.n_heads)
        return {
            "ln1": self._norm("norm_1"),
            "attn": self._joint_attention("attn", "Wqkv", "out_proj", rule),
            "ln2": self._norm("norm_2"),
            "mlp": self._plain_mlp("ffn", "up_proj", "down_proj"),
        }
