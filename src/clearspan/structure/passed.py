"""Sublayers whose output passes another module before it is added to the residual stream, such as a convolution."""

from clearspan.structure.algebra import linear_kind, same
from clearspan.structure.gated_norms import find_gated_norm
from clearspan.structure.trace import Trace, Visit
from clearspan.structure.wiring import Contribution, Wiring


def find_passed(trace: Trace, wiring: Wiring, contribution: Contribution) -> Visit | None:
    """Returns the call whose output is changed by the module that gives a contribution, or None where there is none.

    Args:
        trace: The traced forward.
        wiring: The block's wiring.
        contribution: What is added.
    """
    inside = trace.inside(wiring.block)
    outer = min(contribution.source, key=lambda one: one.depth)
    if not outer.module._modules or any(same(outer.entered, stream) for stream in wiring.streams):
        return None
    if any(linear_kind(one) for one in trace.inside(outer)):
        return None  # it is a sublayer itself, and what it reads comes through a norm
    before = [
        one for one in inside if one.order < outer.order and one.module._modules and same(one.left, outer.entered)
    ]
    before = [one for one in before if not (outer.is_in(one.path) or find_gated_norm(trace, one))]
    return min(before, key=lambda one: one.depth) if before else None
