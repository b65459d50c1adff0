"""The list of blocks, which one residual stream passes."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from clearspan.components import StreamsLayout
from clearspan.structure.algebra import factor, norm_kind, same
from clearspan.structure.finding import MissingStructureError
from clearspan.structure.streams import collapse_of, layout_of
from clearspan.structure.trace import Trace, Visit
from clearspan.structure.wiring import find_wiring


class NoModuleError(MissingStructureError):
    """Layers are there, and no module is one."""


@dataclass(frozen=True)
class Blocks:
    """The blocks.

    Attributes:
        path: The path of their list, or of the last one.
        visits: The call of each block.
        others: Paths of further lists, where blocks are in several.
        multipliers: What the model multiplies each block's output by before it is the stream that the next one reads, or
            the final norm (RWKV); empty where by nothing.
        entry: The call of a norm in the first block whose output is the stream, where the block's own input is what that
            norms (RWKV), or None; the first of `visits` is then given its output.
        is_woven: Whether a block is called several times, or something else than blocks is between them.
        streams: How the streams of the residual lie, where it has several; None where it is one.
        collapsed: The call that makes one vector of the streams that leave the last block.
    """

    path: str
    visits: tuple[Visit, ...]
    others: tuple[str, ...] = field(default=())
    is_woven: bool = False
    multipliers: tuple[float, ...] = ()
    entry: Visit | None = None
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
        return left * self.multipliers[-1] if self.multipliers and self.collapsed is None else left

    @property
    def end(self) -> int:
        """Order of the last call before what reads the stream out."""
        return (self.visits[-1] if self.collapsed is None else self.collapsed).order

    @property
    def lists(self) -> tuple[str, ...]:
        """The paths of all lists."""
        return (self.path, *self.others)

    def list_of(self, layer: int) -> str:
        """Returns the path of the list that a layer's block is in."""
        return self.visits[layer].path.rpartition(".")[0]

    def index_of(self, layer: int) -> int | None:
        """Returns the place of a layer's block in its list, or None where it is the layer."""
        index = int(self.visits[layer].path.rpartition(".")[2])
        return None if index == layer else index

    def follows(self, layer: int) -> bool:
        """Whether the stream that enters a layer is the one that left the layer before."""
        before = self.visits[layer - 1].left if layer > 0 else None
        if before is None:
            return False
        return same(before * self.multipliers[layer - 1] if self.multipliers else before, self.visits[layer].entered)


def find_blocks(model: nn.Module, trace: Trace) -> Blocks:
    """Returns the longest list of modules that hand one tensor on, each to the next.

    Raises:
        MissingStructureError: There is none.
    """
    lists = dict(called_lists(model, trace, is_part_enough=True))
    streams = {visit.left.ndim for calls in lists.values() for visit in calls if visit.left is not None}
    once = {path: calls for path, calls in lists.items() if len({visit.path for visit in calls}) == len(calls)}
    found = [
        Blocks(path, tuple(calls), multipliers=() if all(one == 1 for one in by) else by)
        for path, calls in once.items()
        if (by := _multipliers(calls, trace)) is not None
    ]
    if not found:
        beside = _side_by_side(lists)
        if beside:
            raise NoModuleError(f"no module is a block: layers are made of parts of {' and '.join(beside)}")
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


def called_lists(model: nn.Module, trace: Trace, *, is_part_enough: bool = False) -> Iterator[tuple[str, list[Visit]]]:
    """Yields the lists of modules that are called, each with the calls in their order.

    Args:
        model: The model.
        trace: A traced forward.
        is_part_enough: Whether most of a list's modules are enough: a text passes by layers for images (Mllama).
    """
    for path, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList) and len(modules):
            calls = [trace.at(f"{path}.{index}") for index in range(len(modules))]
            called = sum(map(bool, calls))
            if called == len(calls) or (is_part_enough and 2 * called > len(calls)):
                yield path, sorted(itertools.chain.from_iterable(calls), key=lambda visit: visit.order)


def _side_by_side(lists: Mapping[str, Sequence[Visit]]) -> list[str]:
    """Returns the paths of lists whose modules make up layers together, none of which is a module (XLM); or nothing."""
    for path, calls in lists.items():
        around = path.rpartition(".")[0]
        beside = [other for other in lists if other.rpartition(".")[0] == around and len(lists[other]) == len(calls)]
        layers = list(zip(*(lists[other] for other in beside), strict=True))
        orders = [sorted(one.order for one in layer) for layer in layers]
        if len(beside) > 1 and len(layers) > 1 and all(a[-1] < b[0] for a, b in itertools.pairwise(orders)):
            return beside
    return []


def _multipliers(visits: Sequence[Visit], trace: Trace) -> tuple[float, ...] | None:
    """Returns what each call's output is multiplied by before the next one's input; None where they are no chain."""
    tensors = [(visit.entered, visit.left) for visit in visits]
    if any(a is None or b is None or a.shape != b.shape or a.ndim not in (3, 4) for a, b in tensors):
        return None
    found = []
    for (_, left), (entered, _) in itertools.pairwise(tensors):
        assert left is not None, "looked at above"
        assert entered is not None, "likewise"
        number = 1.0 if same(left, entered) else factor(left, entered)
        if number is None:
            return None
        found.append(number)
    return (*found, 1.0 if all(one == 1 for one in found) else _last_multiplier(visits[-1], trace))


def _last_multiplier(last: Visit, trace: Trace) -> float:
    """Returns what the last block's output is multiplied by before a norm reads it; 1 where none does."""
    assert last.left is not None, "a block returns the stream"
    for one in trace.visits[last.end :]:
        if norm_kind(one) and one.entered is not None:
            number = factor(last.left, one.entered)
            if number is not None:
                return number
    return 1.0


def with_entry(blocks: Blocks, trace: Trace) -> Blocks:
    """Returns blocks of which the first may begin with a norm, whose output is then the stream that enters.

    Where it does, sublayers add to the norm's output, and not to what the block is given.
    """
    first = blocks.visits[0]
    if blocks.streams is not None or _is_wired(trace, first):
        return blocks
    for norm in trace.inside(first):
        if norm_kind(norm) and same(norm.entered, first.entered):
            begun = replace(first, entered=norm.left)
            if _is_wired(trace, begun):
                return replace(blocks, visits=(begun, *blocks.visits[1:]), entry=norm)
    return blocks


def _is_wired(trace: Trace, block: Visit) -> bool:
    try:
        find_wiring(trace, block)
    except MissingStructureError:
        return False
    return True
