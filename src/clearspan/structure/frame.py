"""The list of blocks, which one residual stream passes."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from clearspan.structure.algebra import same
from clearspan.structure.finding import MissingStructureError
from clearspan.structure.trace import Trace, Visit


@dataclass(frozen=True)
class Blocks:
    """The blocks.

    Attributes:
        path: The path of their list, or of the last one.
        visits: The call of each block.
        others: Paths of further lists, where blocks are in several.
        is_woven: Whether a block is called several times, or something else than blocks is between them.
    """

    path: str
    visits: tuple[Visit, ...]
    others: tuple[str, ...] = field(default=())
    is_woven: bool = False

    @property
    def first(self) -> Tensor:
        """The residual stream that enters the first block."""
        assert self.visits[0].entered is not None, "a block reads the stream"
        return self.visits[0].entered

    @property
    def last(self) -> Tensor:
        """The residual stream that leaves the last block."""
        assert self.visits[-1].left is not None, "a block returns the stream"
        return self.visits[-1].left

    @property
    def lists(self) -> tuple[str, ...]:
        """The paths of all lists."""
        return (self.path, *self.others)

    def list_of(self, layer: int) -> str:
        """Returns the path of the list that a layer's block is in."""
        return self.visits[layer].path.rpartition(".")[0]

    def follows(self, layer: int) -> bool:
        """Whether the stream that enters a layer is the one that left the layer before."""
        return layer > 0 and same(self.visits[layer - 1].left, self.visits[layer].entered)


def find_blocks(model: nn.Module, trace: Trace) -> Blocks:
    """Returns the longest list of modules that hand one tensor on, each to the next.

    Raises:
        MissingStructureError: There is none.
    """
    lists = dict(called_lists(model, trace))
    streams = {visit.left.ndim for calls in lists.values() for visit in calls if visit.left is not None}
    once = {path: calls for path, calls in lists.items() if len({visit.path for visit in calls}) == len(calls)}
    found = [Blocks(path, tuple(calls)) for path, calls in once.items() if _is_chain(calls)]
    if not found:
        axes = f"; lists of modules hand on tensors of {sorted(streams)} axes" if streams else ""
        raise MissingStructureError(f"no list of blocks hands one residual stream on{axes}")
    return max(found, key=lambda one: (len(one.visits), -one.path.count(".")))


def called_lists(model: nn.Module, trace: Trace) -> Iterator[tuple[str, list[Visit]]]:
    """Yields the lists of modules that are all called, each with the calls in their order."""
    for path, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList) and len(modules):
            calls = [trace.at(f"{path}.{index}") for index in range(len(modules))]
            if all(calls):
                yield path, sorted(itertools.chain.from_iterable(calls), key=lambda visit: visit.order)


def _is_chain(visits: Sequence[Visit]) -> bool:
    tensors = [(visit.entered, visit.left) for visit in visits]
    if any(a is None or b is None or a.shape != b.shape or a.ndim != 3 for a, b in tensors):
        return False
    return all(same(before[1], after[0]) for before, after in itertools.pairwise(tensors))
