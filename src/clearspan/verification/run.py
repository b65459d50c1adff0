"""The verification itself: a few short forward passes of the user's own model."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from clearspan._forward.given import counting
from clearspan._run import runs
from clearspan.checks import tensor_of
from clearspan.errors import InvalidArgumentError, NotFiniteError
from clearspan.hf.tokenizers import tokenizer_doubt, tokenizer_fault
from clearspan.model import Model
from clearspan.progress import Progress, shown
from clearspan.verification import structure
from clearspan.verification.attention import attention
from clearspan.verification.config_entries import unexplained
from clearspan.verification.exact import InDouble
from clearspan.verification.generation import generation
from clearspan.verification.gradients import gradients
from clearspan.verification.lengths import length_for, lengths
from clearspan.verification.padding import padding
from clearspan.verification.parts import parts
from clearspan.verification.processing import processing
from clearspan.verification.reads import precision, reads
from clearspan.verification.report import GROUPS, Check, Group, Verification
from clearspan.verification.trial import FAULTS, Counter, Level, Trial, fault, guarded
from clearspan.verification.writes import Writes


def verify(model: Model, level: Level, tokens: Tensor | None, progress: bool | Progress) -> Verification:
    """Verifies a bridge. The arguments are those of `TransformerBridge.verify`."""
    if level not in ("quick", "full"):
        raise InvalidArgumentError(f"unknown level {level!r}", expected="'quick' or 'full'")
    trial = trial_of(model, level, tokens)
    found, groups = list[Check](), dict[Group, None]()
    with shown(progress) as tell:
        for check in checks(trial):
            found.append(check)
            groups[check.group] = None
            tell(f"verify {check.group}", len(groups), len(GROUPS))
    return Verification(
        model=model.cfg.model_name,
        architecture=model.cfg.architecture,
        level=level,
        dtype=str(model.hf_model.dtype).removeprefix("torch."),
        checks=tuple(found),
        forwards=trial.counter.forwards,
        not_exercised=tuple(trial.not_exercised),
        unexplained=tuple(unexplained(model)),
    )


def trial_of(model: Model, level: Level, tokens: Tensor | None) -> Trial:
    """Returns a model on trial. The arguments are those of `TransformerBridge.verify`."""
    return Trial(model, level, _tokens(model, level, tokens), Counter())


def _tokens(model: Model, level: Level, tokens: Tensor | None) -> Tensor:
    """Returns the token ids to try the model on, random ones by default."""
    if tokens is None:
        size = (2, length_for(model.cfg, level))
        rows = min(model.cfg.d_vocab, model.embed.n_tokens)
        drawn = torch.randint(0, rows, size, generator=torch.Generator().manual_seed(0))
        counted = counting(model)
        if counted is not None:  # a token that is taken for padding has no position
            drawn = torch.where(drawn == counted.padding_id, (drawn + 1) % rows, drawn)
        return drawn.to(model.device)
    tokens = tensor_of("tokens", tokens)
    if tokens.ndim != 2 or tokens.shape[0] < 2 or tokens.shape[1] < 4:
        raise InvalidArgumentError(
            "too few tokens to verify on", expected="at least 2 rows of 4", got=str(list(tokens.shape))
        )
    return tokens


def checks(trial: Trial) -> Iterator[Check]:
    """Yields all checks, made one after another, with the model in eval mode meanwhile."""
    return checks_of(trial, _all)


def checks_of(trial: Trial, stage: Callable[[Trial], Iterable[Check]]) -> Iterator[Check]:
    """Yields the checks of a stage, with the model in eval mode meanwhile."""
    model = trial.model
    was_training = model.hf_model.training
    model.eval()
    try:
        with torch.no_grad(), trial.counter.counting(model.hf_model):
            yield from stage(trial)
    finally:
        model.train(was_training)


def _all(trial: Trial) -> Iterator[Check]:
    yield from guarded("structure", "parts and sizes", structure.checks(trial.model))
    if not trial.base.isfinite().all():
        raise NotFiniteError(
            "the model's own logits are not finite, so there is nothing to verify",
            where=f"{type(trial.model.hf_model).__name__} in {trial.model.hf_model.dtype}, without this library",
            fix="bridge.to(torch.float32), or other tokens=",
        )
    yield from guarded("parity", "logits with nothing listening", _plain(trial))
    yield from _judged(trial, "reads", "all points", reads)
    yield from _judged(trial, "parts", "components alone", parts)
    yield from _judged(trial, "writes", "all points", lambda one: Writes(one).checks())
    yield from _judged(trial, "padding", "padded rows", padding)
    yield from _judged(trial, "generation", "a short generation", generation)
    yield from guarded("structure", "the length of the context", lengths(trial))
    yield from guarded("tokenizer", "text", _tokenizer(trial))
    exact = trial
    if trial.is_half:
        try:
            control = trial.control()
        except FAULTS as error:
            yield fault("precision", "a copy in float32", error)
            return
        if control is None:
            return
        exact = control
        yield from guarded("precision", "identities in float32", precision(trial, control))
    yield from _judged(exact, "attention", "queries and keys", attention)
    yield from _judged(exact, "gradients", "gradients at points", gradients)
    yield from _judged(exact, "processing", "processed()", processing)


def _plain(trial: Trial) -> Iterator[Check]:
    logits = runs.forward(trial.model, trial.tokens)
    yield trial.compared("parity", "logits with nothing listening, bit for bit", logits, trial.base, 0.0)


def _tokenizer(trial: Trial) -> Iterator[Check]:
    tokenizer, fault = trial.model.text.own
    if tokenizer is None:
        trial.not_exercised.append(f"text: {fault or 'the bridge has no tokenizer'}")
        return
    d_vocab = trial.model.embed.n_tokens
    why = tokenizer_fault(tokenizer, d_vocab) or tokenizer_doubt(tokenizer, d_vocab)
    yield Check("tokenizer", "texts become ids of the model and come back", why is None, explanation=why or "")


Stage = Callable[[Trial], Iterable[Check]]


def _judged(trial: Trial, group: Group, what: str, stage: Stage) -> Iterator[Check]:
    """Yields the checks of one stage. What fails, and holds on a copy in better precision, is rounding's doing.

    In double precision that copy computes all of it so: a model's own casts to single precision are lifted too.
    """
    doubtful = []
    for check in guarded(group, what, stage(trial)):
        if _may_be_rounding(check):
            doubtful.append(check)
        else:
            yield check
    if not doubtful:
        return
    control, held = trial.control(), set[str]()
    if control is not None:
        is_double = control.model.hf_model.dtype == torch.float64
        with InDouble() if is_double else contextlib.nullcontext():
            held = {one.what for one in guarded(group, what, stage(control)) if one.passed}
    for check in doubtful:
        yield replace(check, passed=True, explanation=_ROUNDED) if check.what in held else check


def _may_be_rounding(check: Check) -> bool:
    """Whether a check may fail because of rounding: it measured an error, and no single operation makes a large one."""
    if check.passed or check.error is None or not check.tolerance or not math.isfinite(check.error):
        return False
    return check.group != "identities" or check.error <= GROSS


_ROUNDED = "Rounding alone is more than is allowed in this precision; on a copy in better precision it holds."
GROSS = 1e-2
"""Relative error that no rounding of one operation makes."""
