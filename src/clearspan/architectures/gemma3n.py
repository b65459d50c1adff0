"""Gemma 3n: AltUp keeps several streams, each layer has an input of its own, and late layers share keys."""

import math
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

from clearspan.architectures.adapter import ArchitectureAdapter, Sizes
from clearspan.architectures.llama import Gemma2ArchitectureAdapter, rms, self_attention
from clearspan.architectures.parts import HEADS, KV_HEADS, decoder, gated_mlp, linear, unembedding
from clearspan.components import (
    ActivationBridge,
    AltUpBlockBridge,
    AltUpBridge,
    CutGateMLPBridge,
    GatedMLPBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    OpaqueBridge,
    PerLayer,
    PerLayerInputBridge,
    RemainderBridge,
    SharedKeysAttentionBridge,
    StreamMapsBridge,
    StreamsLayout,
)
from clearspan.config import TransformerBridgeConfig
from clearspan.points import Layout

_HALF = 1 / math.sqrt(2)
_REST = {
    "layer_embed": "embed_tokens_per_layer",
    "layer_map": "per_layer_model_projection",
    "layer_norm": "per_layer_projection_norm",
}
"""What makes each layer's own input of the tokens, by names of ours."""


class Gemma3nArchitectureAdapter(ArchitectureAdapter):
    """Gemma 3n, its text model."""

    text: ClassVar[str] = "model"
    """Path of the text model."""
    sizes: ClassVar[Sizes] = Gemma2ArchitectureAdapter.sizes
    irrelevant: Mapping[str, str] = {
        **ArchitectureAdapter.irrelevant,
        "*_scale": "numbers by which what makes a layer's own input is multiplied",
    }

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        rest = {key: RemainderBridge(f"{self.text}.{path}") for key, path in _REST.items()}
        parts = decoder(
            embed=f"{self.text}.embed_tokens",
            blocks=PerLayer([_block(f"{self.text}.layers", cfg, layer) for layer in range(cfg.n_layers)]),
            ln_final=rms(f"{self.text}.norm"),
            unembed=unembedding("lm_head", softcap=cfg.hf["final_logit_softcapping"]),
        )
        ends = {key: StreamMapsBridge(f"{self.text}.altup_{path}projections") for key, path in _ENDS.items()}
        before, after = {"embed": parts["embed"], "expand": ends["expand"], **rest}, {"collapse": ends["collapse"]}
        return {**before, "blocks": parts["blocks"], **after, **parts}


class Gemma3nMultimodalArchitectureAdapter(Gemma3nArchitectureAdapter):
    """Gemma 3n with its towers for images and sounds, through which no text passes."""

    text: ClassVar[str] = "model.language_model"
    irrelevant: Mapping[str, str] = {
        **Gemma3nArchitectureAdapter.irrelevant,
        "model.vision_tower.*": "a text does not pass through it",
        "model.audio_tower.*": "a text does not pass through it",
        "model.embed_vision.*": "its embeddings replace those of no token of a text",
        "model.embed_audio.*": "its embeddings replace those of no token of a text",
    }


_ENDS = {"expand": "", "collapse": "unembed_"}


def _block(blocks: str, cfg: TransformerBridgeConfig, layer: int) -> AltUpBlockBridge:
    """Returns the block of a layer."""
    hf = cfg.hf
    streams = StreamsLayout(hf["altup_num_inputs"], Layout.STREAMS_FIRST)
    ple = PerLayerInputBridge(
        submodules={
            "gate": linear("per_layer_input_gate"),
            "act": ActivationBridge("act_fn"),
            "out": linear("per_layer_projection"),
        }
    )
    return AltUpBlockBridge(
        blocks,
        submodules={
            "altup": AltUpBridge("altup", streams=streams),
            "ln1": rms("input_layernorm"),
            "attn": _attention(cfg, layer),
            "laurel": OpaqueBridge("laurel"),
            "ln1_post": rms("post_attention_layernorm"),
            "ln2": rms("pre_feedforward_layernorm"),
            "mlp": _mlp(is_cut=hf["activation_sparsity_pattern"][layer] > 0),
            "ln2_post": rms("post_feedforward_layernorm"),
            "ple": ple,
            "ple_norm": rms("post_per_layer_input_norm"),
        },
        stages=(("attn", "laurel"), ("mlp",)),
        residual_multiplier={"attn": _HALF, "laurel": _HALF},
        stream_multiplier=(_HALF, 1.0),
        streams=streams,
        active=hf["altup_active_idx"],
    )


def _mlp(*, is_cut: bool) -> GatedMLPBridge:
    """Returns an MLP, whose gate may be cut off before its activation function."""
    if not is_cut:
        return gated_mlp("mlp", gate="gate_proj", in_="up_proj", out="down_proj")
    maps = {key: linear(name) for key, name in (("gate", "gate_proj"), ("in", "up_proj"), ("out", "down_proj"))}
    return CutGateMLPBridge("mlp", submodules={**maps, "act": ActivationBridge("act_fn")})


def _attention(cfg: TransformerBridgeConfig, layer: int) -> GeneralAttentionBridge:
    """Returns the attention of a layer, which may use the keys and values of an earlier one."""
    kinds, first_shared = cfg.hf["layer_types"], cfg.n_layers - cfg.hf["num_kv_shared_layers"]
    queries, keys = partial(rms, axes=HEADS), partial(rms, axes=KV_HEADS)
    if layer < first_shared:
        return self_attention(q_norm=queries("q_norm"), k_norm=keys("k_norm"), v_norm=keys("v_norm"))
    source = max(one for one in range(first_shared) if kinds[one] == kinds[layer])
    parts = {"q": linear("q_proj"), "q_norm": queries("q_norm"), "o": linear("o_proj")}
    return SharedKeysAttentionBridge("self_attn", submodules=parts, source=source, has_rotary=True)
