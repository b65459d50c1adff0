"""Whether heads are linear in values: else another basis of values changes what they compute."""

import torch
from torch import Tensor

from clearspan.structure.algebra import same
from clearspan.structure.trace import Trace, Visit, fresh_arguments, traced

LARGE = 1000.0
"""Times a value: far over any bound that a model sets."""


def bounds_values(trace: Trace, whole: Visit, values: Visit, channels: list[int]) -> bool:
    """Returns whether what heads find does not grow with values: they are bounded, or a mask is made of them.

    Args:
        trace: The traced forward.
        whole: The call of attention's module.
        values: The call of the map to values.
        channels: The channels of its output that are values.
    """
    wanted = next(one for one in trace.attended if whole.order <= one.order < whole.end)

    def grown(left: Tensor) -> Tensor:
        number = torch.ones(left.shape[-1], dtype=left.dtype, device=left.device)
        number[channels] = LARGE
        return left * number

    args, kwargs = fresh_arguments(whole)
    path = values.path.removeprefix(f"{whole.path}.")
    again = traced(whole.module, lambda: whole.module(*args, **kwargs), {path: grown}).attended
    return bool(again) and not same(again[0].result, wanted.result * LARGE)
