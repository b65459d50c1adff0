"""A block's template, put together from its wiring and its sublayers."""

from collections.abc import Sequence

from clearspan.components import BlockBridge, GeneralizedComponent, MultiStreamBlockBridge, StreamsLayout
from clearspan.components.factors import Factor
from clearspan.components.multi_stream import connection_of
from clearspan.points import Layout
from clearspan.structure.finding import Findings, MissingStructureError
from clearspan.structure.gated_norms import find_gated_norm, gated_norm_template
from clearspan.structure.leftover import account_for_all
from clearspan.structure.streams import find_stream_wiring
from clearspan.structure.sublayers import Sublayer, find_sublayers
from clearspan.structure.templates import call_number, norm_template
from clearspan.structure.trace import Trace, Visit
from clearspan.structure.wiring import Wiring, find_wiring


def block_template(
    trace: Trace,
    block: Visit,
    path: str,
    findings: Findings,
    where: str,
    streams: StreamsLayout | None = None,
    *,
    multiplier: float = 1.0,
    entry: Visit | None = None,
) -> BlockBridge:
    """Returns the template of one block.

    Args:
        trace: The traced forward.
        block: The block's call.
        path: Path of the list of blocks.
        findings: Where to say what was found.
        where: The block's canonical path.
        streams: How the streams of the residual lie, where it has several.
        multiplier: What the model multiplies the block's output by.
        entry: The call of a norm in the block whose output is the stream, where the block's own input is not; or None.

    Raises:
        MissingStructureError: A sublayer or the wiring was not found.
    """
    wiring = find_wiring(trace, block) if streams is None else find_stream_wiring(trace, block, streams)
    if multiplier != 1:
        if wiring.scalar is not None:
            raise MissingStructureError(f"{block.path}.{wiring.scalar} and {multiplier} multiply the stream")
        wiring.scalar = multiplier
    sublayers = find_sublayers(trace, wiring, findings, where)
    names = _names(sublayers)
    stages = _stages(sublayers, names)
    norms, other_names = _norms(wiring, sublayers, names, stages)
    parts: dict[str, GeneralizedComponent] = dict(wiring.extra)
    for index, (name, one) in enumerate(zip(names, sublayers, strict=True)):
        before, behind = other_names.get(name, _norm_name(index, stages, name, norms)), f"ln{index + 1}_post"
        if before in norms and before not in parts and not wiring.norms_the_sum:
            parts[before] = _norm(trace, norms[before], block)
        parts |= one.feeders.parts
        parts[name] = one.part
        if wiring.connections:
            parts[connection_of(name)] = wiring.connections[index]
        if one.contribution.post_norm is not None:
            parts[behind] = _norm(trace, one.contribution.post_norm, block)
        if wiring.norms_the_sum:
            own = _norm(trace, wiring.norms_the_sum[index], block)
            own.output_is_overwritten = index < len(sublayers) - 1  # it is the stream, into which writes go
            parts[f"ln{index + 1}"] = own
    outs = {
        name: out for name, one in zip(names, sublayers, strict=True) if (out := _out(one, block, trace)) is not None
    }
    whole = GeneralizedComponent(submodules=parts)
    readers, factors = (
        [one.reader for one in sublayers],
        {*wiring.carries, *(one.factor for one in wiring.contributions)},
    )
    if wiring.scalar is not None:
        factors.add(wiring.scalar)
        name = f"{block.path}.{wiring.scalar}" if isinstance(wiring.scalar, str) else wiring.scalar
        findings.add(where, f"{name} multiplies the stream at the block's end")
    begins_at = None if entry is None else entry.path.removeprefix(f"{block.path}.")
    if begins_at is not None:
        factors.add(begins_at)
        findings.add(where, f"{block.path}.{begins_at} norms what enters, and its output is the stream")
    account_for_all(block.module, whole, trace.inside(block), block.path, readers, irrelevant=factors)
    made = BlockBridge(
        name=path,
        submodules=whole.submodules,
        stages=stages,
        norms=other_names,
        outs=outs,
        added_with={name: names[-1] for name, one in zip(names, sublayers, strict=True) if one.contribution.is_late},
        residual_multiplier=_multiplier(sublayers, names, () if wiring.scalar is None else stages[-1], wiring.scalar),
        input_multipliers={
            name: one.multiplier for name, one in zip(names, sublayers, strict=True) if one.multiplier != 1
        },
        fed_by={name: one.feeders.names for name, one in zip(names, sublayers, strict=True) if one.feed is not None},
        stream_multiplier=_carry(wiring, len(stages)),
        post_multiplier=multiplier,
        begins_at=begins_at,
        norms_the_sum=bool(wiring.norms_the_sum),
        residual_is_normed=bool(wiring.residual_norms),
        reads_copies=tuple(name for name, one in zip(names, sublayers, strict=True) if _reads_copy(one, wiring)),
    )
    return made if streams is None else _of_streams(made, streams)


def _of_streams(block: BlockBridge, streams: StreamsLayout) -> MultiStreamBlockBridge:
    """Returns the template of a block of several streams, from that of one with the same sublayers."""
    return MultiStreamBlockBridge(
        name=block.name,
        submodules=block.submodules,
        stages=block.stages,
        norms=block.norms,
        outs=block.outs,
        input_multipliers=block.input_multipliers,
        streams=streams,
        adds_first="streams_added" in block.submodules,
    )


