"""The list of blocks, which one residual stream passes."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from clearspan.components import StreamsLayout
from clearspan.structure.algebra import same
from clearspan.structure.finding import MissingStructureError
from clearspan.structure.streams import collapse_of, layout_of
from clearspan.structure.trace import Trace, Visit


@dataclass(frozen=True)
class Blocks:
    """The list of blocks.

    Attributes:
        path: Its path.
        visits: The call of each block.
        streams: How the streams of the residual lie, where it has several; None where it is one.
        collapsed: The call that makes one vector of the streams that leave the last block.
    """

    path: str
    visits: tuple[Visit, ...]
    streams: StreamsLayout | None = None
    collapsed: Visit | None = None

    @property
    def first(self) -> Tensor:
        """The residual stream that enters the first block; of several, the first."""
        entered = self.visits[0].entered
        assert entered is not None, "a block reads the stream"
        return entered if self.streams is None else self.streams.shown(entered)[:, :, 0]

    @property
    def last(self) -> Tensor:
        """The residual stream that leaves the last block; of several, the vector that is made of them."""
        left = self.visits[-1].left if self.collapsed is None else self.collapsed.left
        assert left is not None, "a block returns the stream"
        return left

    @property
    def end(self) -> int:
        """Order of the last call before what reads the stream out."""
        return (self.visits[-1] if self.collapsed is None else self.collapsed).order


def find_blocks(model: nn.Module, trace: Trace) -> Blocks:
    """Returns the longest list of modules that hand one tensor on, each to the next.

    Raises:
        MissingStructureError: There is none.
    """
    found: list[Blocks] = []
    streams: set[int] = set()
    for path, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList) or not len(modules):
            continue
        calls = [trace.at(f"{path}.{index}") for index in range(len(modules))]
        if all(len(one) == 1 for one in calls):
            visits = tuple(one[0] for one in calls)
            streams |= {visit.left.ndim for visit in visits if visit.left is not None}
            if _is_chain(visits):
                found.append(Blocks(path, visits))
    if not found:
        axes = f"; lists of modules hand on tensors of {sorted(streams)} axes" if streams else ""
        raise MissingStructureError(f"no list of blocks hands one residual stream on{axes}")
    return _with_streams(trace, max(found, key=lambda one: (len(one.visits), -one.path.count("."))))


def _with_streams(trace: Trace, blocks: Blocks) -> Blocks:
    """Returns the blocks with how the streams of their residual lie, where it has several.

    Raises:
        MissingStructureError: No module makes one vector of them in the end.
    """
    first, last = blocks.visits[0], blocks.visits[-1]
    embedded = next((one.left for one in trace.visits[: first.order] if _is_embedding(one)), None)
    assert first.entered is not None, "blocks hand tensors on"
    streams = layout_of(first.entered, embedded)
    if streams is None:
        return blocks
    return replace(blocks, streams=streams, collapsed=collapse_of(trace, streams, last))


def _is_embedding(visit: Visit) -> bool:
    return isinstance(visit.module, nn.Embedding) and visit.left is not None and visit.left.ndim == 3


def _is_chain(visits: Sequence[Visit]) -> bool:
    tensors = [(visit.entered, visit.left) for visit in visits]
    if any(a is None or b is None or a.shape != b.shape or a.ndim not in (3, 4) for a, b in tensors):
        return False
    return all(same(before[1], after[0]) for before, after in itertools.pairwise(tensors))
