"""The verification itself: a few short forward passes of the user's own model."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from clearspan._run import runs
from clearspan.checks import tensor_of
from clearspan.errors import InvalidArgumentError, NotFiniteError
from clearspan.model import Model
from clearspan.verification import structure
from clearspan.verification.attention import attention
from clearspan.verification.generation import generation
from clearspan.verification.gradients import gradients
from clearspan.verification.identities import statements
from clearspan.verification.lengths import length_for, lengths
from clearspan.verification.padding import padding
from clearspan.verification.parts import parts
from clearspan.verification.processing import processing
from clearspan.verification.reads import precision, reads
from clearspan.verification.report import Check, Verification
from clearspan.verification.statement import Statement
from clearspan.verification.trial import FAULTS, Counter, Level, Trial, fault, guarded
from clearspan.verification.writes import Writes


def verify(model: Model, level: Level, tokens: Tensor | None) -> Verification:
    """Verifies a bridge. The arguments are those of `TransformerBridge.verify`."""
    if level not in ("quick", "full"):
        raise InvalidArgumentError(f"unknown level {level!r}", expected="'quick' or 'full'")
    trial = Trial(model, level, _tokens(model, level, tokens), Counter())
    was_training = model.hf_model.training
    model.eval()
    try:
        with torch.no_grad(), trial.counter.counting(model.hf_model):
            found = tuple(_checks(trial))
    finally:
        model.train(was_training)
    return Verification(
        model=model.cfg.model_name,
        architecture=model.cfg.architecture,
        level=level,
        dtype=str(model.hf_model.dtype).removeprefix("torch."),
        checks=found,
        forwards=trial.counter.forwards,
        not_exercised=tuple(trial.not_exercised),
    )


def _tokens(model: Model, level: Level, tokens: Tensor | None) -> Tensor:
    """Returns the token ids to try the model on, random ones by default."""
    if tokens is None:
        size = (2, length_for(model.cfg, level))
        rows = min(model.cfg.d_vocab, model.embed.n_tokens)
        return torch.randint(0, rows, size, generator=torch.Generator().manual_seed(0)).to(model.device)
    tokens = tensor_of("tokens", tokens)
    if tokens.ndim != 2 or tokens.shape[0] < 2 or tokens.shape[1] < 4:
        raise InvalidArgumentError(
            "too few tokens to verify on", expected="at least 2 rows of 4", got=str(list(tokens.shape))
        )
    return tokens


def _checks(trial: Trial) -> Iterator[Check]:
    """Yields all checks."""
    yield from guarded("structure", "parts and sizes", structure.checks(trial.model))
    base = trial.model.hf_model(trial.tokens, use_cache=False).logits
    if not base.isfinite().all():
        raise NotFiniteError(
            "the model's own logits are not finite, so there is nothing to verify",
            where=f"{type(trial.model.hf_model).__name__} in {trial.model.hf_model.dtype}, without this library",
            fix="bridge.to(torch.float32), or other tokens=",
        )
    yield from guarded("parity", "logits with nothing listening", _plain(trial, base))
    identities: list[Statement] = []
    yield from guarded("identities", "what the parts compute", _stated(trial, identities))
    yield from guarded("reads", "all points", reads(trial, base, identities))
    yield from guarded("parts", "components alone", parts(trial, base))
    yield from guarded("writes", "all points", Writes(trial, identities).checks())
    yield from guarded("padding", "padded rows", padding(trial))
    yield from guarded("generation", "a short generation", generation(trial))
    yield from guarded("structure", "the length of the context", lengths(trial))
    yield from _in_full_precision(trial, base)


def _plain(trial: Trial, base: Tensor) -> Iterator[Check]:
    logits = runs.forward(trial.model, trial.tokens)
    yield trial.compared("parity", "logits with nothing listening, bit for bit", logits, base, 0.0)


def _stated(trial: Trial, identities: list[Statement]) -> Iterator[Check]:
    identities.extend(statements(trial.model))
    yield from ()


def _in_full_precision(trial: Trial, base: Tensor) -> Iterator[Check]:
    """Yields what rounding in half precision would hide, checked on a copy in float32 there."""
    if not trial.is_half:
        yield from _exact(trial)
        return
    if not trial.has_room("what rounding hides", torch.float32):
        return
    hf_model = copy.deepcopy(trial.model.hf_model).float()
    try:
        model = type(trial.model)(hf_model, type(trial.model.adapter)(copy.copy(trial.model.cfg)))
    except FAULTS as error:
        yield fault("precision", "a copy in float32", error)
        return
    control = Trial(model, trial.level, trial.tokens, trial.counter, trial.unreadable, trial.not_exercised)
    identities = list(statements(model))
    yield from guarded("precision", "identities in float32", precision(trial, control, base, identities))
    yield from _exact(control)


def _exact(trial: Trial) -> Iterator[Check]:
    """Yields the checks that need single precision."""
    yield from guarded("attention", "queries and keys", attention(trial))
    yield from guarded("gradients", "gradients at points", gradients(trial))
    yield from guarded("processing", "processed()", processing(trial))
