"""Tiny random models whose blocks are not attention and then an MLP, with adapters that show mixers as opaque parts."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import clearspan
from clearspan.architectures import ADAPTERS, ArchitectureAdapter
from clearspan.architectures.adapter import Sizes
from clearspan.architectures.llama import LLAMA_SIZES, gated, rms, self_attention
from clearspan.architectures.parts import (
    WIDTH,
    attention,
    decoder,
    embedding,
    fused_gated_mlp,
    linear,
    mlp,
    unembedding,
)
from clearspan.components import (
    BlockBridge,
    EmbeddingBridge,
    GeneralizedComponent,
    LatentAttentionBridge,
    LinearBridge,
    NormalizationBridge,
    OpaqueBridge,
    PerLayer,
    UnembeddingBridge,
)
from clearspan.config import TransformerBridgeConfig
from clearspan.points import HookPoint

Parts = dict[str, GeneralizedComponent]
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    **IDS,
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}


class HybridAdapter(ArchitectureAdapter):
    """A decoder whose blocks are made by `_block`, layer by layer."""

    sizes: ClassVar[Sizes] = LLAMA_SIZES
    embed_name: ClassVar[str] = "model.embed_tokens"
    blocks_name: ClassVar[str] = "model.layers"
    final_norm_name: ClassVar[str] = "model.norm"

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        return decoder(
            embed=self._embed(),
            blocks=PerLayer([self._block(layer) for layer in range(cfg.n_layers)]),
            ln_final=self._norm(self.final_norm_name),
            unembed=self._unembed(),
        )

    def _embed(self) -> EmbeddingBridge:
        return embedding(self.embed_name)

    def _unembed(self) -> UnembeddingBridge:
        return unembedding("lm_head")

    def _norm(self, name: str) -> NormalizationBridge:
        return rms(name)

    def _block(self, layer: int) -> BlockBridge:
        raise NotImplementedError


class MambaAdapter(HybridAdapter):
    """Mamba: a mixer alone in each block."""

    sizes: ClassVar[Sizes] = {**LLAMA_SIZES, "eps": ("layer_norm_epsilon",), "act_fn": ()}
    embed_name = "backbone.embeddings"
    blocks_name = "backbone.layers"
    final_norm_name = "backbone.norm_f"

    def _block(self, layer: int) -> BlockBridge:
        parts = {"ln1": self._norm("norm"), "mixer": OpaqueBridge(name="mixer")}
        return BlockBridge(name=self.blocks_name, stages=(("mixer",),), submodules=parts)


class JambaAdapter(HybridAdapter):
    """Jamba: attention in some layers and Mamba in the others, and mixtures in some."""

    final_norm_name = "model.final_layernorm"

    def _block(self, layer: int) -> BlockBridge:
        hf = self.cfg.hf
        has_attention = layer % hf["attn_layer_period"] == hf["attn_layer_offset"]
        mixing = {"attn": self_attention(rotary=False)} if has_attention else {"mixer": OpaqueBridge(name="mamba")}
        is_mixture = layer % hf["expert_layer_period"] == hf["expert_layer_offset"]
        return BlockBridge(
            name=self.blocks_name,
            stages=((*mixing,), ("mlp",)),
            submodules={
                "ln1": self._norm("input_layernorm"),
                **mixing,
                "ln2": self._norm("pre_ff_layernorm"),
                "mlp": OpaqueBridge(name="feed_forward") if is_mixture else gated("feed_forward"),
            },
        )


class FalconH1Adapter(HybridAdapter):
    """Falcon-H1: attention and Mamba read the same stream, then an MLP; with multipliers."""

    final_norm_name = "model.final_layernorm"

    def _block(self, layer: int) -> BlockBridge:
        hf = self.cfg.hf
        return BlockBridge(
            name=self.blocks_name,
            stages=(("mixer", "attn"), ("mlp",)),
            residual_multiplier={"mixer": hf["ssm_out_multiplier"], "attn": hf["attention_out_multiplier"]},
            input_multipliers={"attn": hf["attention_in_multiplier"]},
            submodules={
                "ln1": self._norm("input_layernorm"),
                "mixer": OpaqueBridge(name="mamba"),
                "attn": self_attention(),
                "ln2": self._norm("pre_ff_layernorm"),
                "mlp": gated("feed_forward"),
            },
        )


class NemotronHAdapter(HybridAdapter):
    """Nemotron-H: each block is a mixer, attention, an MLP or a mixture alone."""

    sizes: ClassVar[Sizes] = {**LLAMA_SIZES, "eps": ("layer_norm_epsilon",), "act_fn": ("mlp_hidden_act",)}
    embed_name = "model.embeddings"
    final_norm_name = "model.norm_f"

    def _block(self, layer: int) -> BlockBridge:
        kinds: dict[str, Parts] = {
            "full_attention": {"attn": attention("mixer", q="q_proj", k="k_proj", v="v_proj", o="o_proj")},
            "linear_attention": {"mixer": OpaqueBridge(name="mixer")},
            "mlp": {"mlp": mlp("mixer", in_="up_proj", out="down_proj")},
            "moe": {"moe": OpaqueBridge(name="mixer")},
        }
        parts = kinds[self.cfg.hf["layers_block_type"][layer]]
        submodules = {"ln1": self._norm("norm"), **parts}
        return BlockBridge(name=self.blocks_name, stages=((*parts,),), submodules=submodules)


class Qwen3NextAdapter(HybridAdapter):
    """Qwen3-Next: a gated delta net in most layers, gated attention in the others."""

    def _norm(self, name: str) -> NormalizationBridge:
        return rms(name, offset=1.0)

    def _block(self, layer: int) -> BlockBridge:
        is_linear = self.cfg.hf["layer_types"][layer] == "linear_attention"
        mixing = {
            "mixer": OpaqueBridge(name="linear_attn" if is_linear else "self_attn")
        }  # gated attention has no adapter here
        return BlockBridge(
            name=self.blocks_name,
            stages=(("mixer",), ("mlp",)),
            submodules={
                "ln1": self._norm("input_layernorm"),
                **mixing,
                "ln2": self._norm("post_attention_layernorm"),
                "mlp": OpaqueBridge(name="mlp"),
            },
        )


class GraniteHybridAdapter(HybridAdapter):
    """Granite-MoE-hybrid: attention in some layers and Mamba in the others; a mixture and an MLP side by side."""

    def _embed(self) -> EmbeddingBridge:
        return embedding(self.embed_name, multiplier=self.cfg.hf["embedding_multiplier"])

    def _unembed(self) -> UnembeddingBridge:
        return unembedding("lm_head", scale=1 / self.cfg.hf["logits_scaling"])

    def _block(self, layer: int) -> BlockBridge:
        has_attention = self.cfg.hf["layer_types"][layer] == "full_attention"
        mixing = {"attn": self_attention(rotary=False)} if has_attention else {"mixer": OpaqueBridge(name="mamba")}
        shared = fused_gated_mlp("shared_mlp", gate_up="input_linear", out="output_linear")
        return BlockBridge(
            name=self.blocks_name,
            stages=((*mixing,), ("moe", "mlp")),
            residual_multiplier=self.cfg.hf["residual_multiplier"],
            submodules={
                "ln1": self._norm("input_layernorm"),
                **mixing,
                "ln2": self._norm("post_attention_layernorm"),
                "moe": OpaqueBridge(name="block_sparse_moe"),
                "mlp": shared,
            },
        )


class Expansion(LinearBridge):
    """The up-projection of latents, whose ends have rows and positions in other axes."""

    def raw_ends(self) -> Iterator[HookPoint]:
        return iter(())


class ExpandedAttention(LatentAttentionBridge):
    """Latent attention whose keys and values are expanded from a tensor of another layout: it shows no values."""

    def _projection_points(self) -> Iterator[HookPoint]:
        yield self.point("hook_q", *self.projected("q"), dimensions=self._query_axes)

    def absences(self) -> Iterator[tuple[str, str]]:
        yield from super().absences()
        yield f"{self.path}.hook_v", "values are expanded from latents"


class LongcatAdapter(HybridAdapter):
    """LongCat-Flash: two attentions and two MLPs in turn, and a mixture beside the second half."""

    sizes: ClassVar[Sizes] = {
        **LLAMA_SIZES,
        "n_layers": ("num_layers",),  # transformers counts the attentions, of which each block has two
        "d_mlp": ("ffn_hidden_size",),
    }

    def _latent(self, name: str) -> LatentAttentionBridge:
        hf = self.cfg.hf
        names = {"q_a": "q_a_proj", "q_b": "q_b_proj", "kv_a": "kv_a_proj_with_mqa", "o": "o_proj"}
        linears: Parts = {key: linear(path) for key, path in names.items()}
        norms: Parts = {key: rms(f"{key[:-5]}_layernorm", axes=WIDTH) for key in ("q_a_norm", "kv_a_norm")}
        linears["kv_b"] = Expansion(name="kv_b_proj")
        return ExpandedAttention(
            name=name,
            d_head_nope=hf["qk_nope_head_dim"],
            d_head_rope=hf["qk_rope_head_dim"],
            d_head_v=hf["v_head_dim"],
            submodules={**linears, **norms},
        )

    def _block(self, layer: int) -> BlockBridge:
        return BlockBridge(
            name=self.blocks_name,
            stages=(("attn",), ("moe", "mlp"), ("attn2",), ("mlp2",)),
            added_with={"moe": "mlp2"},
            submodules={
                "ln1": self._norm("input_layernorm.0"),
                "attn": self._latent("self_attn.0"),
                "ln2": self._norm("post_attention_layernorm.0"),
                "moe": OpaqueBridge(name="mlp"),
                "mlp": gated("mlps.0"),
                "ln3": self._norm("input_layernorm.1"),
                "attn2": self._latent("self_attn.1"),
                "ln4": self._norm("post_attention_layernorm.1"),
                "mlp2": gated("mlps.1"),
            },
        )


class MiniMaxAdapter(HybridAdapter):
    """MiniMax: the stream takes the norm's output and is multiplied, as is each contribution."""

    def _block(self, layer: int) -> BlockBridge:
        hf = self.cfg.hf
        is_linear = hf["layer_types"][layer] == "linear_attention"
        kind, name = ("linear_attn", "mixer") if is_linear else ("full_attn", "attn")
        mixing: Parts = {"mixer": OpaqueBridge(name="self_attn")} if is_linear else {"attn": self_attention()}
        return BlockBridge(
            name=self.blocks_name,
            stages=((*mixing,), ("mlp",)),
            residual_is_normed=True,
            residual_multiplier={name: hf[f"{kind}_beta_factor"], "mlp": hf["mlp_beta_factor"]},
            stream_multiplier=(hf[f"{kind}_alpha_factor"], hf["mlp_alpha_factor"]),
            submodules={
                "ln1": self._norm("input_layernorm"),
                **mixing,
                "ln2": self._norm("post_attention_layernorm"),
                "mlp": OpaqueBridge(name="mlp"),
            },
        )


