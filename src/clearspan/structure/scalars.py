"""Single numbers among a module's parameters and buffers that multiply what it returns."""

from dataclasses import replace

import torch
from torch import Tensor

from clearspan.structure.algebra import same
from clearspan.structure.trace import Visit, fresh_arguments, traced


def output_scalar(visit: Visit) -> str | None:
    """Returns the name of the module's own number whose doubling doubles its output, or None where there is none.

    It is found by doubling, so that a number that is 1 is found too.

    Args:
        visit: The call, which is made again.
    """
    for name, number in (*visit.module._parameters.items(), *visit.module._buffers.items()):
        if number is None or number.numel() != 1 or not number.is_floating_point() or not float(number):
            continue
        if visit.left is not None and same(_with(visit, number, float(number) * 2), visit.left * 2):
            return name
    return None


def unscaled(visit: Visit, name: str) -> Visit:
    """Returns a call with what it would have returned without one of the module's own numbers."""
    number = visit.module._parameters.get(name, visit.module._buffers.get(name))
    assert number is not None, "found as one of them"
    assert visit.left is not None, "it multiplies a tensor"
    return replace(visit, left=(visit.left.double() / number.detach().double().reshape(())).to(visit.left.dtype))


@torch.no_grad()
def _with(visit: Visit, number: Tensor, value: float) -> Tensor | None:
    """Returns what a call returns with another value of a number."""
    before = number.clone()
    args, kwargs = fresh_arguments(visit)
    try:
        number.fill_(value)
        return traced(visit.module, lambda: visit.module(*args, **kwargs)).visits[0].left
    finally:
        number.copy_(before)
