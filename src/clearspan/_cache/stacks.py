"""The residual stream of a run at every depth, and taken apart into what each part of the model added to it."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan._cache.lookup import CacheLookup
from clearspan._cache.slices import PosSlice, picked, plain
from clearspan._cache.writes import Sublayer, WayOut, by_head
from clearspan.checks import is_whole
from clearspan.components import BlockBridge, MLPBridge
from clearspan.errors import InvalidArgumentError, MissingWeightError

NeuronSlice = PosSlice
"""Neurons to keep, chosen as positions are."""


def block_at(cache: CacheLookup, layer: int) -> BlockBridge:
    """Returns the block of a layer, which may be counted from the end."""
    n_layers = cache.model.cfg.n_layers
    if not is_whole(layer) or not -n_layers <= layer < n_layers:
        raise InvalidArgumentError(f"no layer {layer!r}", expected=f"-{n_layers} to {n_layers - 1}")
    return cache.model.blocks[layer]


def head_results(cache: CacheLookup, layer: int) -> Float[Tensor, "head *batch_pos d_model"]:
    """Returns what each head of a layer added to the residual stream."""
    block = block_at(cache, layer)
    result = by_head(cache[block.attn.joined], cache.weight(block.attn.o, block.attn.W_O))
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
    indices = picked(torch.arange(len(rows)), plain(neuron_slice), 0, what="neuron").reshape(-1).tolist()
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


Mode = Literal["all", "mlp", "attn"]
_SUBLAYERS: dict[Mode, tuple[Sublayer, ...]] = {"all": ("attn", "mlp"), "attn": ("attn",), "mlp": ("mlp",)}


@dataclass(frozen=True)
class Stack:
    """Named components of the residual stream.

    Attributes:
        values: Without the axes that the cache leaves out. Projected onto directions, the last axis is theirs.
        labels: A name for each component.
    """

    values: Float[Tensor, "component *batch_pos d_model"]
    labels: list[str]

    def __post_init__(self) -> None:
        assert len(self.labels) == len(self.values), "a name for each component"

    @classmethod
    def joined(cls, stacks: Iterable["Stack"]) -> "Stack":
        """Returns the components of stacks, one after the other."""
        stacks = list(stacks)
        return cls(torch.cat([stack.values for stack in stacks]), [name for stack in stacks for name in stack.labels])

    def with_remainder(self, whole: Tensor) -> "Stack":
        """Returns the stack with what is left of a whole as its last component."""
        return Stack.joined([self, Stack((whole - self.values.sum(0))[None], ["remainder"])])


def depth_of(cache: CacheLookup, layer: int | None) -> int:
    """Returns the layer whose input is meant, `n_layers` for the last residual stream (None, -1)."""
    n_layers = cache.model.cfg.n_layers
    if not (layer is None or is_whole(layer)):
        raise InvalidArgumentError(f"layer={layer!r} is no layer"[:80], expected="a whole number, or None")
    depth = n_layers if layer is None or layer == -1 else layer
    if not 0 <= depth <= n_layers:
        raise InvalidArgumentError(f"layer={layer} has no input", expected=f"0 to {n_layers}; -1 and None are the last")
    return depth


def residual(cache: CacheLookup, depth: int, *, mlp_input: bool = False) -> Float[Tensor, "*batch_pos d_model"]:
    """Returns the residual stream entering a layer (its MLP), or after the last."""
    n_layers = cache.model.cfg.n_layers
    if depth == n_layers:
        return cache["resid_post", n_layers - 1]
    return cache["resid_mid" if _goes_to_middle(cache, depth, mlp_input) else "resid_pre", depth]


def _goes_to_middle(cache: CacheLookup, depth: int, mlp_input: bool) -> bool:
    """Returns whether the MLP's input at a depth is another stream than attention's."""
    return mlp_input and depth < cache.model.cfg.n_layers and not cache.model.blocks[depth].is_parallel


def accumulated(cache: CacheLookup, depth: int, *, incl_mid: bool, mlp_input: bool) -> Stack:
    """Returns the residual stream at every depth up to one."""
    n_layers = cache.model.cfg.n_layers
    labels, values = [], []
    for layer in range(depth + 1):
        labels.append(f"{layer}_pre" if layer < n_layers else "final_post")
        values.append(residual(cache, layer))
        if _goes_to_middle(cache, layer, mlp_input if layer == depth else incl_mid):
            labels.append(f"{layer}_mid")
            values.append(residual(cache, layer, mlp_input=True))
    return Stack(torch.stack(values), labels)


def decomposed(cache: CacheLookup, depth: int, *, mode: Mode, mlp_input: bool, incl_embeds: bool) -> Stack:
    """Returns what the embeddings and each sublayer added to the residual stream before a layer (its MLP)."""
    check_sum(cache)
    if not isinstance(mode, str) or mode not in _SUBLAYERS:
        raise InvalidArgumentError(f"no mode {mode!r}", expected="'all', 'mlp' or 'attn'")
    names = _embeddings(cache) if incl_embeds else {}
    for layer in range(depth):
        names |= {f"{layer}_{part}_out": f"blocks.{layer}.hook_{part}_out" for part in _SUBLAYERS[mode]}
    if _goes_to_middle(cache, depth, mlp_input) and mode != "mlp":
        names[f"{depth}_attn_out"] = f"blocks.{depth}.hook_attn_out"
    return _stacked(cache, names)


def heads(cache: CacheLookup, layers: Sequence[int]) -> Stack:
    """Returns what each head of some layers added to the residual stream."""
    check_sum(cache)
    found = [_nothing(cache)] if not layers else []
    for layer in layers:
        values = head_results(cache, layer)
        found.append(Stack(values, [f"L{layer}H{head}" for head in range(len(values))]))
    return Stack.joined(found)


def neurons(cache: CacheLookup, layers: Sequence[int], chosen: NeuronSlice, directions: Tensor | None) -> Stack:
    """Returns what each neuron of some layers added to the residual stream, or to directions of it."""
    check_sum(cache)
    found = [projected(_nothing(cache), directions)] if not layers else []
    for layer in layers:
        values, indices = neuron_results(cache, layer, chosen, directions)
        found.append(Stack(values, [f"L{layer}N{index}" for index in indices]))
    return Stack.joined(found)


def full(cache: CacheLookup, depth: int, *, mlp_input: bool, expand_neurons: bool, directions: Tensor | None) -> Stack:
    """Returns heads, neurons (or MLPs), embeddings and biases, which sum to the residual stream at a depth.

    MLPs that are mixtures of experts are not divided into neurons.
    """
    check_sum(cache)
    with_heads = range(depth + _goes_to_middle(cache, depth, mlp_input))
    has_neurons = [expand_neurons and isinstance(block.mlp, MLPBridge) for block in cache.model.blocks[:depth]]
    divided = [layer for layer in range(depth) if has_neurons[layer]]
    whole = {f"{layer}_mlp_out": f"blocks.{layer}.hook_mlp_out" for layer in range(depth) if not has_neurons[layer]}
    rest = _stacked(cache, {**whole, **_embeddings(cache)})
    parts = [projected(heads(cache, with_heads), directions)] if with_heads else []
    parts += [neurons(cache, divided, None, directions)] if divided else []
    parts += [projected(rest, directions)]
    parts += [projected(bias, directions) for bias in _biases(cache, with_heads, divided, like=rest.values[0])]
    return Stack.joined(parts)


def _biases(cache: CacheLookup, layers: Iterable[int], divided: Collection[int], like: Tensor) -> Iterator[Stack]:
    """Yields what the output biases of attention, and of MLPs divided into neurons, added together, if there are any.

    Args:
        cache: The run's.
        layers: Layers whose attention is taken.
        divided: Layers whose MLP is.
        like: A component.
    """
    sublayers: dict[int, tuple[Sublayer, ...]] = {
        layer: ("attn", "mlp") if layer in divided else ("attn",) for layer in layers
    }
    found = [
        bias.to(like).expand_as(like) for layer, which in sublayers.items() for bias in biases(cache, layer, which)
    ]
    if found:
        yield Stack(torch.stack(found).sum(0)[None], ["bias"])


def projected(stack: Stack, directions: Float[Tensor, "d_model direction"] | None) -> Stack:
    """Returns a stack projected onto directions, or the stack itself for None."""
    return stack if directions is None else Stack(stack.values @ directions.to(stack.values), stack.labels)


def _embeddings(cache: CacheLookup) -> dict[str, str]:
    names = {"embed": "hook_embed", "pos_embed": "hook_pos_embed", "type_embed": "hook_type_embed"}
    return {label: name for label, name in names.items() if name in cache.model.hook_dict}


def _stacked(cache: CacheLookup, names: dict[str, str]) -> Stack:
    return (
        Stack(torch.stack([_entry(cache, name) for name in names.values()]), list(names)) if names else _nothing(cache)
    )


def _entry(cache: CacheLookup, name: str) -> Tensor:
    """Returns an entry. In a run of embeddings the embedding is what the stream starts with, less what is added."""
    if name != "hook_embed" or name in cache or cache.batch.embeds is None:
        return cache[name]
    others = [cache[added] for added in _embeddings(cache).values() if added != name]
    return cache["resid_pre", 0] - sum(others) if others else cache["resid_pre", 0]


def _nothing(cache: CacheLookup) -> Stack:
    """Returns a stack without components."""
    return Stack(cache["resid_pre", 0][None][:0], [])


def check_sum(cache: CacheLookup) -> None:
    """Raises where the residual stream is no sum of what was added to it."""
    block = cache.model.blocks[0]
    if block.norms_the_sum or block.residual_is_normed:
        raise InvalidArgumentError(
            "the residual stream of this model is not the sum of what its parts added",
            where=cache.model.cfg.architecture,
            reason="the residual branch itself goes through norms",
            fix="cache.accumulated_resid() for the stream itself, cache['result', layer] for a layer's heads",
        )
