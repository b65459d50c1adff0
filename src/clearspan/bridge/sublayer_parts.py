"""What heads, neurons and biases of a run added to the residual stream.

All is on the model's raw weights. What a part adds goes through what the block does to it before it reaches the stream:
a norm on the sublayer's output, with the scale that it had in the run, and the residual multiplier.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.bridge.cache_lookup import CacheLookup
from clearspan.bridge.norm_readings import FrozenNorm
from clearspan.bridge.positions import PosSlice, picked
from clearspan.components import BlockBridge, MLPBridge, NormalizationBridge
from clearspan.errors import InvalidArgumentError, MissingWeightError

NeuronSlice = PosSlice
"""Neurons to keep, said as positions are."""
Sublayer = Literal["attn", "mlp"]


@dataclass(frozen=True)
class WayOut:
    """What a part of a sublayer's output goes through on its way to the residual stream: linear, given the scale.

    Attributes:
        norm: The norm on the sublayer's output, if any.
        multiplier: The residual multiplier.
    """

    norm: FrozenNorm | None
    multiplier: float

    @classmethod
    def of(cls, cache: CacheLookup, block: BlockBridge, sublayer: Sublayer) -> "WayOut":
        """Returns the way out of a block's attention or MLP in a cache's run."""
        norm = block.submodules.get({"attn": "ln1_post", "mlp": "ln2_post"}[sublayer])
        frozen = FrozenNorm.of(cache, norm) if isinstance(norm, NormalizationBridge) else None
        return cls(frozen, block.residual_multiplier)

    def __call__(self, part: Float[Tensor, "*component_batch_pos d_model"]) -> Tensor:
        """Returns what a part of the sublayer's output adds to the stream."""
        normed = part if self.norm is None else self.norm(part)
        return normed if self.multiplier == 1 else normed * self.multiplier

    def onto(
        self,
        acts: Float[Tensor, "neuron *batch_pos"],
        rows: Float[Tensor, "neuron d_model"],
        directions: Float[Tensor, "d_model direction"],
    ) -> Float[Tensor, "neuron *batch_pos direction"]:
        """Returns what neurons add to directions of the stream, for which nothing `[..., d_model]` is formed."""
        towards = directions.to(rows)
        if self.norm is not None:
            towards = self.norm.pulled_back(towards.T).T
        found = torch.einsum("n...,nk->n...k", acts, rows @ towards * self.multiplier)
        return found if self.norm is None else (found / self.norm.scale).to(found)


def block_at(cache: CacheLookup, layer: int) -> BlockBridge:
    """Returns the block of a layer, which may be counted from the end."""
    n_layers = cache.bridge.cfg.n_layers
    if not -n_layers <= layer < n_layers:
        raise InvalidArgumentError(f"no layer {layer}", expected=f"-{n_layers} to {n_layers - 1}")
    return cache.bridge.blocks[layer]


def head_results(cache: CacheLookup, layer: int) -> Float[Tensor, "head *batch_pos d_model"]:
    """Returns what each head of a layer added to the residual stream."""
    block = block_at(cache, layer)
    z = cache["z", layer]
    result = torch.einsum("...hd,hdm->h...m", z, cache.weight(block.attn.o, block.attn.W_O).to(z))
    return WayOut.of(cache, block, "attn")(result)


def neuron_results(
    cache: CacheLookup, layer: int, neuron_slice: NeuronSlice, directions: Tensor | None
) -> tuple[Tensor, list[int]]:
    """Returns what each neuron of a layer added, `[neuron, *batch_pos, d_model]`, and which neurons they are.

    Args:
        cache: The run's.
        layer: Whose neurons.
        neuron_slice: Which of them.
        directions: `[d_model, direction]`, onto which it is projected, or None.

    Raises:
        MissingWeightError: The layer's MLP is a mixture of experts.
    """
    block = block_at(cache, layer)
    if not isinstance(block.mlp, MLPBridge):
        raise MissingWeightError(
            f"layer {layer} has no neurons of its own",
            reason="its MLP is a mixture of experts, each with neurons of its own",
            fix="expand_neurons=False, or stack only layers that have neurons",
        )
    post, way_out = cache["post", layer], WayOut.of(cache, block, "mlp")
    rows = cache.weight(block.mlp.out, block.mlp.W_out).to(post)
    indices = picked(torch.arange(len(rows)), neuron_slice, 0, what="neuron").reshape(-1).tolist()
    if neuron_slice is not None:
        post, rows = post[..., indices], rows[indices]
    acts = post.movedim(-1, 0)
    if directions is not None:
        return way_out.onto(acts, rows, directions), indices
    return way_out(torch.einsum("n...,nm->n...m", acts, rows)), indices


def biases(cache: CacheLookup, layer: int, sublayers: Iterable[Sublayer]) -> Iterator[Tensor]:
    """Yields what the output biases of a layer's sublayers added, where they have one."""
    block = block_at(cache, layer)
    for sublayer in sublayers:
        bias = cache.bias(block.attn.o if sublayer == "attn" else block.mlp.out)
        if bias is not None:
            yield WayOut.of(cache, block, sublayer)(bias)
