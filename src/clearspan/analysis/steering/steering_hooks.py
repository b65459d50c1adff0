"""Hooks that edit a value at chosen positions of a sequence, in one forward or along a generation."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.analysis.activations import Positions
from clearspan.errors import InvalidArgumentError
from clearspan.points import HookFunction, HookPoint

Edit = Callable[[Float[Tensor, "batch pos *axes"]], Float[Tensor, "batch pos *axes"]]
"""From values in float32 at least, to others of the same shape."""


def adding(shift: Float[Tensor, "*axes"]) -> Edit:
    """Returns the edit that adds one vector to every value."""
    return lambda value: value + shift.to(value)


def ablating(unit: Float[Tensor, "*axes"]) -> Edit:
    """Returns the edit that takes away what lies along a vector of norm 1.

    Example:
        >>> ablating(torch.tensor([0.6, 0.8]))(torch.tensor([[[1.0, 0.0]]]))
        tensor([[[ 0.6400, -0.4800]]])
    """

    def edit(value: Float[Tensor, "batch pos *axes"]) -> Float[Tensor, "batch pos *axes"]:
        flat, along = value.flatten(2), unit.to(value).flatten()
        return (flat - (flat @ along)[..., None] * along).view_as(value)

    return edit


def edit_hooks(
    vectors: Mapping[str, Float[Tensor, "*axes"]], edit: Callable[[Float[Tensor, "*axes"]], Edit], positions: Positions
) -> list[tuple[str, HookFunction]]:
    """Returns a hook for each point, which edits by its vector the values at chosen positions.

    Args:
        vectors: By the point's name.
        edit: Makes the edit of a vector.
        positions: In the sequence, from 0.

    Raises:
        InvalidArgumentError: A negative position. Of the run: a position that it does not have, or values of another
            shape than the vector's.
    """
    _check_positions(positions)
    return [(name, _writing(edit(vector), list(vector.shape), positions)) for name, vector in vectors.items()]


def _writing(edit: Edit, shape: list[int], positions: Positions) -> HookFunction:
    def write(value: Tensor, hook: HookPoint) -> Tensor | None:
        if list(value.shape[2:]) != shape:
            raise InvalidArgumentError(
                "the vector does not fit the values",
                expected=f"{shape} at each position",
                got=str(list(value.shape[2:])),
                where=hook.name,
            )
        at = _columns(positions, hook, value.shape[1])
        exact = torch.promote_types(value.dtype, torch.float32)
        if at is None:
            return edit(value.to(exact)).to(value.dtype)
        if at:
            value[:, at] = edit(value[:, at].to(exact)).to(value.dtype)
        return None

    return write


def _check_positions(positions: Positions) -> None:
    match positions:
        case None:
            return
        case slice():
            given = [bound for bound in (positions.start, positions.stop, positions.step) if bound is not None]
        case int():
            given = [positions]
        case _:
            given = list(positions)
    if any(bound < 0 for bound in given):
        raise InvalidArgumentError(
            f"positions={positions} counts from the end, which generation does not know",
            expected="positions in the sequence, from 0",
            fix="positions=tokens.shape[1] - 1 for the last of the input",
        )


def _columns(positions: Positions, hook: HookPoint, length: int) -> list[int] | None:
    """Returns which of the values of this forward are at chosen positions of the sequence; None for all."""
    first, stop = hook.position, hook.position + length
    match positions:
        case None:
            return None
        case slice():
            chosen = list(range(stop)[positions])
        case int():
            chosen = [positions]
        case _:
            chosen = list(positions)
    is_whole_run = hook.step is None and first == 0
    if is_whole_run and not (chosen and max(chosen) < stop):
        raise InvalidArgumentError(
            f"positions={positions} is not in this run", expected=f"0 to {stop - 1}", where=hook.name
        )
    return [position - first for position in chosen if first <= position < stop]