def _names(sublayers: Sequence[Sublayer]) -> list[str]:
    """Returns a name for each sublayer: its kind, with a number where there are several of it."""
    names: list[str] = []
    for one in sublayers:
        before = sum(name.rstrip("23456789") == one.kind for name in names)
        names.append(f"{one.kind}{before + 1}" if before else one.kind)
    return names


def _reads_copy(one: Sublayer, wiring: Wiring) -> bool:
    """Whether a sublayer is given a copy of the stream that a norm gave, so that the stream is not written there."""
    if not wiring.norms_the_sum or not one.stage:
        return False
    return one.reader.entered_at != wiring.norms_the_sum[one.stage - 1].left_at


def _stages(sublayers: Sequence[Sublayer], names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Returns the names of sublayers that read the same stream, stream by stream."""
    read = sorted({one.stage for one in sublayers})
    return tuple(
        tuple(name for name, one in zip(names, sublayers, strict=True) if one.stage == stage) for stage in read
    )


def _norms(
    wiring: Wiring, sublayers: Sequence[Sublayer], names: Sequence[str], stages: Sequence[Sequence[str]]
) -> tuple[dict[str, Visit], dict[str, str]]:
    """Returns the norms before sublayers by canonical name, and sublayers whose norm the rule does not name."""
    if wiring.norms_the_sum:
        return {}, {}
    different = list(dict.fromkeys(one.norm for one in sublayers if one.norm is not None))
    by_stage = len(different) <= len(stages)
    norms: dict[str, Visit] = {}
    others: dict[str, str] = {}
    for index, (name, one) in enumerate(zip(names, sublayers, strict=True)):
        if one.norm is None:
            continue
        stage = next(number for number, stage in enumerate(stages) if name in stage)
        rule = f"ln{stage + 1}" if by_stage else f"ln{index + 1}"
        known = next((key for key, there in norms.items() if there is one.norm), None)
        if known is None:
            known = rule if rule not in norms else f"ln{len(norms) + 1}"
            norms[known] = one.norm
        if known != rule:
            others[name] = known
    return norms, others


def _norm_name(index: int, stages: Sequence[Sequence[str]], name: str, norms: dict[str, Visit]) -> str:
    stage = next(number for number, stage in enumerate(stages) if name in stage)
    return f"ln{stage + 1}" if len(norms) <= len(stages) else f"ln{index + 1}"


def _norm(trace: Trace, visit: Visit, block: Visit) -> GeneralizedComponent:
    assert visit.left is not None, "a norm has an output"
    gated = find_gated_norm(trace, visit)
    if gated is not None:
        return gated_norm_template(gated, visit.path.removeprefix(f"{block.path}."))
    layout = Layout.FLAT if visit.left.ndim == 2 else Layout.TOKENS
    template = norm_template(visit, visit.path.removeprefix(f"{block.path}."), layout)
    template.call = call_number(trace, visit)
    return template


def _multiplier(
    sublayers: Sequence[Sublayer], names: Sequence[str], last: Sequence[str], scalar: Factor | None
) -> Factor | dict[str, Factor]:
    """Returns what contributions are multiplied by: all of them, or each; those of the last stage by a number besides.

    Raises:
        MissingStructureError: Those of the last stage are multiplied by two factors.
    """
    numbers = {name: one.contribution.factor for name, one in zip(names, sublayers, strict=True)}
    if scalar is not None:
        if any(numbers[name] != 1 for name in last):
            raise MissingStructureError(f"{scalar} multiplies contributions that have a factor of their own")
        numbers |= dict.fromkeys(last, scalar)
    return next(iter(numbers.values())) if len(set(numbers.values())) == 1 else numbers


def _carry(wiring: Wiring, n_stages: int) -> Factor | list[Factor]:
    """Returns what the stream is multiplied by: at all stages, or at each."""
    numbers = wiring.carries or [1.0] * n_stages
    if wiring.scalar is not None:
        if numbers[-1] != 1 or len(numbers) != n_stages:
            raise MissingStructureError(f"{wiring.scalar} multiplies a stream that has a factor of its own")
        numbers = [*numbers[:-1], wiring.scalar]
    return numbers[0] if len(set(numbers)) == 1 else numbers


def _out(one: Sublayer, block: Visit, trace: Trace) -> str | None:
    """Returns the path of the module whose output a sublayer adds, where that is not the sublayer's own module."""
    if one.contribution.post_norm is not None:
        return None
    calls = one.contribution.calls
    last = one.part.name or getattr(one.part.submodules.get("out"), "name", None)
    own = next((call for call in calls if call.path == f"{block.path}.{last}"), None)
    if own is None:
        once = [call for call in calls if len(trace.at(call.path)) == 1]
        outermost = max(once or calls, key=lambda call: (-call.depth, call.order))
        return outermost.path.removeprefix(f"{block.path}.")
    after = [call for call in calls if call.order > own.order and not call.is_in(own.path)]
    once = [call for call in after if len(trace.at(call.path)) == 1]  # dropout of two sublayers is in neither's place
    return once[-1].path.removeprefix(f"{block.path}.") if once else None
