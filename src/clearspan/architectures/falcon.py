"""Falcon: multi-query, multi-head or grouped; parallel or sequential; rotary or alibi."""

from collections.abc import Mapping
from typing import ClassVar

from clearspan.architectures.adapter import ArchitectureAdapter, Sizes, entries
from clearspan.architectures.parts import block, decoder, fused_attention, mlp, norm
from clearspan.components import GeneralizedComponent
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import GroupedQKVConversionRule


class FalconArchitectureAdapter(ArchitectureAdapter):
    """Falcon, of the old and the new architecture."""

    sizes: ClassVar[Sizes] = entries(
        n_ctx="max_position_embeddings", eps="layer_norm_epsilon", act_fn="activation", d_mlp="ffn_hidden_size"
    )

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        hf = cfg.hf
        is_new, has_alibi = hf["new_decoder_architecture"], hf["alibi"]
        is_parallel = is_new or hf["parallel_attn"]
        n_kv_heads = hf["num_kv_heads"] if is_new or not hf["multi_query"] else 1
        before, between = "input_layernorm", None if is_parallel else "post_attention_layernorm"
        if is_new and hf["num_ln_in_parallel_attn"] in (None, 2):
            before, between = "ln_attn", "ln_mlp"
        blocks = block(
            "transformer.h",
            parallel=is_parallel,
            ln1=norm(before),
            attn=fused_attention(
                "self_attention",
                qkv="query_key_value",
                o="dense",
                rule=GroupedQKVConversionRule(cfg.n_heads, cfg.d_head, n_kv_heads),
                rotary=not has_alibi,
                alibi=has_alibi,
                repeats_keys=is_new,
            ),
            ln2=None if between is None else norm(between),
            # A parallel block adds attention's output into the storage of the MLP's output, its last map's output.
            mlp=mlp("mlp", in_="dense_h_to_4h", out="dense_4h_to_h", overwritten=is_parallel),
        )
        return decoder(embed="transformer.word_embeddings", blocks=blocks, ln_final=norm("transformer.ln_f"))
