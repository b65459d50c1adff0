"""Components called alone, and runs of some of the blocks: they compute what they do in the whole forward."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from clearspan._run import runs
from clearspan.components import (
    BlockBridge,
    ExpertsBridge,
    GeneralizedComponent,
    JointQKVAttentionBridge,
    MLPBridge,
    PosEmbedBridge,
    RouterBridge,
)
from clearspan.verification.report import Check
from clearspan.verification.trial import Trial, guarded


def parts(trial: Trial) -> Iterator[Check]:
    """Yields the checks of components of one layer of each kind, called alone, and of runs of some blocks."""
    for layer in trial.layers():
        block = trial.model.blocks[layer]
        sublayers = [sublayer.part for sublayer in block.sublayers]
        for part in block.walk():
            if part.name is not None or part in sublayers:  # an MLP may have no module of its own
                yield from guarded("parts", f"{part.path} alone", _alone(trial, part, block))
        for attention in block.attentions:
            if isinstance(attention, JointQKVAttentionBridge):
                yield from guarded("parts", f"split_qkv_matrix of {attention.path}", _split(trial, attention))
    yield from guarded("parts", "runs of some blocks", _segments(trial))


def _alone(trial: Trial, part: GeneralizedComponent, block: BlockBridge) -> Iterator[Check]:
    if isinstance(part, ExpertsBridge | RouterBridge):
        return  # the mixture calls them with more than their input
    if part.why_not_alone is not None:
        return
    into, out = f"{part.path}.hook_in", f"{part.path}.hook_out"
    if isinstance(part, MLPBridge):
        into, out = f"{part.first.path}.hook_in", f"{part.last.path}.hook_out"
    if into not in trial.cache or out not in trial.cache:
        return
    value, ends = trial.cache[into], [out]
    # Where the module itself adds the residual stream, it is given zeros, and returns what it adds.
    ends += [own.hook_out for own in block.sublayers if own.part is part and own.name in block.outs]
    found = part(value)
    checks = [
        trial.compared("parts", f"{part.path} alone", found.reshape_as(there), there)
        for there in map(trial.cache.__getitem__, ends)
    ]
    yield min(checks, key=lambda check: check.error or 0.0)


def _split(trial: Trial, attention: JointQKVAttentionBridge) -> Iterator[Check]:
    """Yields that the three maps of a fused one give queries, keys and values, where the adapter makes three of it."""
    if attention.split_qkv_matrix is None:
        return
    maps = attention.split_qkv_matrix(attention.module)
    value = trial.cache[f"{attention.path}.hook_in"]
    for key, one in zip("qkv", maps, strict=True):
        expected = trial.cache[f"{attention.path}.hook_{key}"]
        found = linear(value, one.weight, one.bias).reshape_as(expected)
        yield trial.compared("parts", f"split_qkv_matrix gives {attention.path}.hook_{key}", found, expected)


def _count_up(given: Tensor, length: int) -> bool:
    """Returns whether each row counts up from zero."""
    return given.shape[-1] == length and bool((given == torch.arange(length, device=given.device)).all())


def _segments(trial: Trial) -> Iterator[Check]:
    """Yields that a run from a middle block on, and one up to it, are parts of the whole run."""
    model = trial.model
    if any(point.is_listening for point in model.index):
        trial.skip("runs of some blocks: hooks are on the model, which may be in parts that such runs leave out")
        return
    middle = model.firsts[len(model.blocks) // 2]
    stream = trial.cache[model.blocks[middle].enters]
    if model.reads_tokens:
        trial.skip("runs from a block on: blocks have inputs of their own, which the model makes of the tokens")
    else:
        rest = runs.forward(model, stream, start_at_layer=middle)
        yield trial.compared("parts", f"logits of a run that starts at layer {middle}", rest, trial.base)
    middle = middle or model.cfg.n_layers // 2
    stream = trial.cache[model.blocks[middle].enters]
    told: list[object] = []
    embeds = [part for part in model.components if isinstance(part, PosEmbedBridge) and part.name is not None]
    with contextlib.ExitStack() as stack:
        for part in embeds:
            hook = part.module.register_forward_pre_hook(lambda _, given: told.append(given[0]) if given else None)
            stack.callback(hook.remove)
        start = runs.forward(model, trial.tokens, stop_at_layer=middle)
    for part, given in zip(embeds, told, strict=False):
        length = trial.tokens.shape[1]
        first = 0 if part.padding_id is None else part.offset
        are_positions = isinstance(given, Tensor) and _count_up(given - first, length)
        why = "" if are_positions == part.input_is_positions else "`input_is_positions` of the adapter is wrong."
        said = "positions" if part.input_is_positions else "no positions"
        yield Check("parts", f"the input of {part.path} is {said}", not why, explanation=why)
    yield trial.compared("parts", f"the residual stream of a run that stops at layer {middle}", start, stream)
