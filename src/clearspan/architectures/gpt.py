"""GPT-2, GPT-J and GPT-NeoX (Pythia)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from clearspan.architectures.decoder import LAYER_NORM, SPLIT_EVENLY, DecoderAdapter
from clearspan.components import (
    AttentionBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    JointQKVAttentionBridge,
    MLPBridge,
    TransposedLinearBridge,
)
from clearspan.conversions import BlockedQKVConversionRule, GroupedQKVConversionRule, ParamProcessingConversion

GPT_SIZES: Mapping[str, tuple[str, ...]] = {
    **SPLIT_EVENLY,
    "n_ctx": ("max_position_embeddings",),
    "d_mlp": ("n_inner",),
    "act_fn": ("activation_function",),
}
"""`sizes` of GPT-2 and of what was written after it."""


class GPT2ArchitectureAdapter(DecoderAdapter):
    """GPT-2."""

    uses_combined_qkv = True
    config_values: ClassVar[dict[str, object]] = LAYER_NORM
    sizes = GPT_SIZES
    embed_name = "transformer.wte"
    pos_embed_name = "transformer.wpe"
    blocks_name = "transformer.h"
    final_norm_name = "transformer.ln_f"

    def _parts(self) -> dict[str, GeneralizedComponent]:
        maps = {"in": TransposedLinearBridge(name="c_fc"), "out": TransposedLinearBridge(name="c_proj")}
        return {
            "ln1": self._norm("ln_1"),
            "attn": self._attention(),
            "ln2": self._norm("ln_2"),
            "mlp": MLPBridge(name="mlp", submodules=maps),
        }

    def _attention(self) -> GeneralAttentionBridge:
        return JointQKVAttentionBridge(
            name="attn",
            qkv_conversion_rule=BlockedQKVConversionRule(self.cfg.n_heads, self.cfg.d_head, self.cfg.n_heads),
            submodules={"qkv": TransposedLinearBridge(name="c_attn"), "o": TransposedLinearBridge(name="c_proj")},
        )


class GPTJArchitectureAdapter(DecoderAdapter):
    """GPT-J."""

    config_values: ClassVar[dict[str, object]] = {
        **LAYER_NORM,
        "positional_embedding_type": "rotary",
        "has_table": True,
    }
    sizes = GPT_SIZES
    irrelevant: ClassVar[Mapping[str, str]] = {
        "*.embed_positions": "sines and cosines of the rotation, which the config fixes"
    }
    embed_name = "transformer.wte"
    blocks_name = "transformer.h"
    final_norm_name = "transformer.ln_f"

    def _wiring(self) -> dict[str, Any]:
        return {"is_parallel": True}

    def _parts(self) -> dict[str, GeneralizedComponent]:
        projections = self._linears(q="q_proj", k="k_proj", v="v_proj", o="out_proj")
        return {
            "ln1": self._norm("ln_1"),
            "attn": AttentionBridge(name="attn", has_rotary=True, submodules=projections),
            "mlp": self._plain_mlp("mlp", "fc_in", "fc_out"),
        }


class GPTNeoXArchitectureAdapter(DecoderAdapter):
    """GPT-NeoX (Pythia)."""

    uses_combined_qkv = True
    config_values: ClassVar[dict[str, object]] = {
        **LAYER_NORM,
        "positional_embedding_type": "rotary",
        "eps_attr": "layer_norm_eps",
    }
    sizes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **SPLIT_EVENLY,
        "n_ctx": ("max_position_embeddings",),
        "d_mlp": ("intermediate_size",),
        "act_fn": ("hidden_act",),
    }
    embed_name = "gpt_neox.embed_in"
    blocks_name = "gpt_neox.layers"
    final_norm_name = "gpt_neox.final_layer_norm"

    def _weight_conversions(self) -> dict[str, ParamProcessingConversion]:
        return self._qkvo_weight_conversions(n_kv_heads=self.cfg.n_heads, rows="n h")

    def _wiring(self) -> dict[str, Any]:
        return {
            "is_parallel": self.cfg.hf["use_parallel_residual"],
            "attn_out": "post_attention_dropout",
            "mlp_out": "post_mlp_dropout",
        }

    def _parts(self) -> dict[str, GeneralizedComponent]:
        rule = GroupedQKVConversionRule(self.cfg.n_heads, self.cfg.d_head, self.cfg.n_heads)
        return {
            "ln1": self._norm("input_layernorm"),
            "attn": self._joint_attention("attention", "query_key_value", "dense", rule, has_rotary=True),
            "ln2": self._norm("post_attention_layernorm"),
            "mlp": self._plain_mlp("mlp", "dense_h_to_4h", "dense_4h_to_h"),
        }
