"""Mixtures of experts on the frame of Llama: Mixtral, Qwen 3 MoE, GPT-OSS, DeepSeek V3."""

from collections.abc import Mapping
from typing import ClassVar

from clearspan.architectures.decoder import SPLIT_EVENLY
from clearspan.architectures.llama import LlamaArchitectureAdapter, Qwen3ArchitectureAdapter
from clearspan.components import (
    AttentionBridge,
    ExpertsBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    LatentAttentionBridge,
    LinearBridge,
    MoEBridge,
    NormalizationBridge,
    PerLayer,
    RouterBridge,
)
from clearspan.points import Layout


def mixture(
    router: str = "gate", shared: GeneralizedComponent | None = None, *, is_transposed: bool = False
) -> MoEBridge:
    """Returns the template of a mixture of experts.

    Args:
        router: Name of its router's module.
        shared: The experts that see every token, if there are any.
        is_transposed: Whether the experts' weights are `[expert, in, out]`.
    """
    parts: dict[str, GeneralizedComponent] = {
        "router": RouterBridge(name=router),
        "experts": ExpertsBridge(name="experts", is_transposed=is_transposed),
    }
    return MoEBridge(name="mlp", submodules=parts if shared is None else {**parts, "shared": shared})


class MixtralArchitectureAdapter(LlamaArchitectureAdapter):
    """Mixtral."""

    def _mlp(self) -> GeneralizedComponent:
        return mixture()


class Qwen3MoeArchitectureAdapter(Qwen3ArchitectureAdapter):
    """Qwen 3 with experts."""

    def _mlp(self) -> GeneralizedComponent:
        hf = self.cfg.hf

        def is_sparse(layer: int) -> bool:
            chosen = (layer + 1) % hf["decoder_sparse_step"] == 0
            return hf["num_experts"] > 0 and chosen and layer not in hf["mlp_only_layers"]

        layers = range(self.cfg.n_layers)
        return PerLayer([mixture() if is_sparse(layer) else self._gated("mlp") for layer in layers])


class GptOssArchitectureAdapter(LlamaArchitectureAdapter):
    """GPT-OSS."""

    # Its experts have a gate of their own, whatever `hidden_act` says.
    sizes: ClassVar[Mapping[str, tuple[str, ...]]] = {**LlamaArchitectureAdapter.sizes, "act_fn": ()}

    def _attention(self) -> GeneralAttentionBridge:
        return AttentionBridge(name="self_attn", has_rotary=True, has_sinks=True, submodules=self._projections())

    def _mlp(self) -> GeneralizedComponent:
        return mixture(router="router", is_transposed=True)


class DeepseekV3ArchitectureAdapter(LlamaArchitectureAdapter):
    """DeepSeek V3 and R1."""

    # Each query head has a key and a value of its own, made of the latent one.
    sizes: ClassVar[Mapping[str, tuple[str, ...]]] = {**LlamaArchitectureAdapter.sizes, **SPLIT_EVENLY}

    def _attention(self) -> GeneralAttentionBridge:
        hf = self.cfg.hf
        self.cfg.d_head = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]
        return LatentAttentionBridge(
            name="self_attn",
            submodules={
                **self._queries(),
                **self._linears(kv_a="kv_a_proj_with_mqa", o="o_proj"),
                "kv_a_norm": NormalizationBridge(name="kv_a_layernorm", axes="batch pos width"),
                "kv_b": LinearBridge(name="kv_b_proj", layout=Layout.HEADS_FIRST),
            },
            d_head_nope=hf["qk_nope_head_dim"],
            d_head_rope=hf["qk_rope_head_dim"],
            d_head_v=hf["v_head_dim"],
        )

    def _queries(self) -> dict[str, GeneralizedComponent]:
        if self.cfg.hf["q_lora_rank"] is None:
            return self._linears(q="q_proj")
        norm = NormalizationBridge(name="q_a_layernorm", axes="batch pos width")
        return {**self._linears(q_a="q_a_proj", q_b="q_b_proj"), "q_a_norm": norm}

    def _mlp(self) -> GeneralizedComponent:
        dense = self.cfg.hf["first_k_dense_replace"]
        experts = mixture(shared=self._gated("shared_experts"))
        return PerLayer([self._gated("mlp") if layer < dense else experts for layer in range(self.cfg.n_layers)])
