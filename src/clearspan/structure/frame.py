"""The list of blocks, which one residual stream passes."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from clearspan.structure.algebra import same
from clearspan.structure.finding import MissingStructureError
from clearspan.structure.trace import Trace, Visit


@dataclass(frozen=True)
class Blocks:
    """The list of blocks.

    Attributes:
        path: Its path.
        visits: The call of each block.
    """

    path: str
    visits: tuple[Visit, ...]

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
    return max(found, key=lambda one: (len(one.visits), -one.path.count(".")))


def _is_chain(visits: Sequence[Visit]) -> bool:
    tensors = [(visit.entered, visit.left) for visit in visits]
    if any(a is None or b is None or a.shape != b.shape or a.ndim != 3 for a, b in tensors):
        return False
    return all(same(before[1], after[0]) for before, after in itertools.pairwise(tensors))
