"""Ways to run a batch of cells: the fastest one that a model takes, found by trying them on it."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from clearspan._forward.given import ModelInput
from clearspan._run.continuation import BaseRun, base_run
from clearspan.errors import ClearspanError
from clearspan.hf.growing import Extent, Given, UnfitForGrowth
from clearspan.model import Model
from clearspan.modes import no_grad, same_draws

Result = TypeVar("Result")
TOLERANCE, ROUGH = 1e-3, 5e-2
"""How far a run that is continued may be from the whole one, on the mean, in float32 and in half precision."""


@dataclass(frozen=True)
class Way:
    """How batches of cells run.

    Attributes:
        in_one: Whether a batch grows inside one forward; otherwise there is one from each layer where cells join.
        after_prefix: Whether it starts at a position, behind the keys and values of the base run.
        is_whole: Whether each cell is a row of a whole forward; then the other two say nothing.
        reason: Why no faster way is taken, or None.
        given: What the model was seen to give its blocks in such batches.
    """

    in_one: bool = True
    after_prefix: bool = True
    is_whole: bool = False
    reason: str | None = None
    given: dict[Extent, Given] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        if self.in_one and not self.is_whole:
            return "one forward a batch, which cells join at their layers"
        slower = "whole forwards" if self.is_whole else "a forward from each layer where cells join to the next"
        return slower if self.reason is None else f"{slower}, since {self.reason}"


_KNOWN: "weakref.WeakKeyDictionary[nn.Module, dict[object, Way]]" = weakref.WeakKeyDictionary()
"""The ways found, by model and kind of input."""


def way_of(model: Model, given: ModelInput, *, with_prefix: bool) -> Way:
    """Returns how batches of an input's cells run; the first time for a model and kind of input by trying.

    In a trial, rows join in front of the first layer and of a middle one that are copies of the plain run: they must
    end as that does.

    Args:
        model: The model.
        given: The input.
        with_prefix: Whether keys and values of earlier positions can be gone on from.
    """
    known, mask = _KNOWN.setdefault(model.hf_model, {}), given.batch.mask
    padding = None if mask is None else (tuple(mask.shape), mask.cpu().numpy().tobytes())
    attention = getattr(model.hf_model.config, "_attn_implementation", None)
    key = attention, given.size[0] > 1, padding, with_prefix
    if key not in known:
        with same_draws(model.device):
            known[key] = _tried(model, given, with_prefix=with_prefix)
    return known[key]


@no_grad
def _tried(model: Model, given: ModelInput, *, with_prefix: bool) -> Way:
    if model.adapter.whole_forwards:
        return Way(is_whole=True, reason=model.adapter.whole_forwards)
    n_layers, reason, seen = len(model.blocks), None, dict[Extent, Given]()
    layers = sorted({0, model.firsts[n_layers // 2], n_layers})
    for prefixed in (True, False) if with_prefix else (False,):
        base = _outcome(lambda prefixed=prefixed: base_run(model, given, layers, (), with_prefix=prefixed, known=seen))
        for in_one in (True, False):
            fault = base if isinstance(base, str) else _outcome(lambda base=base, one=in_one: _fault(base, in_one=one))
            if fault is None:
                return Way(in_one, prefixed, reason=reason, given=seen)
            reason = reason or fault
    return Way(is_whole=True, reason=reason)


def _fault(base: BaseRun, *, in_one: bool) -> str | None:
    """Returns what is wrong with rows that go on from a base run in one way, or None."""
    first = base.length // 2 if base.prefix is not None else 0
    *starts, last = sorted(base.residuals)
    rows = base.grown({layer: base.entering(layer, first, 1) for layer in starts}, first, (), in_one=in_one)
    ends = [(base.embedded(first, 1, ()), 0), *((copy, last) for copy in rows.split(base.rows))]
    if any(_differs(base, found, layer, first) for found, layer in ends):
        return "rows that go on from the plain run end otherwise than it"
    return None


def _outcome(run: Callable[[], Result]) -> Result | str:
    """Returns what a trial gives, or in a line what it raises; a lack of memory is not the way's fault."""
    try:
        return run()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 (whatever a model raises that is run in a way for which it was not made)
        line = str(error).partition("\n")[0]
        return line if isinstance(error, ClearspanError | UnfitForGrowth) else f"{type(error).__name__}: {line}"[:160]


def _differs(base: BaseRun, rows: Tensor, layer: int, first: int) -> bool:
    """Whether rows of the residual stream that enters a layer are not those of the base run, at its real tokens."""
    expected, mask = base.residuals[layer][:, first:].float(), base.given.batch.mask
    away = (rows.to(expected) - expected).abs().flatten(2).mean(-1)
    size = expected.abs().flatten(2).mean(-1)
    if mask is not None:
        is_real = mask[:, first:].to(away.device)
        away, size = away * is_real, size * is_real
    limit = TOLERANCE if torch.finfo(base.residuals[layer].dtype).bits > 16 else ROUGH
    return not bool(away.sum() <= limit * size.sum())
