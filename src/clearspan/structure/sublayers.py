"""The sublayers of a block: of which kind each is, its template, and the norm that it reads the stream through."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clearspan.components import (
    AddingBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    LateBiasLinearBridge,
    LinearBridge,
    OpaqueBridge,
)
from clearspan.structure.algebra import factor, linear_kind, norm_kind, same
from clearspan.structure.attention import Attention, find_attention
from clearspan.structure.attention_templates import attention_template
from clearspan.structure.beside import find_beside
from clearspan.structure.experts import find_experts
from clearspan.structure.feeding import Feeders, find_feeders
from clearspan.structure.finding import Findings, MissingStructureError
from clearspan.structure.gated_norms import find_gated_norm
from clearspan.structure.mixers import mixer_template
from clearspan.structure.mixing import MixedError, mixes_positions
from clearspan.structure.mixture import find_mixture
from clearspan.structure.mlp import find_mlp
from clearspan.structure.opaque_attention import opaque_attention_template
from clearspan.structure.passed import find_passed
from clearspan.structure.per_layer_input import find_per_layer_input
from clearspan.structure.templates import call_number
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
        feed: The call whose output is added to the stream that it reads, or None.
        feeders: The parts that lead to that call, in the order of the forward, and the norms between, by name.
    """

    kind: str
    part: GeneralizedComponent
    contribution: Contribution
    reader: Visit
    stage: int = 0
    norm: Visit | None = None
    multiplier: float = 1.0
    feed: Visit | None = None
    feeders: Feeders = field(default_factory=Feeders)


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
                part = _attention(attention, trace, wiring, contribution, findings, where)
            except MissingStructureError as error:
                findings.add(f"{where}.mixer", f"heads of {attention.path} are not shown: {error}")
            else:
                found.append(Sublayer("attn", part, contribution, attention.reader))
    rest = [one for one in wiring.contributions if not any(one is other.contribution for other in found)]
    passed = {id(one): before for one in rest if (before := find_passed(trace, wiring, one)) is not None}
    outside = [one for one in trace.inside(block) if not any(one.is_in(attention.path) for attention in taken)]
    for contribution in rest:
        before = passed.get(id(contribution))
        if before is not None:
            found.append(_passing(wiring, contribution, before, findings, where))
            continue
        found.append(_other(trace, wiring, contribution, outside, findings, where))
    found.sort(key=lambda one: min(call.order for call in one.contribution.calls))
    for one in found:
        _locate(one, wiring, trace)
        if isinstance(one.part, GeneralAttentionBridge) and one.norm is not None:
            one.part.norms_input = one.norm.is_in(f"{block.path}.{one.part.name}")
        if one.feed is not None:
            others = [other for other in attentions if other not in taken and other.output.order <= one.feed.order]
            one.feeders = find_feeders(trace, block, one.feed, others, findings, where)
            taken += others
    shown = [before.path for before in passed.values()]
    lost = [one for one in attentions if one not in taken and not any(one.output.is_in(path) for path in shown)]
    if lost:
        raise MissingStructureError(f"{lost[0].output.path} gives none of what {block.path} adds")
    return found


def _attentions(trace: Trace, block: Visit, findings: Findings, where: str) -> list[Attention]:
    """Returns the attentions of a block whose modules are found; others are mixers of which the ends are known."""
    found = []
    for one in () if trace.hides_heads else trace.attended:
        if one.path.startswith(f"{block.path}."):
            try:
                found.append(find_attention(trace, block, one))
            except MissingStructureError as error:
                findings.add(f"{where}.mixer", f"heads of {one.path} are not shown: {error}")
    return found


def _attention(
    attention: Attention,
    trace: Trace,
    wiring: Wiring,
    contribution: Contribution,
    findings: Findings,
    where: str,
) -> GeneralAttentionBridge:
    """Returns the template of an attention in a block."""
    whole = next((one for one in trace.at(attention.path) if one.order > wiring.block.order), None)
    overwritten = whole is not None and _is_written(whole, wiring)
    part = attention_template(attention, trace, wiring.block, findings, where, overwritten=overwritten)
    if contribution.late_bias:
        part.submodules = {**part.submodules, "o": _with_late_bias(part, contribution.late_bias)}
    if whole is not None and not wiring.residual_norms:
        part.same_inputs = same_arguments(whole)  # else the module is also given the stream that it adds to
    if whole is not None and attention.source is None and attention.value.norm is None:
        part.bounds_values = bounds_values(trace, whole, attention.value.map, attention.value.channels)
    return part


def _with_late_bias(part: GeneralizedComponent, path: str) -> GeneralizedComponent:
    """Returns the output projection with a bias of the module around it, which the block adds.

    Raises:
        MissingStructureError: The bias is elsewhere, or the projection has one of its own.
    """
    around, _, name = path.rpartition(".")
    o = part.submodules["o"]
    if around != part.name or type(o) is not LinearBridge:
        raise MissingStructureError(f"{path} is added to the output of another module")
    return LateBiasLinearBridge(o.name, late_bias=name, layout=o.layout)


def _is_written(whole: Visit, wiring: Wiring) -> bool:
    """Whether a module's output is written into: by the model, or where the stream is, which it is."""
    return whole.is_overwritten or any(same(whole.left, stream) for stream in wiring.streams[1:-1])


