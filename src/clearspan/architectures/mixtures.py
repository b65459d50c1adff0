"""Mixtures of experts on the frame of Llama: Mixtral, Qwen 3 MoE, GPT-OSS, DeepSeek V3."""

from collections.abc import Mapping
from typing import ClassVar

from clearspan.architectures.adapter import ArchitectureAdapter, Sizes
from clearspan.architectures.llama import (
    LLAMA_SIZES,
    gated,
    llama,
    pre_norm,
    qwen3_attention,
    rms,
    self_attention,
)
from clearspan.architectures.parts import WIDTH, latent_attention, linear, mixture
from clearspan.components import GeneralizedComponent, LatentAttentionBridge, PerLayer
from clearspan.config import TransformerBridgeConfig
from clearspan.points import Layout


class MixtralArchitectureAdapter(ArchitectureAdapter):
    """Mixtral."""

    sizes: ClassVar[Sizes] = LLAMA_SIZES

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        return llama(pre_norm(self_attention(), mixture("mlp", router="gate")))


class Qwen3MoeArchitectureAdapter(ArchitectureAdapter):
    """Qwen 3 with experts."""

    sizes: ClassVar[Sizes] = LLAMA_SIZES

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        hf = cfg.hf

        def is_sparse(layer: int) -> bool:
            chosen = (layer + 1) % hf["decoder_sparse_step"] == 0
            return hf["num_experts"] > 0 and chosen and layer not in hf["mlp_only_layers"]

        sparse = mixture("mlp", router="gate")
        mlps = [sparse if is_sparse(layer) else gated() for layer in range(cfg.n_layers)]
        return llama(pre_norm(qwen3_attention(), PerLayer(mlps)))


class GptOssArchitectureAdapter(ArchitectureAdapter):
    """GPT-OSS."""

    # Its experts have a gate of their own, whatever `hidden_act` says.
    sizes: ClassVar[Sizes] = {**LLAMA_SIZES, "act_fn": ()}

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        return llama(pre_norm(self_attention(sinks=True), mixture("mlp", router="router", transposed=True)))


class DeepseekV3ArchitectureAdapter(ArchitectureAdapter):
    """DeepSeek V3 and R1."""

    # Each query head has a key and a value of its own, made of the latent one.
    sizes: ClassVar[Sizes] = {**LLAMA_SIZES, "d_head": (), "n_key_value_heads": ()}

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        dense, experts = cfg.hf["first_k_dense_replace"], mixture("mlp", router="gate", shared=gated("shared_experts"))
        mlps = PerLayer([gated() if layer < dense else experts for layer in range(cfg.n_layers)])
        return llama(pre_norm(self.attention(cfg), mlps))

    def attention(self, cfg: TransformerBridgeConfig) -> LatentAttentionBridge:
        """Returns attention, whose queries have a latent of their own or none."""
        hf = cfg.hf
        is_low_rank = hf["q_lora_rank"] is not None
        return latent_attention(
            "self_attn",
            q=None if is_low_rank else "q_proj",
            q_a="q_a_proj" if is_low_rank else None,
            q_a_norm=rms("q_a_layernorm", axes=WIDTH) if is_low_rank else None,
            q_b="q_b_proj" if is_low_rank else None,
            kv_a="kv_a_proj_with_mqa",
            kv_a_norm=rms("kv_a_layernorm", axes=WIDTH),
            kv_b=linear("kv_b_proj", layout=Layout.HEADS_FIRST),
            o="o_proj",
            d_head_nope=hf["qk_nope_head_dim"],
            d_head_rope=hf["qk_rope_head_dim"],
            d_head_v=hf["v_head_dim"],
        )
