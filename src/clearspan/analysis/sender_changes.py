"""What each part of a model adds to the residual stream, in one run more than in another."""

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.bridge import ActivationCache, TransformerBridge
from clearspan.bridge.sublayer_parts import WayOut

from .readout import exact


def written(bridge: TransformerBridge) -> list[str]:
    """Returns the hook points from which `sender_changes` knows what parts add."""
    layers = range(bridge.cfg.n_layers)
    scales = [f"blocks.{layer}.ln1_post.hook_scale" for layer in layers]
    names = [f"blocks.{layer}.{name}" for layer in layers for name in ("attn.hook_z", "hook_mlp_out")]
    return ["blocks.0.hook_resid_pre", *names, *(name for name in scales if name in bridge.hook_dict)]


def sender_changes(base: ActivationCache, source: ActivationCache) -> Float[Tensor, "sender row pos d_model"]:
    """Returns by how much more each sender adds in the source run: `embed`, then each layer's heads and MLP.

    Heads add after a norm on attention's output, with its scale in each run, and a residual multiplier.

    Args:
        base: A run with the points of `written`.
        source: Another one.
    """
    entering = _change(base, source, "blocks.0.hook_resid_pre")
    parts = [entering[None]]
    for layer in range(base.bridge.cfg.n_layers):
        parts.append(_head_changes(base, source, layer).to(entering))
        parts.append(_change(base, source, f"blocks.{layer}.hook_mlp_out")[None].to(entering))
    return torch.cat(parts)


def _change(base: ActivationCache, source: ActivationCache, name: str) -> Tensor:
    return exact(source[name]) - exact(base[name])


def _head_changes(base: ActivationCache, source: ActivationCache, layer: int) -> Float[Tensor, "head row pos d_model"]:
    block = base.bridge.blocks[layer]
    weight = exact(block.attn.W_O)

    def added(z: Tensor, way_out: WayOut) -> Tensor:
        return way_out(torch.einsum("bphd,hdm->hbpm", z, weight))

    ways = [WayOut.of(cache, block, "attn") for cache in (source, base)]
    if ways[0].norm is None:
        return added(_change(base, source, f"blocks.{layer}.attn.hook_z"), ways[0])
    first, second = (added(exact(cache["z", layer]), way) for cache, way in zip((source, base), ways, strict=True))
    return first - second
