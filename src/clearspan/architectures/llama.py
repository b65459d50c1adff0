"""Llama, and families that differ from it only in their parts: norms, fused maps, multipliers, wiring."""

from collections.abc import Mapping
from typing import Any, ClassVar

from clearspan.architectures.decoder import DecoderAdapter
from clearspan.components import (
    AttentionBridge,
    EmbeddingBridge,
    GatedMLPBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    JointGateMLPBridge,
    NormalizationBridge,
    PerLayer,
)
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import BlockedQKVConversionRule
from clearspan.points import Layout


class LlamaArchitectureAdapter(DecoderAdapter):
    """Llama 1 to 3."""

    config_values: ClassVar[dict[str, object]] = {
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "final_rms": True,
        "gated_mlp": True,
        "attn_only": False,
        "uses_rms_norm": True,
        "eps_attr": "rms_norm_eps",
    }
    sizes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "n_ctx": ("max_position_embeddings",),
        "d_head": ("head_dim",),
        "d_mlp": ("intermediate_size",),
        "act_fn": ("hidden_act",),
        "n_key_value_heads": ("num_key_value_heads",),
    }
    embed_name = "model.embed_tokens"
    blocks_name = "model.layers"
    final_norm_name = "model.norm"

    def _parts(self) -> dict[str, GeneralizedComponent]:
        return {
            "ln1": self._norm("input_layernorm"),
            "attn": self._attention(),
            "ln2": self._norm("post_attention_layernorm"),
            "mlp": self._mlp(),
        }

    def _attention(self) -> GeneralAttentionBridge:
        return AttentionBridge(name="self_attn", has_rotary=True, submodules=self._projections())

    def _projections(self) -> dict[str, GeneralizedComponent]:
        """Returns attention's linear maps `q`, `k`, `v`, `o`, and its norms on queries and keys."""
        return {**self._linears(q="q_proj", k="k_proj", v="v_proj", o="o_proj"), **self._head_norms()}

    def _head_norms(self) -> dict[str, GeneralizedComponent]:
        """Returns `q_norm` and `k_norm`, if the family norms queries and keys."""
        return {}

    def _mlp(self) -> GeneralizedComponent:
        return self._gated("mlp")

    def _gated(self, name: str) -> GatedMLPBridge:
        return GatedMLPBridge(name=name, submodules=self._linears(gate="gate_proj", in_="up_proj", out="down_proj"))


class MistralArchitectureAdapter(LlamaArchitectureAdapter):
    """Mistral, with or without a sliding window."""


class Qwen2ArchitectureAdapter(LlamaArchitectureAdapter):
    """Qwen 2 and 2.5."""


class Qwen3ArchitectureAdapter(LlamaArchitectureAdapter):
    """Qwen 3."""

    def _head_norms(self) -> dict[str, GeneralizedComponent]:
        return {
            "q_norm": NormalizationBridge(name="q_norm", axes="batch pos head d_head"),
            "k_norm": NormalizationBridge(name="k_norm", axes="batch pos kv_head d_head"),
        }


class Olmo2ArchitectureAdapter(LlamaArchitectureAdapter):
    """OLMo 2."""

    def _parts(self) -> dict[str, GeneralizedComponent]:
        return {
            "attn": self._attention(),
            "ln1_post": self._norm("post_attention_layernorm"),
            "mlp": self._mlp(),
            "ln2_post": self._norm("post_feedforward_layernorm"),
        }

    def _head_norms(self) -> dict[str, GeneralizedComponent]:
        return {key: NormalizationBridge(name=key, axes="batch pos width") for key in ("q_norm", "k_norm")}


class Gemma2ArchitectureAdapter(LlamaArchitectureAdapter):
    """Gemma 2."""

    sizes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **LlamaArchitectureAdapter.sizes,
        "act_fn": ("hidden_activation",),
    }

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        cfg.output_logits_soft_cap = cfg.hf.get("final_logit_softcapping")

    def _norm(self, name: str) -> NormalizationBridge:
        return NormalizationBridge(name=name, weight_offset=1.0)

    def _parts(self) -> dict[str, GeneralizedComponent]:
        return {
            "ln1": self._norm("input_layernorm"),
            "attn": self._attention(),
            "ln1_post": self._norm("post_attention_layernorm"),
            "ln2": self._norm("pre_feedforward_layernorm"),
            "mlp": self._mlp(),
            "ln2_post": self._norm("post_feedforward_layernorm"),
        }


class Gemma3ArchitectureAdapter(Gemma2ArchitectureAdapter):
    """Gemma 3, its text model."""

    def _head_norms(self) -> dict[str, GeneralizedComponent]:
        heads = {"q_norm": "head", "k_norm": "kv_head"}
        return {
            key: NormalizationBridge(
                name=key, weight_offset=1.0, axes=f"batch pos {head} d_head", layout=Layout.HEADS_FIRST
            )
            for key, head in heads.items()
        }


class Phi3ArchitectureAdapter(LlamaArchitectureAdapter):
    """Phi-3 and Phi-4."""

    uses_combined_qkv = True

    def _wiring(self) -> dict[str, Any]:
        return {"attn_out": "resid_attn_dropout", "mlp_out": "resid_mlp_dropout"}

    def _attention(self) -> GeneralAttentionBridge:
        rule = BlockedQKVConversionRule(self.cfg.n_heads, self.cfg.d_head, self._n_kv_heads())
        return self._joint_attention("self_attn", "qkv_proj", "o_proj", rule, has_rotary=True)

    def _mlp(self) -> GeneralizedComponent:
        return JointGateMLPBridge(name="mlp", submodules=self._linears(gate_up="gate_up_proj", out="down_proj"))


class GraniteArchitectureAdapter(LlamaArchitectureAdapter):
    """Granite 3."""

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        cfg.logit_scale = 1 / cfg.hf["logits_scaling"]

    def _embed(self) -> EmbeddingBridge:
        return EmbeddingBridge(name=self.embed_name, multiplier=self.cfg.hf["embedding_multiplier"])

    def _wiring(self) -> dict[str, Any]:
        return {"residual_multiplier": self.cfg.hf["residual_multiplier"]}


class Cohere2ArchitectureAdapter(LlamaArchitectureAdapter):
    """Command R7B and other Cohere 2 models."""

    config_values: ClassVar[dict[str, object]] = {
        **LlamaArchitectureAdapter.config_values,
        "normalization_type": "LN",
        "uses_rms_norm": False,
        "final_rms": False,
        "eps_attr": "layer_norm_eps",
    }

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        cfg.logit_scale = cfg.hf["logit_scale"]

    def _wiring(self) -> dict[str, Any]:
        return {"is_parallel": True}

    def _parts(self) -> dict[str, GeneralizedComponent]:
        # Only layers with a sliding window rotate queries and keys.
        hf = self.cfg.hf
        slides = [kind == "sliding_attention" and hf["sliding_window"] is not None for kind in hf["layer_types"]]
        attentions = [
            AttentionBridge(name="self_attn", has_rotary=one, submodules=self._projections()) for one in slides
        ]
        return {"ln1": self._norm("input_layernorm"), "attn": PerLayer(attentions), "mlp": self._mlp()}
