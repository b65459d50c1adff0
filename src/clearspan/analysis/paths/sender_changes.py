"""What each part of a model adds to the residual stream, in one run more than in another."""

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan._cache.stacks import WayOut
from clearspan.analysis.attribution.readout import exact
from clearspan.bridge import TransformerBridge
from clearspan.cache import ActivationCache


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
    cfg, entering = base.bridge.cfg, _change(base, source, "blocks.0.hook_resid_pre")
    found = entering.new_empty(1 + cfg.n_layers * (cfg.n_heads + 1), *entering.shape)
    found[0] = entering
    for layer, part in enumerate(found[1:].split(cfg.n_heads + 1)):
        _write_heads(base, source, layer, part[:-1])
        part[-1] = _change(base, source, f"blocks.{layer}.hook_mlp_out")
    return found


def _change(base: ActivationCache, source: ActivationCache, name: str) -> Tensor:
    return exact(source[name]) - exact(base[name])


def _write_heads(
    base: ActivationCache, source: ActivationCache, layer: int, out: Float[Tensor, "head row pos d_model"]
) -> None:
    block = base.bridge.blocks[layer]
    if "ln1_post" in block.submodules:
        after_norm = []
        for cache in (source, base):
            project_heads(cache["z", layer], block.attn.W_O, out)
            after_norm.append(WayOut.of(cache, block, "attn")(out))
        torch.sub(*after_norm, out=out)
        return
    project_heads(_change(base, source, f"blocks.{layer}.attn.hook_z"), block.attn.W_O, out)
    if block.residual_multiplier != 1:
        out *= block.residual_multiplier


def project_heads(
    values: Float[Tensor, "row pos head d_head"],
    weights: Float[Tensor, "head d_head d_model"],
    out: Float[Tensor, "head row pos d_model"],
) -> None:
    """Writes each head's values, times its weight, in the dtype and on the device of what it is written into."""
    torch.bmm(values.to(out).flatten(0, 1).transpose(0, 1), weights.detach().to(out), out=out.flatten(1, 2))
