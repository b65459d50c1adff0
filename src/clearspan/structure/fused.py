"""How the channels of projections are laid out: head by head, or queries, keys and values on one axis."""

import itertools
from collections.abc import Iterator, Sequence

import torch

from clearspan.conversions import (
    BlockedQKVConversionRule,
    GroupedQKVConversionRule,
    QKVConversionRule,
    SlicedQKVConversionRule,
)
from clearspan.structure.finding import MissingStructureError
from clearspan.structure.projected import Projected


def check_order(name: str, one: Projected, step: int, *, exact: bool) -> None:
    """Raises unless a map's output is heads one after the other; rotation may have reordered the channels of a head."""
    heads = one.heads()
    wanted = [tuple(range(index * step, index * step + one.d_head)) for index in range(len(heads))]
    found = heads if exact else [tuple(sorted(head)) for head in heads]
    if found != wanted or one.others:
        raise MissingStructureError(f"the channels of {name} are not the output of {one.map.path} head by head")


def fused_rule(q: Projected, k: Projected, v: Projected) -> QKVConversionRule:
    """Returns how one axis holds queries, keys and values.

    Raises:
        MissingStructureError: It holds them in no known way.
    """
    assert q.map.left is not None, "calls without an output are left out"
    width = q.map.left.shape[-1]
    if (q.n_heads + 2 * v.n_heads) * q.d_head == width:
        for rule in _rules(q.n_heads, q.d_head, v.n_heads):
            parts = (part.flatten().tolist() for part in rule.split(torch.arange(width), 0))
            if all(_is_laid(one, part) for one, part in zip((q, k, v), parts, strict=True)):
                return rule
    raise MissingStructureError(f"{q.map.path} holds queries, keys and values neither in blocks nor in slices of heads")


def _rules(n_heads: int, d_head: int, n_kv_heads: int) -> Iterator[QKVConversionRule]:
    """Yields the ways in which queries, keys and values may share an axis."""
    yield BlockedQKVConversionRule(n_heads, d_head, n_kv_heads)
    yield GroupedQKVConversionRule(n_heads, d_head, n_kv_heads)
    for slices in range(1, n_kv_heads + 1):
        if n_kv_heads % slices == 0:
            for order in itertools.permutations("qkv"):
                yield SlicedQKVConversionRule(n_heads, d_head, n_kv_heads, slices, order)


def _is_laid(one: Projected, channels: Sequence[int]) -> bool:
    heads = [tuple(channels[i : i + one.d_head]) for i in range(0, len(channels), one.d_head)]
    return [tuple(sorted(head)) for head in one.heads()] == heads
