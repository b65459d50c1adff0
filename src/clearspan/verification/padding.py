"""Padding: rows of different lengths have the logits that they have alone."""

from collections.abc import Iterator

import torch
from torch import Tensor

from clearspan._forward.given import prepare
from clearspan._run import runs
from clearspan.points import HookPoint
from clearspan.verification.report import Check
from clearspan.verification.statement import relative
from clearspan.verification.trial import Trial

_NOT_FINITE = (
    "The model's own forward, without this library, gives logits there that are infinite or not numbers, so there is "
    "nothing to compare."
)


def padding(trial: Trial) -> Iterator[Check]:
    """Yields that rows of different lengths, padded on either side, have the logits that they have alone."""
    tokens, length = trial.tokens, trial.tokens.shape[1]
    lengths = [length, length - 3]
    alone = [runs.forward(trial.model, tokens[:1])[0]]
    logits, expected = _heard(trial, tokens[1:2, : lengths[1]])
    alone.append(logits[0])
    for side in ("left", "right"):
        padded, mask = torch.zeros_like(tokens[:2]), torch.zeros_like(tokens[:2])
        places = [slice(length - n, length) if side == "left" else slice(0, n) for n in lengths]
        for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
            padded[row, place], mask[row, place] = tokens[row, :n], 1
        logits, turned = _heard(trial, padded, mask, None if expected is None else (expected, places[1]))
        own = logits if logits.isfinite().all() else _hf_padded(trial, padded, mask)
        for row, place in enumerate(places):
            what = f"row of {lengths[row]} tokens padded on the {side} to {length}"
            if own[row, place].isfinite().all():
                yield trial.compared("padding", what, logits[row, place], alone[row])
            else:
                yield Check("padding", what, True, explanation=_NOT_FINITE)
        if turned is not None and expected is not None:
            what = f"{_rotated(trial)}.hook_rot_q of a row padded on the {side} counts real tokens"
            yield trial.compared("padding", what, turned[1][1, places[1]], expected[1][0])


def _rotated(trial: Trial) -> str | None:
    """Returns the path of the first attention whose queries depend on the positions that rows are told."""
    paths = (attention.path for attention in trial.model.attentions if attention.has_rotary)
    return next((path for path in paths if all(map(trial.is_readable, _names(path)))), None)


def _names(path: str) -> tuple[str, str]:
    return f"{path}.hook_q", f"{path}.hook_rot_q"


Queries = tuple[Tensor, Tensor]
"""Queries as projected, and as rotated."""


def _heard(
    trial: Trial, tokens: Tensor, mask: Tensor | None = None, alone: tuple[Queries, slice] | None = None
) -> tuple[Tensor, Queries | None]:
    """Returns logits, and queries where positions rotate them.

    Args:
        trial: The model.
        tokens: Token ids.
        mask: What of them is padding.
        alone: Queries of the second row without padding, and its place. Where padding has changed what came before, as
            a recurrence without a mask lets it, the second row is given them: positions can be told all the same.
    """
    path = _rotated(trial)
    if path is None:
        return runs.forward(trial.model, tokens, attention_mask=mask), None
    projected, rotated = _names(path)
    logits, cache = runs.run_with_cache(trial.model, tokens, [projected, rotated], attention_mask=mask)
    heard = cache[projected], cache[rotated]
    if alone is not None:
        (own, _), place = alone
        if relative(heard[0][1, place], own[0]) > trial.tolerance:

            def write(value: Tensor, _: HookPoint) -> None:
                value[1, place] = own[0]

            _, cache = runs.run_with_cache(
                trial.model, tokens, rotated, attention_mask=mask, fwd_hooks=[(projected, write)]
            )
            heard = heard[0], cache[rotated]
    return logits, heard


def _hf_padded(trial: Trial, padded: Tensor, mask: Tensor) -> Tensor:
    """Returns the logits that the model itself gives for padded rows, called as a run calls it."""
    return trial.model.hf_model(**prepare(trial.model, padded, attention_mask=mask).kwargs).logits
