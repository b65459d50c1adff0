"""Residuals of several streams: where they lie, what collapses them, and how sublayers read and write them."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from clearspan.components import GeneralizedComponent, HyperConnectionBridge, StreamsBridge, StreamsLayout
from clearspan.points import Layout
from clearspan.structure.algebra import same
from clearspan.structure.finding import MissingStructureError
from clearspan.structure.tokens import POSITIONS, ROWS
from clearspan.structure.trace import Trace, Visit
from clearspan.structure.wiring import Contribution, Wiring, look_behind_norm


def layout_of(entering: Tensor, embedded: Tensor | None) -> StreamsLayout | None:
    """Returns how several streams lie in what enters the first block; None where it is one.

    Args:
        entering: What enters the first block.
        embedded: What the token embedding gives, if anything.
    """
    shape = tuple(entering.shape)
    if entering.ndim == 4 and shape[:2] == (ROWS, POSITIONS):
        return StreamsLayout(shape[2])
    if entering.ndim == 4 and shape[1:3] == (ROWS, POSITIONS):
        return StreamsLayout(shape[0], Layout.STREAMS_FIRST)
    if entering.ndim != 3 or embedded is None or embedded.ndim != 3:
        return None
    n_streams, rest = divmod(shape[-1], embedded.shape[-1])
    if rest or n_streams < 2 or not same(entering, embedded.repeat(1, 1, n_streams)):
        return None
    return StreamsLayout(n_streams, is_joined=True)


def collapse_of(trace: Trace, streams: StreamsLayout, last: Visit) -> Visit:
    """Returns the call that makes one vector of the streams that leave the last block.

    Raises:
        MissingStructureError: No module does.
    """
    for one in trace.visits[last.end :]:
        if same(one.entered, last.left) and _is_one(one.left, _shown(streams, last.left)):
            return one
    raise MissingStructureError("no module makes one vector of the residual streams that leave the blocks")


def collapse_template(visit: Visit, streams: StreamsLayout) -> StreamsBridge:
    """Returns the template of what collapses the last streams."""
    return StreamsBridge(visit.path, streams=streams)


def _shown(streams: StreamsLayout, raw: Tensor | None) -> Tensor:
    assert raw is not None, "streams are a tensor"
    return streams.shown(raw)


def _is_one(value: Tensor | None, streams: Tensor) -> bool:
    """Whether a value is one vector for each position."""
    return value is not None and value.shape == (*streams.shape[:2], streams.shape[-1])


@dataclass(frozen=True, eq=False)
class _Connection:
    """The call of a hyper-connection, and its template without what the streams after its sublayer tell.

    Attributes:
        visit: The call.
        template: The template.
        read: The streams that it reads, in canonical axes.
        collapsed: What a sublayer reads of them.
        write: The weights `[batch, pos, stream]`.
        mixes: Its outputs `[batch, pos, stream, stream]`, by their number.
    """

    visit: Visit
    template: HyperConnectionBridge
    read: Tensor
    collapsed: Tensor
    write: Tensor
    mixes: dict[int, Tensor]


def find_stream_wiring(trace: Trace, block: Visit, streams: StreamsLayout) -> Wiring:
    """Returns how a block of several streams is wired: what its connections read, and what they write.

    Raises:
        MissingStructureError: The streams that leave it are not what connections make of those that enter it and of
            modules' outputs.
    """
    inside = trace.inside(block)
    connections = _connections(inside, streams, block)
    if not connections:
        raise MissingStructureError(f"no module of {block.path} makes one vector of the residual streams")
    extra: dict[str, GeneralizedComponent] = {}
    entered = _shown(streams, block.entered)
    added = _added(inside, streams, entered, connections[0], block)
    if added is not None:
        extra["streams_added"] = added
    after = [*(one.read for one in connections[1:]), _shown(streams, block.left)]
    ends = [*(one.visit.order for one in connections[1:]), block.end]
    written: list[dict[_Way, list[Visit]]] = []
    for one, target, end in zip(connections, after, ends, strict=True):
        calls = [call for call in inside if one.visit.end <= call.order < end and _is_one(call.left, entered)]
        written.append(_written(one, target, calls, block))
    contributions, templates = [], []
    for one, ways in zip(connections, written, strict=True):
        way = next((way for way in ways if all(way in others for others in written)), next(iter(ways)))
        calls = ways[way]
        value = calls[0].left
        assert value is not None, "calls without an output are left out"
        contributions.append(Contribution(calls, value))
        templates.append(replace(one.template, mix=way[0], mix_is_transposed=way[1]))
        look_behind_norm(contributions[-1], [call for call in inside if _is_one(call.left, entered)])
    assert block.left is not None, "a block returns the streams"
    # What looks for sublayers takes the first that is read for what enters the block.
    single = replace(block, entered=connections[0].collapsed)
    wiring = Wiring(single, contributions, [*(one.collapsed for one in connections), block.left])
    wiring.connections, wiring.extra = templates, extra
    return wiring


def _connections(inside: Sequence[Visit], streams: StreamsLayout, block: Visit) -> list[_Connection]:
    """Returns the hyper-connections of a block, in the order of the forward."""
    assert block.entered is not None, "a block reads the streams"
    found: list[_Connection] = []
    for call in inside:
        if call.entered is None or call.entered.shape != block.entered.shape or len(call.outputs) < 2:
            continue
        if any(call.is_in(one.visit.path) for one in found):
            continue
        read = streams.shown(call.entered)
        size, count = tuple(read.shape[:2]), streams.n_streams
        shapes = {index: tuple(one.shape) for index, one in enumerate(call.outputs) if isinstance(one, Tensor)}
        ones = [index for index, shape in shapes.items() if shape == (*size, read.shape[-1])]
        writes = [index for index, shape in shapes.items() if shape == (*size, count)]
        back = [index for index in shapes if same(call.outputs[index], call.entered)]
        if len(ones) != 1 or len(writes) != 1:
            continue
        template = HyperConnectionBridge(
            call.path.removeprefix(f"{block.path}."),
            streams=streams,
            collapse=ones[0],
            write=writes[0],
            hands_on=bool(back),
        )
        mixes = {index: call.outputs[index] for index, shape in shapes.items() if shape == (*size, count, count)}
        found.append(
            _Connection(call, template, read, call.outputs[ones[0]].clone(), call.outputs[writes[0]].clone(), mixes)
        )
    return found


def _added(
    inside: Sequence[Visit], streams: StreamsLayout, entered: Tensor, first: _Connection, block: Visit
) -> StreamsBridge | None:
    """Returns the part that adds to all streams before the first connection reads them; None where nothing does.

    Raises:
        MissingStructureError: Something does, and it is no module's output.
    """
    raw = first.visit.entered
    if raw is None or same(first.read, entered):
        return None
    for call in inside:
        if call.order >= first.visit.order or call.left is None or call.left.shape != raw.shape:
            continue
        if same(entered + streams.shown(call.left), first.read):
            name = call.path.removeprefix(f"{block.path}.")
            return StreamsBridge(name, streams=streams, gives_streams=True)
    raise MissingStructureError(f"{first.visit.path} reads other residual streams than {block.path} does")


def _written(one: _Connection, target: Tensor, calls: Sequence[Visit], block: Visit) -> "dict[_Way, list[Visit]]":
    """Returns the ways in which the streams after a connection are made, each with the calls whose output is written.

    There are several where all streams are the same, as those that enter the first block are.

    Raises:
        MissingStructureError: The streams after it are not what it makes of those before and of a module's output.
    """
    found: dict[_Way, list[Visit]] = {}
    for mix, is_transposed in _ways(one):
        kept = one.read if mix is None else _mixed(one.read, one.mixes[mix], is_transposed=is_transposed)
        rest = (target.double() - kept.double()).to(target.dtype)
        group = [
            call
            for call in calls
            if call.left is not None
            and same(one.write.to(rest.dtype).unsqueeze(-1) * call.left.unsqueeze(-2), rest, target.abs().max())
        ]
        if group:
            found[mix, is_transposed] = group
    if not found:
        raise MissingStructureError(
            f"the residual streams after {one.visit.path} are not those before and what it writes, in {block.path}"
        )
    return found


_Way = tuple[int | None, bool]
"""Which output of a connection mixes the streams, and whether the stream that is written to comes first in it."""


def _ways(one: _Connection) -> Iterator[_Way]:
    yield from itertools.product(one.mixes, (False, True))
    yield None, False


def _mixed(streams: Tensor, mix: Tensor, *, is_transposed: bool) -> Tensor:
    """Returns streams mixed by weights `[batch, pos, stream, to_stream]`, or with the last two axes swapped."""
    by = mix.to(streams.dtype) if is_transposed else mix.to(streams.dtype).transpose(-1, -2)
    return by @ streams
