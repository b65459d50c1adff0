"""Keys and values that are not one map each: those of an earlier layer, or values that are keys through a norm."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from clearspan.structure.algebra import norm_kind, same
from clearspan.structure.finding import MissingStructureError
from clearspan.structure.projected import Projected
from clearspan.structure.trace import Attended, Trace, Visit, fresh_arguments, traced


@dataclass(frozen=True)
class Source:
    """The attention whose keys and values another layer uses.

    Attributes:
        layer: Its layer.
        block: Its block's call.
        attended: Its product of queries and keys.
    """

    layer: int
    block: Visit
    attended: Attended


def find_source(trace: Trace, block: Visit, attended: Attended) -> Source | None:
    """Returns the first attention of an earlier block with the same keys and values, or None where there is none."""
    blocks = block.path.rpartition(".")[0]
    for one in trace.attended:
        if one.order >= block.order:
            return None
        layer = one.path.removeprefix(f"{blocks}.").partition(".")[0]
        if layer.isdigit() and _equal(one, attended):
            return Source(int(layer), trace.at(f"{blocks}.{layer}")[0], one)
    return None


def _equal(one: Attended, other: Attended) -> bool:
    pairs = ((one.key, other.key), (one.value, other.value))
    return all(first.shape == second.shape and torch.equal(first, second) for first, second in pairs)


def values_are_keys(key: Projected, value: Projected) -> bool:
    """Whether values are the map of keys through a norm of their own."""
    return key.map is value.map and None not in (key.norm, value.norm) and key.norm is not value.norm


def told_apart(
    trace: Trace, attended: Attended, earlier: Sequence[Visit], key: Projected, value: Projected
) -> list[Projected]:
    """Returns keys and values, each with the norm that it passes where two norms of one map give the same.

    So it is where both have weights of ones: which norm feeds which is found by doubling their outputs.

    Raises:
        MissingStructureError: It cannot be told.
    """
    if key.norm is None or key.norm is not value.norm:
        return [key, value]
    alike = [one for one in earlier if norm_kind(one) and same(one.entered, key.norm.entered)]
    alike = [one for one in alike if same(one.left, key.norm.left)]
    if len(alike) < 2:
        raise MissingStructureError(f"keys and values both come through {key.norm.path}")
    whole = next(one for one in trace.visits if one.order == attended.order)
    found: list[Projected] = []
    for name, one in (("key", key), ("value", value)):
        norm = next((norm for norm in alike if _feeds(whole, norm, name, attended)), None)
        if norm is None:
            raise MissingStructureError(f"which norm of {whole.path} gives {name}s")
        found.append(replace(one, norm=norm))
    return found


def _feeds(whole: Visit, norm: Visit, name: str, attended: Attended) -> bool:
    """Whether keys or values double when a norm's output does."""
    args, kwargs = fresh_arguments(whole)
    changes = {norm.path.removeprefix(f"{whole.path}."): lambda value: value * 2}
    again = traced(whole.module, lambda: whole.module(*args, **kwargs), changes).attended
    wanted = vars(attended)[name]
    return bool(again) and same(vars(again[0])[name], wanted * 2)
