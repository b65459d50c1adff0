"""The sublayers of a block: of which kind each is, its template, and the norm that it reads the stream through."""

from dataclasses import dataclass

import torch
from torch import Tensor

from clearspan.components import GeneralAttentionBridge, GeneralizedComponent, OpaqueBridge
from clearspan.structure.algebra import factor, linear_kind, norm_kind, same
from clearspan.structure.attention import Attention, find_attention
from clearspan.structure.attention_templates import attention_template
from clearspan.structure.experts import find_experts
from clearspan.structure.finding import Findings, MissingStructureError
from clearspan.structure.mixers import mixer_template
from clearspan.structure.mixing import MixedError, mixes_positions
from clearspan.structure.mixture import find_mixture
from clearspan.structure.mlp import find_mlp
from clearspan.structure.per_layer_input import find_per_layer_input
from clearspan.structure.trace import Trace, Visit, same_arguments
from clearspan.structure.values import bounds_values
from clearspan.structure.wiring import Contribution, Wiring


@dataclass(eq=False)
class Sublayer:
    """One sublayer of a block.

    Attributes:
        kind: `attn`, `mlp`, `mixer` or `ple`.
        part: Its template.
        contribution: What it adds.
        reader: The call that reads its input.
        stage: Which of the block's streams it reads.
        norm: The call of the norm between stream and reader, or None.
        multiplier: What its input is multiplied by, after the norm.
    """

    kind: str
    part: GeneralizedComponent
    contribution: Contribution
    reader: Visit
    stage: int = 0
    norm: Visit | None = None
    multiplier: float = 1.0


def find_sublayers(trace: Trace, wiring: Wiring, findings: Findings, where: str) -> list[Sublayer]:
    """Returns the sublayers of a block, in the order in which they run.

    Raises:
        MissingStructureError: One is of no known kind, or reads no stream of the block.
    """
    block = wiring.block
    attentions = _attentions(trace, block, findings, where)
    found: list[Sublayer] = []
    taken: list[Attention] = []
    for contribution in wiring.contributions:
        attention = next((one for one in attentions if _gives(one, contribution)), None)
        if attention is not None:
            taken.append(attention)
            try:
                part = _attention(attention, trace, wiring, findings, where)
            except MissingStructureError as error:
                findings.add(f"{where}.mixer", f"heads of {attention.path} are not shown: {error}")
            else:
                found.append(Sublayer("attn", part, contribution, attention.reader))
    if len(taken) < len(attentions):
        lost = next(one for one in attentions if one not in taken)
        raise MissingStructureError(f"{lost.output.path} gives none of what {block.path} adds")
    outside = [one for one in trace.inside(block) if not any(one.is_in(attention.path) for attention in taken)]
    rest = [one for one in wiring.contributions if not any(one is other.contribution for other in found)]
    for contribution in rest:
        found.append(_other(trace, wiring, contribution, outside, findings, where))
    found.sort(key=lambda one: min(call.order for call in one.contribution.calls))
    for one in found:
        _locate(one, wiring, trace)
        if isinstance(one.part, GeneralAttentionBridge) and one.norm is not None:
            one.part.norms_input = one.norm.is_in(f"{block.path}.{one.part.name}")
    return found


def _attentions(trace: Trace, block: Visit, findings: Findings, where: str) -> list[Attention]:
    """Returns the attentions of a block whose modules are found; others are mixers of which the ends are known."""
    found = []
    for one in trace.attended:
        if one.path.startswith(f"{block.path}."):
            try:
                found.append(find_attention(trace, block, one))
            except MissingStructureError as error:
                findings.add(f"{where}.mixer", f"heads of {one.path} are not shown: {error}")
    return found


