"""ZAYA: convolutions in attention, routers that go on from block to block, factors and offsets on the stream."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from clearspan.architectures.adapter import ArchitectureAdapter, Sizes
from clearspan.architectures.llama import EMBEDDING, LAYERS, LLAMA_SIZES, rms
from clearspan.architectures.parts import block, decoder, embedding, mixture
from clearspan.components import BlockBridge, DeepRouterBridge, GeneralizedComponent, OpaqueAttentionBridge, PerLayer
from clearspan.components.factors import Terms
from clearspan.config import TransformerBridgeConfig

_SCALINGS = {"attn": "post_attention_residual_scale", "mlp": "post_mlp_residual_scale"}
"""The modules that add sublayers' outputs to the stream: both times a factor, and with an offset."""


class ZayaArchitectureAdapter(ArchitectureAdapter):
    """ZAYA.

    The stream is multiplied by a parameter before each sum. All offsets there are a part of what the sublayer adds.
    """

    sizes: ClassVar[Sizes] = {**LLAMA_SIZES, "d_mlp": ("moe_intermediate_size",)}

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        scale, bias = (f"model.input_hidden_states_{name}" for name in ("scale", "bias"))
        return decoder(
            embed=embedding(EMBEDDING, multiplier=scale, offset=((bias, scale),)),
            blocks=_block(cfg),
            ln_final=rms("model.norm"),
        )


def _block(cfg: TransformerBridgeConfig) -> BlockBridge:
    """Returns the blocks."""
    attn = OpaqueAttentionBridge(
        "self_attn",
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
        d_head=cfg.d_head,
        d_head_v=cfg.d_head,
        has_rotary=True,
    )
    return block(
        LAYERS,
        ln1=rms("input_layernorm"),
        attn=attn,
        ln2=rms("post_attention_layernorm"),
        mlp=PerLayer([mixture("mlp", router=_router(cfg, layer)) for layer in range(cfg.n_layers)]),
        residual_multiplier={name: f"{path}.hidden_states_scale" for name, path in _SCALINGS.items()},
        stream_multiplier=[f"{path}.residual_scale" for path in _SCALINGS.values()],
        residual_offset={name: _offset(path) for name, path in _SCALINGS.items()},
        stream_dtype=torch.float32,
        stream_outs=(_SCALINGS["attn"],),
    )


def _router(cfg: TransformerBridgeConfig, layer: int) -> DeepRouterBridge:
    """Returns the router of a layer, which goes on from what that of the layer before found.

    A token may also choose no expert: the last logit says so, and its index is then 0 and its weight 0.
    """
    before = layer - 1 if layer else None
    return DeepRouterBridge("gate", logits="router_mlp", n_scores=cfg.hf["num_experts"] + 1, reads_layer=before)


def _offset(scaling: str) -> Terms:
    """Returns what a sum adds to both of its terms, times their factors."""
    return tuple((f"{scaling}.{name}_bias", f"{scaling}.{name}_scale") for name in ("hidden_states", "residual"))
