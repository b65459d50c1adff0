"""Gates of attention: what multiplies z before the output projection."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from clearspan.conversions import GateActivation, GateConversion
from clearspan.structure.algebra import as_tokens, linear_kind, same
from clearspan.structure.trace import Attended, Visit


@dataclass(frozen=True)
class Gate:
    """What multiplies z before the output projection.

    Attributes:
        map: The call of the linear map that it comes from.
        activation: The function that makes it of the map's output.
        is_of_head: Whether it is one number for each head.
        is_in_queries: Whether it is the last of each head's channels in the query map's output.
    """

    map: Visit
    activation: GateActivation
    is_of_head: bool = False
    is_in_queries: bool = False


def find_gate(inside: Sequence[Visit], gated: Tensor, attended: Attended, rows: int, positions: int) -> Gate | None:
    """Returns the linear map whose output, through an activation function, multiplies z."""
    z = attended.result.reshape(rows, positions, attended.result.shape[2], -1)
    heads, width = z.shape[2:]
    for call in inside:
        left = None if call.left is None or not linear_kind(call) else as_tokens(call.left, rows, positions)
        if left is None:
            continue
        if left.shape[-1] % heads:
            continue
        by_head = left.unflatten(-1, (heads, -1))
        is_of_head, is_in_queries = by_head.shape[-1] == 1, by_head.shape[-1] > width
        if not is_of_head and by_head.shape[-1] < width:
            continue
        before = by_head if is_of_head else by_head[..., -width:]
        for activation in get_args(GateActivation):
            number = GateConversion(heads, activation).activate(before)
            if same((z * number).flatten(2), gated):
                return Gate(call, activation, is_of_head, is_in_queries)
    return None
