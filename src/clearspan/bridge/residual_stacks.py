"""Stacks: the residual stream of a run taken apart into what each part of the model added to it.

Everything here is on the model's raw weights. What a head or neuron adds goes through what the block does to it before
it reaches the stream: a norm after the sublayer (with the run's own scale), and the residual multiplier.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from clearspan.bridge.norm_readings import linear_part
from clearspan.bridge.positions import PosSlice, at_positions
from clearspan.components import BlockBridge, MLPBridge, NormalizationBridge
from clearspan.errors import InvalidArgumentError, MissingWeightError

if TYPE_CHECKING:
    from clearspan.bridge.cache import ActivationCache

Mode = Literal["all", "mlp", "attn"]
NeuronSlice = int | slice | list[int] | Tensor | None
"""Neurons: one, a slice, a list, or a tensor of indices; None for all."""


@dataclass(frozen=True)
class Stack:
    """Named components of the residual stream.

    Attributes:
        values: `[component, batch, pos, d_model]`; where the cache or the choice of positions leaves an axis out, it is
            left out here. Projected onto directions, the last axis is theirs, or it is gone for a single one.
        labels: A name for each component.
    """

    values: Tensor
    labels: list[str]

    def __post_init__(self) -> None:
        assert len(self.labels) == len(self.values), "a name for each component"


def depth_of(cache: "ActivationCache", layer: int | None) -> int:
    """Returns the layer whose input is meant, `n_layers` for the last residual stream (None, -1)."""
    n_layers = cache.bridge.cfg.n_layers
    depth = n_layers if layer is None or layer == -1 else layer
    if not 0 <= depth <= n_layers:
        raise InvalidArgumentError(f"layer={layer} has no input", expected=f"0 to {n_layers}; -1 and None are the last")
    return depth


def residual(cache: "ActivationCache", depth: int, *, mlp_input: bool = False) -> Tensor:
    """Returns the residual stream entering a layer (its MLP), or after the last."""
    n_layers = cache.bridge.cfg.n_layers
    if depth == n_layers:
        return cache["resid_post", n_layers - 1]
    between = mlp_input and not cache.bridge.blocks[depth].is_parallel
    return cache["resid_mid" if between else "resid_pre", depth]


def accumulated(cache: "ActivationCache", depth: int, *, incl_mid: bool, mlp_input: bool, pos_slice: PosSlice) -> Stack:
    """Returns the residual stream at every depth up to one."""
    n_layers = cache.bridge.cfg.n_layers
    labels, values = [], []
    for layer in range(depth + 1):
        labels.append(f"{layer}_pre" if layer < n_layers else "final_post")
        values.append(residual(cache, layer))
        has_middle = layer < n_layers and not cache.bridge.blocks[layer].is_parallel
        if has_middle and ((incl_mid and layer < depth) or (mlp_input and layer == depth)):
            labels.append(f"{layer}_mid")
            values.append(residual(cache, layer, mlp_input=True))
    return Stack(torch.stack([at_positions(value, pos_slice) for value in values]), labels)


def decomposed(
    cache: "ActivationCache", depth: int, *, mode: Mode, mlp_input: bool, incl_embeds: bool, pos_slice: PosSlice
) -> Stack:
    """Returns what the embeddings and each sublayer added to the residual stream before a layer (its MLP)."""
    check_sum(cache)
    if mode not in ("all", "mlp", "attn"):
        raise InvalidArgumentError(f"no mode {mode!r}", expected="'all', 'mlp' or 'attn'")
    names = _embeddings(cache) if incl_embeds else []
    for layer in range(depth):
        names += [(f"{layer}_attn_out", f"blocks.{layer}.hook_attn_out")] if mode != "mlp" else []
        names += [(f"{layer}_mlp_out", f"blocks.{layer}.hook_mlp_out")] if mode != "attn" else []
    if _has_attention_before_mlp(cache, depth, mlp_input) and mode != "mlp":
        names.append((f"{depth}_attn_out", f"blocks.{depth}.hook_attn_out"))
    return _stacked(cache, names, pos_slice)


def heads(cache: "ActivationCache", depth: int, *, pos_slice: PosSlice) -> Stack:
    """Returns what each head of the layers before one added to the residual stream."""
    check_sum(cache)
    found, labels = [], []
    for layer in range(depth):
        found.append(head_results(cache, layer, pos_slice))
        labels += [f"L{layer}H{head}" for head in range(found[-1].shape[0])]
    return Stack(torch.cat(found) if found else _nothing(cache, pos_slice), labels)


def head_results(cache: "ActivationCache", layer: int, pos_slice: PosSlice) -> Tensor:
    """Returns what each head of a layer added to the residual stream, `[head, batch, pos, d_model]`."""
    block = cache.bridge.blocks[layer]
    z = at_positions(cache["z", layer], pos_slice, axis=-3)
    result = torch.einsum("...hd,hdm->h...m", z, cache.weights(block.attn.W_O).to(z))
    return added(cache, block, result, "attn", pos_slice)


def neurons(
    cache: "ActivationCache",
    depth: int,
    *,
    neuron_slice: NeuronSlice,
    pos_slice: PosSlice,
    project_output_onto: Tensor | None,
) -> Stack:
    """Returns what each neuron of the layers before one added to the residual stream, or to directions of it."""
    check_sum(cache)
    found, labels = [], []
    for layer in range(depth):
        result, indices = neuron_results(cache, layer, neuron_slice, pos_slice, project_output_onto)
        found.append(result)
        labels += [f"L{layer}N{index}" for index in indices]
    values = torch.cat(found) if found else _projected(_nothing(cache, pos_slice), project_output_onto)
    return Stack(values, labels)


def neuron_results(
    cache: "ActivationCache",
    layer: int,
    neuron_slice: NeuronSlice,
    pos_slice: PosSlice,
    project_output_onto: Tensor | None,
) -> tuple[Tensor, list[int]]:
    """Returns what each neuron of a layer added, `[neuron, batch, pos, d_model]`, and which neurons they are."""
    block = cache.bridge.blocks[layer]
    if not isinstance(block.mlp, MLPBridge):
        raise MissingWeightError(
            f"layer {layer} has no neurons of its own",
            reason="its MLP is a mixture of experts, each with neurons of its own",
            fix="expand_neurons=False, or stack only layers that have neurons",
        )
    post = cache["post", layer]
    indices = torch.arange(post.shape[-1], device=post.device)
    indices = indices if neuron_slice is None else indices[neuron_slice].reshape(-1)
    acts = at_positions(post, pos_slice)[..., indices].movedim(-1, 0)
    rows = cache.weights(block.mlp.W_out).to(acts)[indices]
    if project_output_onto is not None and _norm_after(block, "mlp") is None:
        rows = _projected(rows, project_output_onto) * block.residual_multiplier
        values = torch.einsum("n...,nk->n...k" if rows.ndim == 2 else "n...,n->n...", acts, rows)
        return values, indices.tolist()
    whole = added(cache, block, torch.einsum("n...,nm->n...m", acts, rows), "mlp", pos_slice)
    return _projected(whole, project_output_onto), indices.tolist()


def full(
    cache: "ActivationCache",
    depth: int,
    *,
    mlp_input: bool,
    expand_neurons: bool,
    pos_slice: PosSlice,
    project_output_onto: Tensor | None,
) -> Stack:
    """Returns heads, neurons (or MLPs), embeddings and biases, which sum to the residual stream at a depth.

    MLPs that are mixtures of experts are not divided into neurons.
    """
    parts = [heads(cache, depth, pos_slice=pos_slice)]
    mid = _has_attention_before_mlp(cache, depth, mlp_input)
    if mid:
        values = head_results(cache, depth, pos_slice)
        parts.append(Stack(values, [f"L{depth}H{head}" for head in range(len(values))]))
    whole = [] if expand_neurons else list(range(depth))
    divided: list[Stack] = []
    for layer in range(depth) if expand_neurons else ():
        if isinstance(cache.bridge.blocks[layer].mlp, MLPBridge):
            values, indices = neuron_results(cache, layer, None, pos_slice, project_output_onto)
            divided.append(Stack(values, [f"L{layer}N{index}" for index in indices]))
        else:
            whole.append(layer)
    parts.append(_stacked(cache, [(f"{layer}_mlp_out", f"blocks.{layer}.hook_mlp_out") for layer in whole], pos_slice))
    parts.append(_stacked(cache, _embeddings(cache), pos_slice))
    parts.append(_biases(cache, depth + mid, [layer for layer in range(depth) if layer not in whole], pos_slice))
    projected = [Stack(_projected(part.values, project_output_onto), part.labels) for part in parts]
    ordered = [projected[0], *projected[1 : 1 + mid], *divided, *projected[1 + mid :]]
    return Stack(torch.cat([part.values for part in ordered]), [name for part in ordered for name in part.labels])


def _biases(cache: "ActivationCache", layers: int, with_neurons: list[int], pos_slice: PosSlice) -> Stack:
    """Returns the sum of what output biases added, or nothing where there are none."""
    like = at_positions(cache["resid_pre", 0], pos_slice)
    total = torch.zeros_like(like)
    has_any = False
    for layer in range(layers):
        block = cache.bridge.blocks[layer]
        found = [("attn", block.attn.o.bias_or_none())]
        if layer in with_neurons:
            found.append(("mlp", block.mlp.out.bias_or_none()))
        for which, bias in found:
            if bias is not None:
                has_any = True
                total += added(cache, block, cache.weights(bias).to(like).expand_as(like), which, pos_slice)
    return Stack(total[None][: int(has_any)], ["bias"] * has_any)


def added(cache: "ActivationCache", block: BlockBridge, value: Tensor, which: str, pos_slice: PosSlice) -> Tensor:
    """Returns what a part of a sublayer's output adds to the residual stream: linear in it, given the run's scale."""
    norm = _norm_after(block, which)
    if norm is not None:
        scale = at_positions(cache[f"{norm.path}.hook_scale"], pos_slice)
        value = linear_part(cache, norm, value, scale)
    return value * block.residual_multiplier if block.residual_multiplier != 1 else value


def _norm_after(block: BlockBridge, which: str) -> NormalizationBridge | None:
    found = block.submodules.get({"attn": "ln1_post", "mlp": "ln2_post"}[which])
    return found if isinstance(found, NormalizationBridge) else None


def _has_attention_before_mlp(cache: "ActivationCache", depth: int, mlp_input: bool) -> bool:
    if not mlp_input or depth == cache.bridge.cfg.n_layers:
        return False
    return not cache.bridge.blocks[depth].is_parallel


def _embeddings(cache: "ActivationCache") -> list[tuple[str, str]]:
    names = [("embed", "hook_embed"), ("pos_embed", "hook_pos_embed")]
    return [(label, name) for label, name in names if name in cache.bridge.hook_dict]


def _stacked(cache: "ActivationCache", names: list[tuple[str, str]], pos_slice: PosSlice) -> Stack:
    values = [at_positions(cache[name], pos_slice) for _, name in names]
    return Stack(torch.stack(values) if values else _nothing(cache, pos_slice), [label for label, _ in names])


def _nothing(cache: "ActivationCache", pos_slice: PosSlice) -> Tensor:
    return at_positions(cache["resid_pre", 0], pos_slice)[None][:0]


def _projected(values: Tensor, directions: Tensor | None) -> Tensor:
    return values if directions is None else values @ directions.to(values)


def check_sum(cache: "ActivationCache") -> None:
    """Raises where the residual stream is no sum of what was added to it."""
    block = cache.bridge.blocks[0]
    if block.norms_the_sum or block.residual_is_normed:
        raise InvalidArgumentError(
            "the residual stream of this model is not the sum of what its parts added",
            where=cache.bridge.cfg.architecture,
            reason="it is normed between the sublayers, after each sum",
            fix="cache.accumulated_resid(), which works on every model",
        )
