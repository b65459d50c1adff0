"""Padding: rows of different lengths have the logits that they have alone."""

from collections.abc import Iterator

import torch
from torch import Tensor

from clearspan._forward.given import prepare
from clearspan._run import runs
from clearspan.verification.report import Check
from clearspan.verification.trial import Trial

_NOT_FINITE = (
    "The model's own forward, without this library, gives logits there that are infinite or not numbers, so there is "
    "nothing to compare."
)


def padding(trial: Trial) -> Iterator[Check]:
    """Yields that rows of different lengths, padded on either side, have the logits that they have alone."""
    tokens, length = trial.tokens, trial.tokens.shape[1]
    lengths = [length, length - 3]
    alone = [runs.forward(trial.model, tokens[row : row + 1, :n])[0] for row, n in enumerate(lengths)]
    for side in ("left", "right"):
        padded, mask = torch.zeros_like(tokens[:2]), torch.zeros_like(tokens[:2])
        places = [slice(length - n, length) if side == "left" else slice(0, n) for n in lengths]
        for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
            padded[row, place], mask[row, place] = tokens[row, :n], 1
        logits = runs.forward(trial.model, padded, attention_mask=mask)
        own = logits if logits.isfinite().all() else _hf_padded(trial, padded, mask)
        for row, place in enumerate(places):
            what = f"row of {lengths[row]} tokens padded on the {side} to {length}"
            if own[row, place].isfinite().all():
                yield trial.compared("padding", what, logits[row, place], alone[row])
            else:
                yield Check("padding", what, True, explanation=_NOT_FINITE)


def _hf_padded(trial: Trial, padded: Tensor, mask: Tensor) -> Tensor:
    """Returns the logits that the model itself gives for padded rows, called as a run calls it."""
    return trial.model.hf_model(**prepare(trial.model, padded, attention_mask=mask).kwargs).logits
