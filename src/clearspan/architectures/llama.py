"""Llama, and families that differ from it only in their parts: norms, fused maps, multipliers, wiring."""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

from clearspan.architectures.adapter import ArchitectureAdapter, Sizes, entries
from clearspan.architectures.parts import (
    HEADS,
    KV_HEADS,
    WIDTH,
    attention,
    block,
    decoder,
    embedding,
    fused_attention,
    fused_gated_mlp,
    gated_mlp,
    norm,
    unembedding,
)
from clearspan.components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    GatedMLPBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    NormalizationBridge,
    PerLayer,
    UnembeddingBridge,
)
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import BlockedQKVConversionRule
from clearspan.points import Layout

LLAMA_SIZES = entries(
    n_ctx="max_position_embeddings",
    eps="rms_norm_eps",
    act_fn="hidden_act",
    d_mlp="intermediate_size",
    d_head="head_dim",
    n_key_value_heads="num_key_value_heads",
)
"""`sizes` of Llama and of what was written after it."""
LAYERS = "model.layers"
EMBEDDING = "model.embed_tokens"

rms = partial(norm, rms=True)


def self_attention(
    *,
    q_norm: NormalizationBridge | None = None,
    k_norm: NormalizationBridge | None = None,
    v_norm: NormalizationBridge | None = None,
    rotary: bool = True,
    sinks: bool = False,
) -> AttentionBridge:
    """Returns attention by Llama's names, with or without norms of queries, keys and values."""
    return attention(
        "self_attn",
        q="q_proj",
        k="k_proj",
        v="v_proj",
        o="o_proj",
        q_norm=q_norm,
        k_norm=k_norm,
        v_norm=v_norm,
        rotary=rotary,
        sinks=sinks,
    )


def qwen3_attention() -> AttentionBridge:
    """Returns attention that norms queries and keys by head."""
    return self_attention(q_norm=rms("q_norm", axes=HEADS), k_norm=rms("k_norm", axes=KV_HEADS))


def gated(name: str = "mlp") -> GatedMLPBridge:
    """Returns a gated MLP by Llama's names."""
    return gated_mlp(name, gate="gate_proj", in_="up_proj", out="down_proj")


def pre_norm(
    attn: GeneralizedComponent,
    mlp: GeneralizedComponent,
    *,
    attn_out: str | None = None,
    mlp_out: str | None = None,
    residual_multiplier: float = 1.0,
) -> BlockBridge:
    """Returns blocks with an RMS norm before each sublayer."""
    return block(
        LAYERS,
        ln1=rms("input_layernorm"),
        attn=attn,
        attn_out=attn_out,
        ln2=rms("post_attention_layernorm"),
        mlp=mlp,
        mlp_out=mlp_out,
        residual_multiplier=residual_multiplier,
    )


def llama(
    blocks: BlockBridge,
    *,
    embed: str | EmbeddingBridge = EMBEDDING,
    ln_final: NormalizationBridge | None = None,
    unembed: str | UnembeddingBridge = "lm_head",
) -> Mapping[str, GeneralizedComponent]:
    """Returns the mapping of Llama with other blocks, and other parts around them."""
    return decoder(embed=embed, blocks=blocks, ln_final=ln_final or rms("model.norm"), unembed=unembed)


class LlamaArchitectureAdapter(ArchitectureAdapter):
    """Llama 1 to 3."""

    sizes: ClassVar[Sizes] = LLAMA_SIZES

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        return llama(pre_norm(self_attention(), gated()))


class MistralArchitectureAdapter(LlamaArchitectureAdapter):
    """Mistral, with or without a sliding window."""


class Qwen2ArchitectureAdapter(LlamaArchitectureAdapter):
    """Qwen 2 and 2.5."""


class Qwen3ArchitectureAdapter(ArchitectureAdapter):
    """Qwen 3."""

    sizes: ClassVar[Sizes] = LLAMA_SIZES

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        return llama(pre_norm(qwen3_attention(), gated()))


