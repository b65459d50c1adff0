"""Reversible blocks: they hand two residual streams on, each of which one half adds to and the other half reads."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from clearspan.hf.tensors import primary_input
from clearspan.structure.algebra import same
from clearspan.structure.frame import Blocks, called_lists
from clearspan.structure.trace import Trace, Visit

REASON = (
    "the block is reversible: it hands two residual streams on, of which the second is shown, and no sublayer reads "
    "the stream that it adds to"
)


def reversible_blocks(model: nn.Module, trace: Trace) -> Blocks | None:
    """Returns the longest list of reversible blocks, whose calls show one of two streams; None if there are none."""
    found = []
    for path, calls in called_lists(model, trace):
        visits = [_seen(one) for one in calls]
        if len({one.path for one in calls}) == len(calls) and all(map(_has_two, calls)) and _is_chain(visits):
            found.append(Blocks(path, tuple(visits), is_reversible=True))
    return max(found, key=lambda one: len(one.visits)) if found else None


def _has_two(visit: Visit) -> bool:
    """Whether a call is given, and gives, two tensors that are like the stream."""
    assert visit.entered is not None, "its module takes tensors"
    shape = visit.entered.shape
    sides = ((*visit.args, *visit.kwargs.values()), visit.outputs)
    return all(sum(isinstance(one, Tensor) and one.shape == shape for one in side) == 2 for side in sides)


def _is_chain(visits: Sequence[Visit]) -> bool:
    """Whether calls hand the stream that they show on, each to the next."""
    return all(same(before.left, after.entered) for before, after in itertools.pairwise(visits))


def _seen(visit: Visit) -> Visit:
    """Returns a call with the stream that points show: the input by its usual name, and the first output."""
    if visit.entered is None or not (visit.args or visit.kwargs):
        return visit
    return replace(visit, entered=primary_input(visit.args, visit.kwargs))
