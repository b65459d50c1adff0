"""Blocks that are called several times in a forward, or between which there is something else than blocks."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clearspan.components import BlockBridge, GeneralizedComponent, MixerBridge
from clearspan.structure.finding import MissingStructureError
from clearspan.structure.frame import Blocks, NoModuleError, called_lists, find_blocks
from clearspan.structure.trace import Trace, Visit, traced

if TYPE_CHECKING:
    from clearspan.hf.types import PreTrainedModel

NUDGE = 1e-3
"""How far an output is moved, over its size, to see whether logits depend on it."""


def blocks_of(model: "PreTrainedModel", trace: Trace, ids: Tensor) -> Blocks:
    """Returns the blocks: a list that hands one stream on; else all calls of the last block's kind, in their order.

    Args:
        model: The model.
        trace: A traced forward.
        ids: The token ids of that forward `[batch, pos]`.

    Raises:
        MissingStructureError: There are none.
    """
    woven = _woven(model, trace, ids)
    try:
        plain = find_blocks(model, trace)
    except MissingStructureError as error:
        if woven is None or isinstance(error, NoModuleError):
            raise
        return woven
    is_last = woven is None or not woven.visits or woven.visits[-1].order <= plain.visits[-1].order
    return plain if is_last or woven is None else woven


def _woven(model: "PreTrainedModel", trace: Trace, ids: Tensor) -> Blocks | None:
    """Returns all calls of blocks of the last list's classes, of lists on whose outputs the logits depend."""
    lists = dict(_of_tokens(model, trace, ids))
    if not lists:
        return None
    last = max((calls[-1] for calls in lists.values()), key=lambda visit: visit.order)
    assert last.entered is not None, "it has been looked at"
    own = last.path.rpartition(".")[0]
    kinds = {type(one.module) for one in lists[own]}
    alike = [
        path
        for path, calls in lists.items()
        if all(type(one.module) in kinds and _shape(one) == tuple(last.entered.shape) for one in calls)
    ]
    if own not in alike:
        return None
    reaching = [path for path in alike if last.is_in(path) or _reaches(model, ids, trace, lists[path][0].path)]
    calls = sorted((one for path in reaching for one in lists[path]), key=lambda visit: visit.order)
    return Blocks(own, tuple(calls), tuple(path for path in reaching if path != own), is_woven=True)


def _of_tokens(model: nn.Module, trace: Trace, ids: Tensor) -> Iterator[tuple[str, Sequence[Visit]]]:
    """Yields the lists of modules, not in one another, that take and give a vector for each token."""
    lists = {
        path: calls
        for path, calls in called_lists(model, trace)
        if all(_shape(one)[:2] == tuple(ids.shape) for one in calls)
    }
    for path, calls in lists.items():
        if all(one.module._modules for one in calls) and not any(path.startswith(f"{other}.") for other in lists):
            yield path, calls


def _shape(visit: Visit) -> tuple[int, ...]:
    """Returns the shape of what a call takes and gives; of no axes, where these differ."""
    into, out = visit.entered, visit.left
    are_alike = into is not None and out is not None and into.ndim == 3 and into.shape == out.shape
    return tuple(into.shape) if are_alike and into is not None else ()


def _reaches(model: "PreTrainedModel", ids: Tensor, trace: Trace, path: str) -> bool:
    """Whether a small change of a module's output changes the logits."""

    def moved(left: Tensor) -> Tensor:
        return left + NUDGE * left.abs().mean() * left.new_ones(left.shape[-1]).cumsum(0) / left.shape[-1]

    again = traced(model, lambda: model(input_ids=ids, use_cache=False), {path: moved})
    return not torch.equal(again.output.logits, trace.output.logits)


def place_in_weave(block: BlockBridge, trace: Trace, blocks: Blocks, layer: int) -> None:
    """Tells the template of a woven block, and all that is in it, which call of its module it is.

    Raises:
        MissingStructureError: A module in it is called several times in this one call, or it mixes positions by other
            functions than attention.
    """
    visit = blocks.visits[layer]
    block.index = int(visit.path.rpartition(".")[2])
    calls = trace.at(visit.path)
    if len(calls) < 2:
        return
    block.call = calls.index(visit)
    own = trace.of(visit)
    for part, path in _paths(block, visit.path):
        if isinstance(part, MixerBridge) or len(own.at(path)) > 1:
            raise MissingStructureError(f"{path} is called in a loop, and its calls cannot be told apart")
        part.call = block.call


def _paths(part: GeneralizedComponent, path: str) -> Iterator[tuple[GeneralizedComponent, str]]:
    """Yields the parts in a part, each with its module's path."""
    for one in part.submodules.values():
        inner = ".".join(name for name in (path, one.name) if name)
        yield one, inner
        yield from _paths(one, inner)


SEAM = "the model puts something else than blocks between them"
FIRST_SEAM = "the model makes it of more than its embeddings' sum"
