"""Llama, and the families that differ from it in their parts alone: norms, gates, multipliers, experts."""

from typing import ClassVar

from clearspan.architectures.base import ArchitectureAdapter
from clearspan.components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    GatedMLPBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    JointGateMLPBridge,
    JointQKVAttentionBridge,
    LinearBridge,
    NormalizationBridge,
    PerLayer,
    UnembeddingBridge,
)
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import BlockedQKVConversionRule
from clearspan.points import Layout


class LlamaArchitectureAdapter(ArchitectureAdapter):
    """Llama 1 to 3.

    Subclasses override the parts in which their family differs.
    """

    config_values: ClassVar[dict[str, object]] = {
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "final_rms": True,
        "gated_mlp": True,
        "attn_only": False,
        "uses_rms_norm": True,
        "eps_attr": "rms_norm_eps",
    }

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        cfg.n_key_value_heads = cfg.n_key_value_heads or cfg.n_heads
        self.weight_processing_conversions = self._qkvo_weight_conversions(n_kv_heads=cfg.n_key_value_heads)
        self.component_mapping = {
            "embed": self._embed(),
            "blocks": self._block(),
            "ln_final": self._norm("model.norm"),
            "unembed": UnembeddingBridge(name="lm_head"),
        }

    def _embed(self) -> EmbeddingBridge:
        return EmbeddingBridge(name="model.embed_tokens")

    def _block(self) -> BlockBridge:
        return BlockBridge(name="model.layers", submodules=self._parts())

    def _parts(self) -> dict[str, GeneralizedComponent]:
        return {
            "ln1": self._norm("input_layernorm"),
            "attn": self._attention(),
            "ln2": self._norm("post_attention_layernorm"),
            "mlp": self._mlp(),
        }

    def _norm(self, name: str, axes: str = "batch pos d_model") -> NormalizationBridge:
        return NormalizationBridge(name=name, axes=axes)

    def _attention(self) -> GeneralAttentionBridge:
        return AttentionBridge(name="self_attn", has_rotary=True, submodules=self._projections())

    def _projections(self) -> dict[str, GeneralizedComponent]:
        return {key: LinearBridge(name=f"{key}_proj") for key in ("q", "k", "v", "o")}

    def _mlp(self) -> GeneralizedComponent:
        return self._gated("mlp")

    def _gated(self, name: str) -> GatedMLPBridge:
        names = {"gate": "gate_proj", "in": "up_proj", "out": "down_proj"}
        return GatedMLPBridge(name=name, submodules={key: LinearBridge(name=own) for key, own in names.items()})


class MistralArchitectureAdapter(LlamaArchitectureAdapter):
    """Mistral, with or without a sliding window."""


class Qwen2ArchitectureAdapter(LlamaArchitectureAdapter):
    """Qwen 2 and 2.5."""


class Qwen3ArchitectureAdapter(LlamaArchitectureAdapter):
    """Qwen 3."""

    def _projections(self) -> dict[str, GeneralizedComponent]:
        return {
            **super()._projections(),
            "q_norm": self._norm("q_norm", "batch pos head d_head"),
            "k_norm": self._norm("k_norm", "batch pos kv_head d_head"),
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

    def _projections(self) -> dict[str, GeneralizedComponent]:
        return {
            **super()._projections(),
            "q_norm": self._norm("q_norm", "batch pos width"),
            "k_norm": self._norm("k_norm", "batch pos width"),
        }


class GemmaArchitectureAdapter(LlamaArchitectureAdapter):
    """Gemma 2."""

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        cfg.output_logits_soft_cap = cfg.hf.get("final_logit_softcapping")

    def _norm(self, name: str, axes: str = "batch pos d_model", layout: Layout = Layout.TOKENS) -> NormalizationBridge:
        return NormalizationBridge(name=name, weight_offset=1.0, axes=axes, layout=layout)

    def _parts(self) -> dict[str, GeneralizedComponent]:
        return {
            "ln1": self._norm("input_layernorm"),
            "attn": self._attention(),
            "ln1_post": self._norm("post_attention_layernorm"),
            "ln2": self._norm("pre_feedforward_layernorm"),
            "mlp": self._mlp(),
            "ln2_post": self._norm("post_feedforward_layernorm"),
        }


class Gemma3ArchitectureAdapter(GemmaArchitectureAdapter):
    """Gemma 3, its text model."""

    def _projections(self) -> dict[str, GeneralizedComponent]:
        return {
            **super()._projections(),
            "q_norm": self._norm("q_norm", "batch pos head d_head", Layout.HEADS_FIRST),
            "k_norm": self._norm("k_norm", "batch pos kv_head d_head", Layout.HEADS_FIRST),
        }


class Phi3ArchitectureAdapter(LlamaArchitectureAdapter):
    """Phi-3 and Phi-4."""

    uses_combined_qkv = True

    def _block(self) -> BlockBridge:
        return BlockBridge(
            name="model.layers", submodules=self._parts(), attn_out="resid_attn_dropout", mlp_out="resid_mlp_dropout"
        )

    def _attention(self) -> GeneralAttentionBridge:
        cfg = self.cfg
        return JointQKVAttentionBridge(
            name="self_attn",
            has_rotary=True,
            qkv_conversion_rule=BlockedQKVConversionRule(cfg.n_heads, cfg.d_head, cfg.n_key_value_heads or cfg.n_heads),
            submodules={"qkv": LinearBridge(name="qkv_proj"), "o": LinearBridge(name="o_proj")},
        )

    def _mlp(self) -> GeneralizedComponent:
        return JointGateMLPBridge(
            name="mlp",
            submodules={"gate_up": LinearBridge(name="gate_up_proj"), "out": LinearBridge(name="down_proj")},
        )


class GraniteArchitectureAdapter(LlamaArchitectureAdapter):
    """Granite 3."""

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        cfg.logit_scale = 1 / cfg.hf["logits_scaling"]

    def _embed(self) -> EmbeddingBridge:
        return EmbeddingBridge(name="model.embed_tokens", multiplier=self.cfg.hf["embedding_multiplier"])

    def _block(self) -> BlockBridge:
        return BlockBridge(
            name="model.layers", submodules=self._parts(), residual_multiplier=self.cfg.hf["residual_multiplier"]
        )


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

    def _block(self) -> BlockBridge:
        return BlockBridge(name="model.layers", submodules=self._parts(), is_parallel=True)

    def _parts(self) -> dict[str, GeneralizedComponent]:
        # Only layers with a sliding window rotate queries and keys.
        attentions = [
            AttentionBridge(name="self_attn", has_rotary=kind == "sliding_attention", submodules=self._projections())
            for kind in self.cfg.hf["layer_types"]
        ]
        return {"ln1": self._norm("input_layernorm"), "attn": PerLayer(attentions), "mlp": self._mlp()}