def _gives(attention: Attention, contribution: Contribution) -> bool:
    return any(same(one.left, attention.output.left) for one in contribution.source)


def _passing(wiring: Wiring, contribution: Contribution, before: Visit, findings: Findings, where: str) -> Sublayer:
    """Returns a sublayer whose output another module changes before it is added: its ends are known."""
    block = wiring.block
    kind = "mixer" if mixes_positions(before, *block.size) else "mlp"
    findings.add(
        f"{where}.{kind}", f"{contribution.source[0].path} changes what {before.path} gives before it is added"
    )
    name = before.path.removeprefix(f"{block.path}.")
    return Sublayer(kind, OpaqueBridge(name, output_is_overwritten=_is_written(before, wiring)), contribution, before)


def _other(
    trace: Trace, wiring: Wiring, contribution: Contribution, outside: list[Visit], findings: Findings, where: str
) -> Sublayer:
    """Returns the sublayer that adds a contribution without attending.

    Raises:
        MissingStructureError: The block adds a bias to it.
    """
    if contribution.late_bias:
        raise MissingStructureError(f"{contribution.late_bias} is added to what is no attention")
    block = wiring.block
    modules = [one for one in contribution.source if one.module._modules]
    whole = min(modules, key=lambda one: one.depth) if modules else None
    seen = None if whole is None else opaque_attention_template(trace, block, whole, findings, where)
    if whole is not None and seen is not None:
        return Sublayer("attn", seen, contribution, whole)
    if whole is not None and _mixes(trace, block, whole):
        mixer = mixer_template(trace, block, whole, findings, where)
        mixer.same_inputs = same_arguments(whole)
        return Sublayer("mixer", mixer, contribution, whole)
    if contribution.summands:
        part, reader = find_beside(trace, block, contribution, findings, where)
        return Sublayer("mlp", part, contribution, reader)
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
            return _adding(trace, wiring, contribution, findings, where, error)
        findings.add(f"{where}.mlp", f"only the ends of {whole.path} are known: {error}")
        name = whole.path.removeprefix(f"{block.path}.")
        part, reader = OpaqueBridge(name, output_is_overwritten=whole.is_overwritten), whole
    return Sublayer("mlp", part, contribution, reader)


def _mixes(trace: Trace, block: Visit, whole: Visit) -> bool:
    rows, positions = reversed(block.size) if trace.turns else block.size
    return mixes_positions(whole, rows, positions, turns=trace.turns)


def _adding(
    trace: Trace,
    wiring: Wiring,
    contribution: Contribution,
    findings: Findings,
    where: str,
    error: MissingStructureError,
) -> Sublayer:
    """Returns the sublayer whose module adds its contribution to the stream itself.

    Raises:
        MissingStructureError: No module that reads a stream makes the contribution.
    """
    block, out = wiring.block, contribution.source[-1]
    around = [one for one in trace.inside(block) if one is not out and one.module._modules and out.is_in(one.path)]
    reading = [one for one in around if any(_is(one.entered, stream) for stream in wiring.streams)]
    if not reading:
        raise error
    whole = max(reading, key=lambda one: one.depth)
    name = whole.path.removeprefix(f"{block.path}.")
    kind = "mixer" if _mixes(trace, block, whole) else "mlp"
    findings.add(f"{where}.{kind}", f"only the ends of {whole.path} are known: {error}")
    end = GeneralizedComponent(out.path.removeprefix(f"{whole.path}."), call=call_number(trace, out))
    return Sublayer(kind, AddingBridge(name, submodules={"out": end}), contribution, whole)


def _is(entered: Tensor | None, stream: Tensor) -> bool:
    """Whether a call reads a stream itself, and not what a norm makes of one that has the norm's scale already."""
    return (
        entered is not None and entered.numel() == stream.numel() and torch.equal(entered.flatten(), stream.flatten())
    )


def _locate(one: Sublayer, wiring: Wiring, trace: Trace) -> None:
    """Finds which stream a sublayer reads, and through which norm."""
    earlier = [call for call in trace.inside(wiring.block) if call.order < one.reader.order]
    norms = [call for call in earlier if norm_kind(call) or find_gated_norm(trace, call)]
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
    if _locate_fed(one, wiring, trace, norms):
        return
    raise MissingStructureError(f"{one.reader.path} reads the residual stream neither as it is nor through a norm")


def _locate_fed(one: Sublayer, wiring: Wiring, trace: Trace, norms: Sequence[Visit]) -> bool:
    """Finds a stream, and a call whose output is added to it, of which a sublayer reads the sum through a norm."""
    earlier = [call for call in trace.inside(wiring.block) if call.order < one.reader.order]
    for norm in reversed(norms):
        if norm.entered is None or norm.left is None or one.reader.entered is None:
            continue
        multiplier = factor(norm.left, one.reader.entered)
        for stage, stream in enumerate(wiring.streams[:-1]):
            if multiplier is None or norm.entered.shape != stream.shape:
                continue
            added = (norm.entered.double() - stream.double()).to(stream.dtype)
            feed = next((call for call in reversed(earlier) if same(call.left, added, norm.entered.abs().max())), None)
            if feed is not None:
                one.stage, one.norm, one.multiplier, one.feed = stage, norm, multiplier, feed
                return True
    return False
