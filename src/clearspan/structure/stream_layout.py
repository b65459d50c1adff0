"""How rows and positions lie in the residual stream, where it is not `[batch, pos, d_model]` of the tokens alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from clearspan.components import (
    BlockBridge,
    GeneralizedComponent,
    RemainderBridge,
    StreamBlockBridge,
)
from clearspan.hf.tensors import as_tokens
from clearspan.points import Layout
from clearspan.structure.algebra import same
from clearspan.structure.frame import Blocks
from clearspan.structure.trace import Trace, Visit

NO_HEADS: Mapping[Layout, str] = {
    Layout.POS_FIRST: "positions come before rows in its tensors",
    Layout.LAST: "it also attends to positions before the tokens",
    Layout.FIRST: "it also attends to positions after the tokens",
    Layout.SECOND: "it attends in several streams at once",
}
"""Why heads are not shown where the stream lies otherwise."""


@dataclass(frozen=True)
class StreamLayout:
    """How the stream lies.

    Attributes:
        layout: How rows and positions lie in its tensors.
        rows: Rows of the traced forward.
        positions: Its tokens in a row.
        width: Positions in the stream's own tensors, tokens or not.
    """

    layout: Layout
    rows: int
    positions: int
    width: int

    def of(self, tensor: Tensor | None) -> Layout:
        """Returns how rows and positions lie in some tensor of the forward."""
        if tensor is None or tensor.ndim < 2 or tensor.shape[:2] == (self.rows, self.positions):
            return Layout.TOKENS
        if self.layout is Layout.POS_FIRST and tensor.shape[:2] == (self.positions, self.rows):
            return Layout.POS_FIRST
        if tensor.shape[:2] == (self.rows, self.width):
            return self.layout
        several = tensor.ndim == 4 and (tensor.shape[0], tensor.shape[2]) == (self.rows, self.positions)
        return Layout.FIRST_OF_SEVERAL if several and self.layout is Layout.SECOND else Layout.TOKENS

    def shown(self, tensor: Tensor | None) -> Tensor | None:
        """Returns a tensor of the forward with the tokens' rows and positions first."""
        return None if tensor is None else as_tokens(tensor, self.of(tensor), self.rows, self.positions)

    def seen(self, trace: Trace) -> Trace:
        """Returns a trace in which all tensors have the tokens' rows and positions first."""
        return replace(trace, visits=[self.visit(one) for one in trace.visits])

    def visit(self, one: Visit) -> Visit:
        """Returns a call with its tensors likewise."""
        return replace(one, entered=self.shown(one.entered), left=self.shown(one.left))

    def blocks(self, blocks: Blocks) -> Blocks:
        """Returns the blocks with their tensors likewise."""
        return replace(blocks, visits=tuple(map(self.visit, blocks.visits)), is_woven=True)


def layout_of(trace: Trace, blocks: Blocks, ids: Tensor) -> StreamLayout | None:
    """Returns how the stream lies, or None where it lies as `[batch, pos, d_model]`, or in no known way."""
    rows, positions = ids.shape
    first, second, _ = blocks.first.shape
    found = StreamLayout(Layout.POS_FIRST, rows, positions, second)
    if (first, second) == (positions, rows):
        return found
    if first != rows or second <= positions:
        return None
    ways = (Layout.LAST, Layout.FIRST, Layout.SECOND)
    return next((one for one in (replace(found, layout=way) for way in ways) if _is_read_out(trace, blocks, one)), None)


def _is_read_out(trace: Trace, blocks: Blocks, way: StreamLayout) -> bool:
    """Whether what a layout shows of the last stream, or of its norm, is what the unembedding reads."""
    d_vocab, after = trace.output.logits.shape[-1], trace.visits[blocks.visits[-1].order + 1 :]
    unembed = next((one for one in reversed(after) if one.left is not None and one.left.shape[-1] == d_vocab), None)
    if unembed is None:
        return False
    read = way.shown(unembed.entered)
    streams = [blocks.last, *(one.left for one in after if one.order < unembed.order)]
    return any(same(way.shown(stream), read) for stream in streams if stream is not None)


def lay_out(parts: Mapping[str, GeneralizedComponent], trace: Trace, way: StreamLayout, path: str = "") -> None:
    """Tells templates how rows and positions lie in the tensors at their modules."""
    for part, name in _paths(parts, path):
        calls = trace.at(name)
        call = calls[part.call or 0] if calls else None
        if call is not None and part.layout is Layout.TOKENS and not isinstance(part, RemainderBridge):
            part.layout = way.of(call.left if call.entered is None else call.entered)


def _paths(parts: Mapping[str, GeneralizedComponent], path: str) -> Iterator[tuple[GeneralizedComponent, str]]:
    for part in parts.values():
        own = ".".join(name for name in (path, part.name) if name)
        if part.name is not None:
            yield part, own
        yield from _paths(part.submodules, own)


def lay_out_block(block: BlockBridge, trace: Trace, way: StreamLayout, visit: Visit) -> None:
    """Tells a block's template, and all that is in it, how rows and positions lie."""
    block.layout = way.layout
    if not isinstance(block, StreamBlockBridge):
        lay_out(block.submodules, trace, way, visit.path)