class DogeAdapter(HybridAdapter):
    """Doge: before each sublayer is added, the stream is multiplied by a parameter. Its attention is not shown here."""

    def _block(self, layer: int) -> BlockBridge:
        return BlockBridge(
            name=self.blocks_name,
            stages=(("mixer",), ("mlp",)),
            stream_multiplier=("input_residual", "post_attention_residual"),
            submodules={
                "ln1": self._norm("input_layernorm"),
                "mixer": OpaqueBridge(name="self_attn"),
                "ln2": self._norm("post_attention_layernorm"),
                "mlp": gated("mlp"),
            },
        )


_MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 24,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
HYBRIDS: dict[str, tuple[str, type[HybridAdapter], dict[str, Any]]] = {
    "mamba": (
        "Mamba",
        MambaAdapter,
        {**IDS, "vocab_size": 97, "hidden_size": 48, "state_size": 8, "num_hidden_layers": 3},
    ),
    "jamba": (
        "Jamba",
        JambaAdapter,
        {
            **SIZES,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 6,
        },
    ),
    "falcon_h1": (
        "FalconH1",
        FalconH1Adapter,
        {
            **SIZES,
            **_MAMBA2,
            "mamba_d_ssm": 96,
            "num_hidden_layers": 2,
            "ssm_out_multiplier": 0.7,
            "attention_out_multiplier": 1.3,
            "attention_in_multiplier": 0.8,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        NemotronHAdapter,
        {
            **SIZES,
            "head_dim": 12,
            "layers_block_type": ["mamba", "attention", "mlp", "moe", "attention"],
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 24,
            "n_groups": 1,
            "chunk_size": 4,
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        Qwen3NextAdapter,
        {
            **SIZES,
            "head_dim": 12,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [1],
            "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        GraniteHybridAdapter,
        {
            **SIZES,
            **_MAMBA2,
            "mamba_expand": 2,
            "num_local_experts": 4,
            "shared_intermediate_size": 40,
            "residual_multiplier": 0.3,
            "embedding_multiplier": 2.0,
            "logits_scaling": 0.5,
            "attention_multiplier": 0.3,
            "layer_types": ["mamba", "attention", "mamba", "attention"],
        },
    ),
    "longcat_flash": (
        "LongcatFlash",
        LongcatAdapter,
        {
            **IDS,
            "vocab_size": 97,
            "hidden_size": 48,
            "num_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "ffn_hidden_size": 80,
            "q_lora_rank": 20,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "head_dim": 8,
            "v_head_dim": 10,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "expert_ffn_hidden_size": 24,
        },
    ),
    "minimax": (
        "MiniMax",
        MiniMaxAdapter,
        {
            **SIZES,
            "head_dim": 12,
            "num_local_experts": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
            "linear_attn_alpha_factor": 0.9,
            "linear_attn_beta_factor": 1.2,
            "full_attn_alpha_factor": 0.8,
            "full_attn_beta_factor": 1.1,
            "mlp_alpha_factor": 0.7,
            "mlp_beta_factor": 1.3,
        },
    ),
}

HYBRIDS["doge"] = ("Doge", DogeAdapter, {**SIZES, "num_hidden_layers": 2})


def hybrid_model(name: str, **settings: Any) -> PreTrainedModel:
    """Returns a tiny random model of a kind, in eval mode."""
    family, _, sizes = HYBRIDS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**sizes, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for path, parameter in model.named_parameters():
        if path.endswith(("norm.weight", "layernorm.weight", "norm_f.weight", "_residual")) or ".layernorm." in path:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)  # freshly made ones are 1, which hides what they do
    return model


def hybrid(name: str, model: PreTrainedModel | None = None, **settings: Any) -> clearspan.TransformerBridge:
    """Returns a bridge to a tiny random model of a kind."""
    model = hybrid_model(name, **settings) if model is None else model
    kind = type(model).__name__
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ADAPTERS, kind, HYBRIDS[name][1])
        return clearspan.boot(model)