class Olmo2ArchitectureAdapter(ArchitectureAdapter):
    """OLMo 2."""

    sizes: ClassVar[Sizes] = LLAMA_SIZES

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        attn = self_attention(q_norm=rms("q_norm", axes=WIDTH), k_norm=rms("k_norm", axes=WIDTH))
        after = rms("post_attention_layernorm"), rms("post_feedforward_layernorm")
        return llama(block(LAYERS, attn=attn, ln1_post=after[0], mlp=gated(), ln2_post=after[1]))


gemma_norm = partial(norm, rms=True, offset=1.0)


def gemma(cfg: TransformerBridgeConfig, attn: GeneralAttentionBridge) -> Mapping[str, GeneralizedComponent]:
    """Returns the mapping of Gemma 2 with other attention: norms before and after each sublayer, capped logits."""
    blocks = block(
        LAYERS,
        ln1=gemma_norm("input_layernorm"),
        attn=attn,
        ln1_post=gemma_norm("post_attention_layernorm"),
        ln2=gemma_norm("pre_feedforward_layernorm"),
        mlp=gated(),
        ln2_post=gemma_norm("post_feedforward_layernorm"),
    )
    unembed = unembedding("lm_head", softcap=cfg.hf.get("final_logit_softcapping"))
    return llama(blocks, ln_final=gemma_norm("model.norm"), unembed=unembed)


class Gemma2ArchitectureAdapter(ArchitectureAdapter):
    """Gemma 2."""

    sizes: ClassVar[Sizes] = {**LLAMA_SIZES, "act_fn": ("hidden_activation",)}

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        return gemma(cfg, self_attention())


class Gemma3ArchitectureAdapter(ArchitectureAdapter):
    """Gemma 3, its text model."""

    sizes: ClassVar[Sizes] = Gemma2ArchitectureAdapter.sizes

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        by_head = partial(gemma_norm, layout=Layout.HEADS_FIRST)
        return gemma(cfg, self_attention(q_norm=by_head("q_norm", axes=HEADS), k_norm=by_head("k_norm", axes=KV_HEADS)))


class Phi3ArchitectureAdapter(ArchitectureAdapter):
    """Phi-3 and Phi-4."""

    sizes: ClassVar[Sizes] = LLAMA_SIZES

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        rule = BlockedQKVConversionRule(cfg.n_heads, cfg.d_head, cfg.n_key_value_heads or cfg.n_heads)
        attn = fused_attention("self_attn", qkv="qkv_proj", o="o_proj", rule=rule, rotary=True)
        mlp = fused_gated_mlp("mlp", gate_up="gate_up_proj", out="down_proj")
        return llama(pre_norm(attn, mlp, attn_out="resid_attn_dropout", mlp_out="resid_mlp_dropout"))


class GraniteArchitectureAdapter(ArchitectureAdapter):
    """Granite 3."""

    sizes: ClassVar[Sizes] = LLAMA_SIZES

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        hf = cfg.hf
        return llama(
            pre_norm(self_attention(), gated(), residual_multiplier=hf["residual_multiplier"]),
            embed=embedding(EMBEDDING, multiplier=hf["embedding_multiplier"]),
            unembed=unembedding("lm_head", scale=1 / hf["logits_scaling"]),
        )


class Cohere2ArchitectureAdapter(ArchitectureAdapter):
    """Command R7B and other Cohere 2 models."""

    sizes: ClassVar[Sizes] = {**LLAMA_SIZES, "eps": ("layer_norm_eps",)}

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        # Only layers with a sliding window rotate queries and keys.
        hf = cfg.hf
        slides = [kind == "sliding_attention" and hf["sliding_window"] is not None for kind in hf["layer_types"]]
        attn = PerLayer([self_attention(rotary=one) for one in slides])
        blocks = block(LAYERS, parallel=True, ln1=norm("input_layernorm"), attn=attn, mlp=gated())
        return llama(blocks, ln_final=norm("model.norm"), unembed=unembedding("lm_head", scale=hf["logit_scale"]))
