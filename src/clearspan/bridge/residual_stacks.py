"""Stacks: the residual stream of a run at every depth, or taken apart into what the parts of the model added to it."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.bridge.cache_lookup import CacheLookup
from clearspan.bridge.sublayer_parts import NeuronSlice, Sublayer, biases, head_results, neuron_results
from clearspan.components import MLPBridge
from clearspan.errors import InvalidArgumentError

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
    n_layers = cache.bridge.cfg.n_layers
    depth = n_layers if layer is None or layer == -1 else layer
    if not 0 <= depth <= n_layers:
        raise InvalidArgumentError(f"layer={layer} has no input", expected=f"0 to {n_layers}; -1 and None are the last")
    return depth


def residual(cache: CacheLookup, depth: int, *, mlp_input: bool = False) -> Float[Tensor, "*batch_pos d_model"]:
    """Returns the residual stream entering a layer (its MLP), or after the last."""
    n_layers = cache.bridge.cfg.n_layers
    if depth == n_layers:
        return cache["resid_post", n_layers - 1]
    return cache["resid_mid" if _goes_to_middle(cache, depth, mlp_input) else "resid_pre", depth]


def _goes_to_middle(cache: CacheLookup, depth: int, mlp_input: bool) -> bool:
    """Returns whether the MLP's input at a depth is another stream than attention's."""
    return mlp_input and depth < cache.bridge.cfg.n_layers and not cache.bridge.blocks[depth].is_parallel


def accumulated(cache: CacheLookup, depth: int, *, incl_mid: bool, mlp_input: bool) -> Stack:
    """Returns the residual stream at every depth up to one."""
    n_layers = cache.bridge.cfg.n_layers
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
    if mode not in _SUBLAYERS:
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
    has_neurons = [expand_neurons and isinstance(block.mlp, MLPBridge) for block in cache.bridge.blocks[:depth]]
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
    """Returns a stack projected onto directions, or as it is where there are none."""
    return stack if directions is None else Stack(stack.values @ directions.to(stack.values), stack.labels)


def _embeddings(cache: CacheLookup) -> dict[str, str]:
    names = {"embed": "hook_embed", "pos_embed": "hook_pos_embed"}
    return {label: name for label, name in names.items() if name in cache.bridge.hook_dict}


def _stacked(cache: CacheLookup, names: dict[str, str]) -> Stack:
    return Stack(torch.stack([cache[name] for name in names.values()]), list(names)) if names else _nothing(cache)


def _nothing(cache: CacheLookup) -> Stack:
    """Returns a stack without components."""
    return Stack(cache["resid_pre", 0][None][:0], [])


def check_sum(cache: CacheLookup) -> None:
    """Raises where the residual stream is no sum of what was added to it."""
    block = cache.bridge.blocks[0]
    if block.norms_the_sum or block.residual_is_normed:
        raise InvalidArgumentError(
            "the residual stream of this model is not the sum of what its parts added",
            where=cache.bridge.cfg.architecture,
            reason="the residual branch itself goes through norms",
            fix="cache.accumulated_resid() for the stream itself, cache['result', layer] for a layer's heads",
        )
