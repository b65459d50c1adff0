"""Whether positions mix in a module, or between two: what is at one position changes what comes out at another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clearspan.structure.algebra import as_tokens, same
from clearspan.structure.finding import MissingStructureError
from clearspan.structure.trace import Change, Visit, fresh_arguments, traced


class MixedError(MissingStructureError):
    """A module that was taken for an MLP mixes positions.

    Args:
        whole: Its call.
    """

    def __init__(self, whole: Visit) -> None:
        super().__init__(f"positions mix in {whole.path}, of which only the ends are known")
        self.whole = whole


def mixes_positions(whole: Visit, rows: int, positions: int, *, turns: bool = False) -> bool:
    """Whether a module's output at later positions changes with its input at the first.

    Args:
        whole: The module's call.
        rows: Rows of the batch.
        positions: Positions of a row.
        turns: Whether positions are the first axis of its tensors, and rows the second.
    """
    entered = whole.entered
    if entered is None or not entered.is_floating_point():
        return False
    change = _at_first(rows, positions)
    changed = change(entered.transpose(0, 1)).transpose(0, 1) if turns else change(entered)
    before, after = (_left(whole, value) for value in (entered, changed))
    if turns and before is not None and after is not None:
        before, after = before.transpose(0, 1), after.transpose(0, 1)
    return _is_mixed(before, after, rows, positions)


def mixes_between(whole: Visit, inward: Sequence[Visit], outward: Visit, rows: int, positions: int) -> bool:
    """Whether the input of a map at later positions changes with the outputs of others at the first.

    Args:
        whole: The call of the module that has all of them.
        inward: The calls of the other maps.
        outward: The map's call.
        rows: Rows of the batch.
        positions: Positions of a row.
    """
    start = f"{whole.path}." if whole.path else ""
    names = [one.path.removeprefix(start) for one in inward]
    args, kwargs = fresh_arguments(whole)
    changes = dict.fromkeys(names, _at_first(rows, positions))
    again = traced(whole.module, lambda: whole.module(*args, **kwargs), changes)
    after = next((one.entered for one in again.visits if one.path == outward.path.removeprefix(start)), None)
    return _is_mixed(outward.entered, after, rows, positions)


def _left(whole: Visit, value: Tensor) -> Tensor | None:
    args, kwargs = fresh_arguments(whole, value)
    return traced(whole.module, lambda: whole.module(*args, **kwargs)).visits[0].left


def _at_first(rows: int, positions: int) -> Change:
    """Returns what changes a tensor at the first position of each row, each channel otherwise."""

    def change(value: Tensor) -> Tensor:
        by_position = _by_position(value, rows, positions)
        if by_position is None:
            return value
        added = torch.linspace(-1, 1, by_position.shape[-1], dtype=value.dtype, device=value.device)
        changed = by_position.clone()
        changed[:, 0] += added * value.abs().mean()
        return changed.reshape(value.shape)

    return change


def _by_position(value: Tensor, rows: int, positions: int) -> Tensor | None:
    """Returns a tensor with rows and positions in its first two axes, whether they share one there or not."""
    if value.shape[:2] == (rows, positions):
        return value
    return value.unflatten(0, (rows, positions)) if len(value) == rows * positions else None


def _is_mixed(before: Tensor | None, after: Tensor | None, rows: int, positions: int) -> bool:
    tokens = [None if one is None else as_tokens(one, rows, positions) for one in (before, after)]
    first, second = tokens
    return first is not None and second is not None and not same(first[:, 1:], second[:, 1:])
