"""Processing: each step keeps the log-probabilities, or is refused."""

from collections.abc import Iterator

import torch

from clearspan._run import runs
from clearspan._run.processed import processed
from clearspan.verification.report import Check
from clearspan.verification.trial import Trial, guarded

STEPS = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
"""The steps, in their order."""
RELATIVE = 2e-5
"""Error allowed in log-probabilities, over the largest. Measured at most 3e-6; a step that is not exact moves them by
0.001 and more."""


def processing(trial: Trial) -> Iterator[Check]:
    """Yields the checks of each step alone, on a model in single precision or better."""
    if not trial.has_room("the steps of processed()", trial.model.hf_model.dtype):
        return
    base = trial.cache["hook_logits"].log_softmax(-1)
    for step in STEPS:
        yield from guarded("processing", step, _step(trial, step, base))


def _step(trial: Trial, step: str, base: torch.Tensor) -> Iterator[Check]:
    asked: dict[str, bool | None] = {**dict.fromkeys(STEPS, False), step: None}
    new = processed(trial.model, asked)
    said = next(one.done for one in new.processing if one.name == step)
    if said.startswith("left out"):
        yield Check("processing", f"{step} is {said}", True)
        return
    found = runs.forward(new, trial.tokens).log_softmax(-1)
    check = trial.compared("processing", step, found, base, max(RELATIVE, trial.tolerance))
    if check.passed:
        yield check
        return
    moved = (found - base).abs().max().item()
    why = (
        f"It moves log-probabilities by up to {moved:.2g}: the adapter leaves something out of this step's way, such "
        "as a norm, a rotation, or a part that reads or writes the residual stream."
    )
    yield Check("processing", step, False, check.error, check.tolerance, why)
