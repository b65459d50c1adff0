"""Queries, keys and values of heads: which linear maps and norms give them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clearspan.structure.algebra import as_tokens, linear_kind, norm_kind, origins, rounded, same
from clearspan.structure.finding import MissingStructureError
from clearspan.structure.trace import Visit

Channel = tuple[Visit, int, float] | None
"""Where a head's channel comes from: a call, which channel of its output, and what that is multiplied by."""


@dataclass(eq=False)
class Projected:
    """Where queries, keys or values come from.

    Attributes:
        map: The linear map's call; of several, that of the first channel.
        channels: For each head's channel, which channel of the map's output it is.
        others: The calls of further maps that give a part of the channels.
        norm: The norm that they pass, or None.
        is_turned: Whether positions change them after map and norm.
        n_heads: How many heads differ.
        d_head: Channels of a head.
        is_turned_first: Whether positions change them before the norm.
        ratio: What the map's output is multiplied by.
        is_scaled: Whether they are multiplied by a number of their position besides.
    """

    map: Visit
    channels: list[int]
    others: list[Visit]
    norm: Visit | None
    is_turned: bool
    n_heads: int
    d_head: int
    is_turned_first: bool = False
    ratio: float = 1.0
    is_scaled: bool = False

    def heads(self) -> list[tuple[int, ...]]:
        """Returns the channels of each head that differs from those before."""
        split = [tuple(self.channels[i : i + self.d_head]) for i in range(0, len(self.channels), self.d_head)]
        return list(dict.fromkeys(split))


def find_projected(name: str, heads: Tensor, earlier: Sequence[Visit], rows: int, positions: int) -> Projected:
    """Returns where queries, keys or values come from: position 0, which no rotation turns, tells channels apart.

    Raises:
        MissingStructureError: A channel comes from no linear map.
    """
    by_head = heads.transpose(1, 2)  # [row, pos, head, d_head]
    d_head, target = by_head.shape[-1], by_head.flatten(2)
    found = _origins(target[:, 0], earlier, rows, positions)
    normed = _behind_norm(found, earlier, rows, positions)
    chosen = normed.channels if normed is not None else found
    present = [one for one in chosen if one is not None]
    missing = len(chosen) - len(present)
    if missing:
        raise MissingStructureError(
            f"{missing} of {len(chosen)} channels of {name} come from no linear map as they are"
        )
    maps = list(dict.fromkeys(one[0] for one in present))
    plain = _at_all_positions(found, rows, positions)
    lengths = [torch.linalg.vector_norm(one, dim=(0, 2), keepdim=True) for one in (target, plain)]
    scale = lengths[0] / lengths[1]  # of each position; a rotation keeps lengths
    is_scaled = not same(scale, torch.ones_like(scale))
    is_turned = not same(plain * scale if is_scaled else plain, target)
    is_turned_first = normed is not None and not is_turned and normed.is_turned_before(rows, positions)
    ratios = torch.tensor([one[2] for one in present], dtype=torch.float64)
    projected = Projected(
        maps[0],
        [one[1] for one in present],
        maps[1:],
        None if normed is None else normed.norm,
        is_turned or is_turned_first,
        0,
        d_head,
        is_turned_first,
        rounded(float(ratios.median())),
        is_scaled,
    )
    projected.n_heads = len(projected.heads())
    return projected


@dataclass(frozen=True)
class _Normed:
    """A norm that heads pass.

    Attributes:
        norm: Its call.
        entered: Its input at the heads' channels, `[row, pos, channel]`.
        channels: Where that comes from.
    """

    norm: Visit
    entered: Tensor
    channels: list[Channel]

    def is_turned_before(self, rows: int, positions: int) -> bool:
        """Whether positions change what the map gave before the norm reads it."""
        return not same(_at_all_positions(self.channels, rows, positions), self.entered)


def _behind_norm(found: Sequence[Channel], earlier: Sequence[Visit], rows: int, positions: int) -> _Normed | None:
    """Returns the norm that all channels come from, or None where they come from maps."""
    if not all(one is not None and norm_kind(one[0]) for one in found):
        return None
    norm = next(one[0] for one in found if one is not None)
    tokens = None if norm.entered is None else as_tokens(norm.entered, rows, positions)
    assert tokens is not None, "as its output has"
    entered = tokens[..., [one[1] for one in found if one is not None]]
    before = [one for one in earlier if one.order < norm.order]
    return _Normed(norm, entered, _origins(entered[:, 0], before, rows, positions))


def _origins(target: Tensor, calls: Sequence[Visit], rows: int, positions: int) -> list[Channel]:
    given = []
    for call in calls:
        if call.left is not None and call.left.is_floating_point() and (linear_kind(call) or norm_kind(call)):
            tokens = as_tokens(call.left, rows, positions)
            if tokens is not None:
                given.append((call, tokens[:, 0]))
    return origins(target, given)


def _at_all_positions(found: Sequence[Channel], rows: int, positions: int) -> Tensor:
    """Returns the channels that were found at the first position, `[row, pos, channel]`."""
    outputs: dict[Visit, Tensor] = {}
    columns = []
    for one in found:
        assert one is not None, "checked by the caller"
        visit, index, ratio = one
        if visit not in outputs:
            assert visit.left is not None, "calls without an output are left out"
            tokens = as_tokens(visit.left, rows, positions)
            assert tokens is not None, "found by the caller"
            outputs[visit] = tokens
        columns.append(outputs[visit][..., index] * ratio)
    return torch.stack(columns, -1)