def _attention(
    attention: Attention, trace: Trace, wiring: Wiring, findings: Findings, where: str
) -> GeneralAttentionBridge:
    """Returns the template of an attention in a block."""
    whole = next((one for one in trace.at(attention.path) if one.order > wiring.block.order), None)
    overwritten = whole is not None and _is_written(whole, wiring)
    part = attention_template(attention, trace, wiring.block, findings, where, overwritten=overwritten)
    if whole is not None and not wiring.residual_norms:  # else it is given the stream that it adds to, which is normed
        part.same_inputs = same_arguments(whole)
    if whole is not None and attention.source is None:
        part.bounds_values = bounds_values(trace, whole, attention.value.map, attention.value.channels)
    return part


def _is_written(whole: Visit, wiring: Wiring) -> bool:
    """Whether a module's output is written into: by the model, or where the stream is, which it is."""
    return whole.is_overwritten or any(same(whole.left, stream) for stream in wiring.streams[1:-1])


def _gives(attention: Attention, contribution: Contribution) -> bool:
    return any(same(one.left, attention.output.left) for one in contribution.source)


def _other(
    trace: Trace, wiring: Wiring, contribution: Contribution, outside: list[Visit], findings: Findings, where: str
) -> Sublayer:
    """Returns the sublayer that adds a contribution without attending."""
    block = wiring.block
    modules = [one for one in contribution.source if one.module._modules]
    whole = min(modules, key=lambda one: one.depth) if modules else None
    if whole is not None and mixes_positions(whole, *block.size):
        return Sublayer("mixer", mixer_template(trace, block, whole, findings, where), contribution, whole)
    experts = None if whole is None else find_experts(trace, whole)
    if whole is not None and experts is not None:
        return Sublayer("mlp", find_mixture(trace, block, whole, experts, findings, where), contribution, whole)
    outs = [one for one in contribution.source if linear_kind(one)]
    own = find_per_layer_input(block, outside, outs[-1]) if whole is None and outs else None
    if own is not None:
        findings.add(f"{where}.ple", f"{own[1].path} gates {block.path}'s own input, {own[0].argument}")
        return Sublayer("ple", own[0], contribution, own[1])
    try:
        part, reader = find_mlp(trace, block, whole, contribution, outside, findings, where)
    except MixedError as error:
        findings.add(f"{where}.mixer", str(error))
        name = error.whole.path.removeprefix(f"{block.path}.")
        opaque = OpaqueBridge(name, output_is_overwritten=_is_written(error.whole, wiring))
        return Sublayer("mixer", opaque, contribution, error.whole)
    except MissingStructureError as error:
        if whole is None:
            raise
        findings.add(f"{where}.mlp", f"only the ends of {whole.path} are known: {error}")
        name = whole.path.removeprefix(f"{block.path}.")
        part, reader = OpaqueBridge(name, output_is_overwritten=whole.is_overwritten), whole
    return Sublayer("mlp", part, contribution, reader)


def _is(entered: Tensor | None, stream: Tensor) -> bool:
    """Whether a call reads a stream itself, and not what a norm makes of one that has the norm's scale already."""
    return (
        entered is not None and entered.numel() == stream.numel() and torch.equal(entered.flatten(), stream.flatten())
    )


def _locate(one: Sublayer, wiring: Wiring, trace: Trace) -> None:
    """Finds which stream a sublayer reads, and through which norm."""
    norms = [call for call in trace.inside(wiring.block) if norm_kind(call) and call.order < one.reader.order]
    for stage, stream in enumerate(wiring.streams[:-1]):
        if _is(one.reader.entered, stream) and not wiring.residual_norms:
            one.stage = stage
            return
        for norm in norms:
            if not same(norm.entered, stream) or norm.left is None or one.reader.entered is None:
                continue
            multiplier = factor(norm.left, one.reader.entered)
            if multiplier is not None:
                one.stage, one.norm, one.multiplier = stage, norm, multiplier
                return
        if same(one.reader.entered, stream) and not wiring.residual_norms:
            one.stage = stage
            return
    raise MissingStructureError(f"{one.reader.path} reads the residual stream neither as it is nor through a norm")
