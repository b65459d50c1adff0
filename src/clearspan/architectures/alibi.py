"""BLOOM and MPT: positions as a bias on attention's scores."""

from collections.abc import Mapping
from typing import ClassVar

from clearspan.architectures.adapter import ArchitectureAdapter, Sizes, entries
from clearspan.architectures.parts import block, decoder, embedding, fused_attention, mlp, norm
from clearspan.components import GeneralizedComponent
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import BlockedQKVConversionRule, GroupedQKVConversionRule


class BloomArchitectureAdapter(ArchitectureAdapter):
    """BLOOM."""

    sizes: ClassVar[Sizes] = entries(n_ctx="seq_length", eps="layer_norm_epsilon")

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        embed_norm = "transformer.word_embeddings_layernorm"
        rule = GroupedQKVConversionRule(cfg.n_heads, cfg.d_head, cfg.n_heads)
        # Attention and MLP add the residual stream themselves: their own contribution is the output of their last map,
        # and hook_resid_mid writes into attention's output.
        attn = fused_attention(
            "self_attention", qkv="query_key_value", o="dense", rule=rule, alibi=True, overwritten=True
        )
        blocks = block(
            "transformer.h",
            ln1=norm("input_layernorm"),
            attn=attn,
            attn_out="self_attention.dense",
            ln2=norm("post_attention_layernorm"),
            mlp=mlp("mlp", in_="dense_h_to_4h", out="dense_4h_to_h"),
            mlp_out="mlp.dense_4h_to_h",
            residual_is_normed=cfg.hf["apply_residual_connection_post_layernorm"],
        )
        return decoder(
            embed=embedding("transformer.word_embeddings", ends_at=embed_norm),
            embed_norm=norm(embed_norm),
            blocks=blocks,
            ln_final=norm("transformer.ln_f"),
        )


class MPTArchitectureAdapter(ArchitectureAdapter):
    """MPT."""

    sizes: ClassVar[Sizes] = entries(n_ctx="max_seq_len", eps="layer_norm_epsilon")
    config_values: Mapping[str, object] = {"has_table": True}

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        rule = BlockedQKVConversionRule(cfg.n_heads, cfg.d_head, cfg.n_heads)
        blocks = block(
            "transformer.blocks",
            ln1=norm("norm_1"),
            attn=fused_attention("attn", qkv="Wqkv", o="out_proj", rule=rule, alibi=True),
            attn_out="resid_attn_dropout",
            ln2=norm("norm_2"),
            mlp=mlp("ffn", in_="up_proj", out="down_proj"),
            mlp_out="ffn.down_proj",
        )
        return decoder(embed="transformer.wte", blocks=blocks, ln_final=norm("transformer.norm_f"))
