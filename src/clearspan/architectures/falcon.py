"""Falcon: multi-query, multi-head or grouped; parallel or sequential; rotary or alibi."""

from collections.abc import Mapping
from typing import Any, ClassVar

from clearspan.architectures.decoder import LAYER_NORM, SPLIT_EVENLY, DecoderAdapter
from clearspan.components import GeneralAttentionBridge, GeneralizedComponent, MLPBridge
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import GroupedQKVConversionRule, ParamProcessingConversion


class FalconArchitectureAdapter(DecoderAdapter):
    """Falcon, of the old and the new architecture."""

    uses_combined_qkv = True
    config_values: ClassVar[dict[str, object]] = {**LAYER_NORM, "positional_embedding_type": "rotary"}
    sizes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **SPLIT_EVENLY,
        "n_ctx": ("max_position_embeddings",),
        "d_mlp": ("ffn_hidden_size",),
        "act_fn": ("activation",),
    }
    embed_name = "transformer.word_embeddings"
    blocks_name = "transformer.h"
    final_norm_name = "transformer.ln_f"

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        if cfg.hf["alibi"]:
            cfg.positional_embedding_type = "alibi"

    @property
    def _is_parallel(self) -> bool:
        return self.cfg.hf["new_decoder_architecture"] or self.cfg.hf["parallel_attn"]

    def _n_kv_heads(self) -> int:
        hf = self.cfg.hf
        return hf["num_kv_heads"] if hf["new_decoder_architecture"] or not hf["multi_query"] else 1

    def _weight_conversions(self) -> dict[str, ParamProcessingConversion]:
        n_kv_heads = self._n_kv_heads()
        groups = n_kv_heads if 1 < n_kv_heads < self.cfg.n_heads else 1
        return self._qkvo_weight_conversions(n_kv_heads, rows="n h", query_groups=groups)

    def _wiring(self) -> dict[str, Any]:
        return {"is_parallel": self._is_parallel}

    def _parts(self) -> dict[str, GeneralizedComponent]:
        norms = {key: self._norm(name) for key, name in self._norm_names().items()}
        return {**norms, "attn": self._attention(), "mlp": self._mlp()}

    def _norm_names(self) -> dict[str, str]:
        hf = self.cfg.hf
        if hf["new_decoder_architecture"] and hf["num_ln_in_parallel_attn"] in (None, 2):
            return {"ln1": "ln_attn", "ln2": "ln_mlp"}
        after = {} if self._is_parallel else {"ln2": "post_attention_layernorm"}
        return {"ln1": "input_layernorm", **after}

    def _attention(self) -> GeneralAttentionBridge:
        cfg = self.cfg
        rule = GroupedQKVConversionRule(cfg.n_heads, cfg.d_head, self._n_kv_heads())
        attention = self._joint_attention(
            "self_attention", "query_key_value", "dense", rule, has_rotary=not cfg.hf["alibi"]
        )
        attention.repeats_keys = cfg.hf["new_decoder_architecture"]
        return attention

    def _mlp(self) -> MLPBridge:
        mlp = self._plain_mlp("mlp", "dense_h_to_4h", "dense_4h_to_h")
        # A parallel block adds attention's output into the storage of the MLP's output, which is its last map's output.
        mlp.output_is_overwritten = mlp.submodules["out"].output_is_overwritten = self._is_parallel
        return mlp
