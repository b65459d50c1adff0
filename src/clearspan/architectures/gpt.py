"""GPT-2, GPT-J and GPT-NeoX (Pythia)."""

from collections.abc import Mapping
from typing import ClassVar

from clearspan.architectures.adapter import ArchitectureAdapter, Sizes, entries
from clearspan.architectures.parts import attention, block, decoder, fused_attention, linear, mlp, norm
from clearspan.components import BlockBridge, GeneralizedComponent, JointQKVAttentionBridge, MLPBridge
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import BlockedQKVConversionRule, GroupedQKVConversionRule

GPT_SIZES = entries(
    n_ctx="max_position_embeddings", eps="layer_norm_epsilon", act_fn="activation_function", d_mlp="n_inner"
)
"""`sizes` of GPT-2 and of what was written after it."""


def gpt2(attn: JointQKVAttentionBridge, mlp: MLPBridge) -> Mapping[str, GeneralizedComponent]:
    """Returns the mapping of GPT-2 with other sublayers."""
    return decoder(
        embed="transformer.wte",
        pos_embed="transformer.wpe",
        blocks=block("transformer.h", ln1=norm("ln_1"), attn=attn, ln2=norm("ln_2"), mlp=mlp),
        ln_final=norm("transformer.ln_f"),
    )


class GPT2ArchitectureAdapter(ArchitectureAdapter):
    """GPT-2."""

    sizes: ClassVar[Sizes] = GPT_SIZES

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        rule = BlockedQKVConversionRule(cfg.n_heads, cfg.d_head, cfg.n_heads)
        qkv, o, inward, outward = (linear(name, transposed=True) for name in ("c_attn", "c_proj", "c_fc", "c_proj"))
        return gpt2(fused_attention("attn", qkv=qkv, o=o, rule=rule), mlp("mlp", in_=inward, out=outward))


class GPTJArchitectureAdapter(ArchitectureAdapter):
    """GPT-J."""

    sizes: ClassVar[Sizes] = GPT_SIZES
    config_values: Mapping[str, object] = {"has_table": True}
    irrelevant: Mapping[str, str] = {"*.embed_positions": "sines and cosines of the rotation, which the config fixes"}

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        blocks = block(
            "transformer.h",
            parallel=True,
            ln1=norm("ln_1"),
            attn=attention("attn", q="q_proj", k="k_proj", v="v_proj", o="out_proj", rotary=True),
            mlp=mlp("mlp", in_="fc_in", out="fc_out"),
        )
        return decoder(embed="transformer.wte", blocks=blocks, ln_final=norm("transformer.ln_f"))


class GPTNeoXArchitectureAdapter(ArchitectureAdapter):
    """GPT-NeoX (Pythia)."""

    sizes: ClassVar[Sizes] = entries(
        n_ctx="max_position_embeddings", eps="layer_norm_eps", act_fn="hidden_act", d_mlp="intermediate_size"
    )

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        return decoder(embed="gpt_neox.embed_in", blocks=self.blocks(cfg), ln_final=norm("gpt_neox.final_layer_norm"))

    def blocks(self, cfg: TransformerBridgeConfig) -> BlockBridge:
        """Returns the blocks."""
        rule = GroupedQKVConversionRule(cfg.n_heads, cfg.d_head, cfg.n_heads)
        return block(
            "gpt_neox.layers",
            parallel=cfg.hf["use_parallel_residual"],
            ln1=norm("input_layernorm"),
            attn=fused_attention("attention", qkv="query_key_value", o="dense", rule=rule, rotary=True),
            attn_out="post_attention_dropout",
            ln2=norm("post_attention_layernorm"),
            mlp=mlp("mlp", in_="dense_h_to_4h", out="dense_4h_to_h"),
            mlp_out="post_mlp_dropout",
        )
