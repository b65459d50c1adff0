"""GPT-NeoX (Pythia), with parallel or sequential residual."""

from typing import Any, ClassVar

from clearspan.architectures.decoder import LAYER_NORM, DecoderAdapter
from clearspan.components import GeneralizedComponent
from clearspan.conversions import GroupedQKVConversionRule, ParamProcessingConversion


class GPTNeoXArchitectureAdapter(DecoderAdapter):
    """GPT-NeoX (Pythia)."""

    uses_combined_qkv = True
    config_values: ClassVar[dict[str, object]] = {
        **LAYER_NORM,
        "positional_embedding_type": "rotary",
        "eps_attr": "layer_norm_eps",
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
