"""The residual stream of a run at every depth, and taken apart into what each part of the model added to it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan._cache.lookup import CacheLookup
from clearspan._cache.slices import PosSlice, picked, plain
from clearspan._cache.writes import WayOut, by_head
from clearspan.checks import is_whole
from clearspan.components import (
    BlockBridge,
    GeneralAttentionBridge,
    MLPBridge,
    MoEBridge,
    MultiStreamBlockBridge,
    Sublayer,
    SublayerKind,
)
from clearspan.errors import InvalidArgumentError, MissingWeightError
from clearspan.model import check_layers

NeuronSlice = PosSlice
"""Neurons to keep, chosen as positions are."""


def block_at(cache: CacheLookup, layer: int) -> BlockBridge:
    """Returns the block of a layer, which may be counted from the end."""
    n_layers = len(cache.model.blocks)
    if not is_whole(layer) or not -n_layers <= layer < n_layers:
        raise InvalidArgumentError(f"no layer {layer!r}", expected=f"-{n_layers} to {n_layers - 1}")
    return cache.model.blocks[layer]


def head_results(cache: CacheLookup, sublayer: Sublayer) -> Float[Tensor, "head *batch_pos d_model"]:
    """Returns what each head of an attention added to the residual stream."""
    attention = sublayer.part
    assert isinstance(attention, GeneralAttentionBridge), "a sublayer with heads"
    if cache.is_given(attention.hook_result.name):
        result = cache[attention.hook_result.name].movedim(-2, 0)
    else:
        result = by_head(cache[attention.joined], cache.weight(attention.o, attention.W_O))
    return WayOut.of(cache, sublayer)(result)


def neuron_results(
    cache: CacheLookup, sublayer: Sublayer, neuron_slice: NeuronSlice, directions: Tensor | None
) -> tuple[Tensor, list[int]]:
    """Returns what each neuron of an MLP added, `[neuron, *batch_pos, d_model]`, and which neurons they are.

    Args:
        cache: The run's.
        sublayer: The MLP.
        neuron_slice: Which of its neurons.
        directions: `[d_model, direction]`, onto which it is projected, or None.

    Raises:
        MissingWeightError: The MLP is a mixture of experts, or opaque.
    """
    mlp = sublayer.part
    if not isinstance(mlp, MLPBridge):
        is_mixture = isinstance(mlp, MoEBridge)
        raise MissingWeightError(
            f"layer {sublayer.layer} has no neurons of its own",
            reason="its MLP is a mixture of experts, each with neurons of its own"
            if is_mixture
            else f"only the ends of {mlp.path} are known",
            fix="expand_neurons=False, or stack only layers that have neurons",
        )
    post, way_out = cache[f"{mlp.path}.hook_post"], WayOut.of(cache, sublayer)
    rows = cache.weight(mlp.out, mlp.W_out).to(post)
    indices = picked(torch.arange(len(rows)), plain(neuron_slice), 0, what="neuron").reshape(-1).tolist()
    if neuron_slice is not None:
        post, rows = post[..., indices], rows[indices]
    acts = post.movedim(-1, 0)
    if directions is not None:
        return way_out.onto(acts, rows, directions), indices
    return way_out(torch.einsum("n...,nm->n...m", acts, rows)), indices


Mode = Literal["all", "mlp", "attn", "mixer"]
_KINDS: dict[Mode, tuple[SublayerKind, ...]] = {
    "all": ("attn", "mixer", "mlp"),
    "attn": ("attn",),
    "mlp": ("mlp",),
    "mixer": ("mixer",),
}


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
    n_layers = len(cache.model.blocks)
    if not (layer is None or is_whole(layer)):
        raise InvalidArgumentError(f"layer={layer!r} is no layer"[:80], expected="a whole number, or None")
    depth = n_layers if layer is None or layer == -1 else layer
    if not 0 <= depth <= n_layers:
        raise InvalidArgumentError(f"layer={layer} has no input", expected=f"0 to {n_layers}; -1 and None are the last")
    return depth


def residual(cache: CacheLookup, depth: int, *, mlp_input: bool = False) -> Float[Tensor, "*batch_pos d_model"]:
    """Returns the residual stream entering a layer (its MLP), or after the last."""
    return cache[_stream(cache, depth, _stage_at(cache, depth, mlp_input))]


def _stream(cache: CacheLookup, depth: int, stage: int) -> str:
    """Returns the name of the point with the stream that a stage of a layer reads, or of the last stream."""
    blocks = cache.model.blocks
    check_one_stream(cache)
    if depth == len(blocks):
        return f"{blocks[-1].path}.hook_resid_post"
    return blocks[depth].stream_before(stage)


def _stage_at(cache: CacheLookup, depth: int, mlp_input: bool) -> int:
    """Returns the stage that is meant at a depth: the first one, or that of the layer's MLP.

    Raises:
        MissingPartError: The layer has no MLP.
    """
    blocks = cache.model.blocks
    if not mlp_input or depth == len(blocks):
        return 0
    if not blocks[depth].of_kind("mlp"):
        check_layers(cache.model, "mlp", [depth])  # raises, naming the layers that have one
    return blocks[depth].reader(mlp_input=True).stage


def accumulated(cache: CacheLookup, depth: int, *, incl_mid: bool, mlp_input: bool) -> Stack:
    """Returns the residual stream at every depth up to one."""
    n_layers = len(cache.model.blocks)
    labels, values = [], []
    last = _stage_at(cache, depth, mlp_input)
    for layer in range(depth + 1):
        labels.append(f"{layer}_pre" if layer < n_layers else "final_post")
        values.append(residual(cache, layer))
        stages = len(cache.model.blocks[layer].stages) if layer < n_layers else 1
        for stage in range(1, last + 1 if layer == depth else stages if incl_mid else 1):
            labels.append(f"{layer}_mid{stage if stage > 1 else ''}")
            values.append(cache[_stream(cache, layer, stage)])
    return Stack(torch.stack(values), labels)


def _added_before(cache: CacheLookup, depth: int, stage: int) -> list[Sublayer]:
    """Returns the sublayers that have been added to the stream that a stage of a layer reads, in this order."""
    blocks = cache.model.blocks
    whole = [sublayer for block in blocks[:depth] for sublayer in block.in_order_of_adding]
    here = blocks[depth].in_order_of_adding if depth < len(blocks) else ()
    return [*whole, *(sublayer for sublayer in here if sublayer.adds_at < stage)]


def _whole(sublayers: Iterable[Sublayer]) -> dict[str, str]:
    """Returns the names of what sublayers add, by their labels."""
    return {f"{sublayer.layer}_{sublayer.name}_out": sublayer.hook_out for sublayer in sublayers}


def decomposed(cache: CacheLookup, depth: int, *, mode: Mode, mlp_input: bool, incl_embeds: bool) -> Stack:
    """Returns what the embeddings and each sublayer added to the residual stream before a layer (its MLP)."""
    check_sum(cache)
    if not isinstance(mode, str) or mode not in _KINDS:
        raise InvalidArgumentError(f"no mode {mode!r}", expected="'all', 'mlp', 'attn' or 'mixer'")
    added = _added_before(cache, depth, _stage_at(cache, depth, mlp_input))
    names = _embeddings(cache) if incl_embeds else {}
    return _stacked(cache, {**names, **_whole(sublayer for sublayer in added if sublayer.kind in _KINDS[mode])})


def heads(cache: CacheLookup, depth: int) -> Stack:
    """Returns what each head of the layers before one added to the residual stream.

    Raises:
        MissingPartError: The model has no heads.
    """
    check_sum(cache)
    check_layers(cache.model, "attn", [])
    attentions = [sublayer for block in cache.model.blocks[:depth] for sublayer in block.of_kind("attn")]
    return _of_heads(cache, attentions)


def _of_heads(cache: CacheLookup, attentions: Iterable[Sublayer]) -> Stack:
    found = []
    for sublayer in attentions:
        values = head_results(cache, sublayer)
        found.append(Stack(values, [f"{sublayer.label}H{head}" for head in range(len(values))]))
    return Stack.joined(found or [_nothing(cache)])


def neurons(cache: CacheLookup, depth: int, chosen: NeuronSlice, directions: Tensor | None) -> Stack:
    """Returns what each neuron of the layers before one added to the residual stream, or to directions of it.

    Raises:
        MissingPartError: The model has no MLPs.
        MissingWeightError: One of them has no neurons of its own.
    """
    check_sum(cache)
    check_layers(cache.model, "mlp", [])
    mlps = [sublayer for block in cache.model.blocks[:depth] for sublayer in block.of_kind("mlp")]
    return _of_neurons(cache, mlps, chosen, directions)


def _of_neurons(cache: CacheLookup, mlps: Iterable[Sublayer], chosen: NeuronSlice, directions: Tensor | None) -> Stack:
    found = []
    for sublayer in mlps:
        values, indices = neuron_results(cache, sublayer, chosen, directions)
        found.append(Stack(values, [f"{sublayer.label}N{index}" for index in indices]))
    return Stack.joined(found or [projected(_nothing(cache), directions)])


def full(cache: CacheLookup, depth: int, *, mlp_input: bool, expand_neurons: bool, directions: Tensor | None) -> Stack:
    """Returns heads, neurons (or MLPs), mixers, embeddings and biases, which sum to the residual stream at a depth.

    MLPs that are mixtures of experts are not divided into neurons.
    """
    check_sum(cache)
    added = _added_before(cache, depth, _stage_at(cache, depth, mlp_input))
    attentions = [sublayer for sublayer in added if sublayer.kind == "attn"]
    divided = [sublayer for sublayer in added if expand_neurons and isinstance(sublayer.part, MLPBridge)]
    whole = [sublayer for sublayer in added if sublayer not in (*attentions, *divided)]
    rest = _stacked(cache, {**_whole(whole), **_embeddings(cache)})
    parts = [projected(_of_heads(cache, attentions), directions)] if attentions else []
    parts += [_of_neurons(cache, divided, None, directions)] if divided else []
    parts += [projected(rest, directions)]
    apart = [sublayer for sublayer in added if sublayer in attentions or sublayer in divided]
    parts.append(projected(_biases(cache, apart, like=rest.values[0]), directions))
    return Stack.joined(parts)


def _biases(cache: CacheLookup, divided: Iterable[Sublayer], like: Tensor) -> Stack:
    """Returns what the output biases of sublayers that are divided added together, zero where there are none.

    Args:
        cache: The run's.
        divided: Attentions divided into heads, MLPs divided into neurons.
        like: A component.
    """
    found = [bias.to(like).expand_as(like) for sublayer in divided for bias in biases(cache, sublayer)]
    return Stack(torch.stack([torch.zeros_like(like), *found]).sum(0)[None], ["bias"])


def biases(cache: CacheLookup, sublayer: Sublayer) -> Iterator[Tensor]:
    """Yields what the output bias of a sublayer with heads or neurons added, if it has one."""
    bias = cache.bias(sublayer.part.submodules["o" if sublayer.kind == "attn" else "out"])
    if bias is not None:
        yield WayOut.of(cache, sublayer)(bias)


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


def check_one_stream(cache: CacheLookup) -> None:
    """Raises where the residual is several streams."""
    block = next((block for block in cache.model.blocks if isinstance(block, MultiStreamBlockBridge)), None)
    if block is not None:
        raise InvalidArgumentError(
            "this model has no one residual stream",
            where=cache.model.cfg.architecture,
            reason=f"its residual is {block.streams.n_streams} streams, and no one of them is what sublayers add to",
            fix="cache['streams_pre', layer] for the streams, cache['attn_out', layer] for what attention gives",
        )


def check_sum(cache: CacheLookup) -> None:
    """Raises where the residual stream is no sum of what was added to it."""
    check_one_stream(cache)
    block = next((block for block in cache.model.blocks if not block.is_sum), None)
    if block is not None:
        normed = block.norms_the_sum or block.residual_is_normed
        raise InvalidArgumentError(
            "the residual stream of this model is not the sum of what its parts added",
            where=cache.model.cfg.architecture,
            reason=f"the residual branch itself {'goes through norms' if normed else 'is multiplied by a factor'}",
            fix="cache.accumulated_resid() for the stream itself, cache['result', layer] for a layer's heads",
        )
