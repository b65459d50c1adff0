"""Reads: every point fires with the value that the cache has, and the identities between points hold."""

from collections.abc import Iterator

import torch
from torch import Tensor

from clearspan._run import runs
from clearspan.hf.attention import least_score
from clearspan.points import HookPoint
from clearspan.verification.identities import statements as statements_of
from clearspan.verification.report import Check
from clearspan.verification.statement import Statement, relative
from clearspan.verification.trial import FAULTS, FULL_PRECISION, QUANTISED, UNEQUAL, Trial, fault, refused


def reads(trial: Trial) -> Iterator[Check]:
    """Yields the checks of reads and identities; the trial's statements are then those that hold."""
    model, base = trial.model, trial.base
    trial.statements = list(statements_of(model))
    try:
        logits, trial.cache = runs.run_with_cache(model, trial.tokens, trial.is_readable)
    except FAULTS:
        for check in _out_of_reach(trial):
            trial.unreadable.add(check.what)
            yield check
        logits, trial.cache = runs.run_with_cache(model, trial.tokens, trial.is_readable)
    yield trial.compared("parity", "logits with everything cached", logits, base)
    points = []
    for point in filter(lambda point: trial.is_readable(point.name), model.index):
        failed = refused("reads", point.name, lambda point=point: trial.cache[point.name])
        if failed is None:
            points.append(point)
        else:
            trial.unreadable.add(point.name)
            yield failed
    heard: dict[str, Tensor] = {}

    def hear(value: Tensor, hook: HookPoint) -> None:
        heard[hook.name] = value.clone()

    logits = runs.run_with_hooks(model, trial.tokens, fwd_hooks=[(point.name, hear) for point in points])
    yield trial.compared("parity", "logits with everything listened to", logits, base)
    for point in points:
        yield _read(trial, point, heard)
    yield from _choices(trial)
    for statement in tuple(trial.statements):
        missing = sorted(name for name in statement.points if name not in trial.cache)
        if missing:
            trial.statements.remove(statement)
            if not any(
                name in model.hook_dict and not trial.is_readable(model.hook_dict[name].name) for name in missing
            ):
                why = f"The adapter has no {', '.join(missing)}: a part is missing, or has another name. {UNEQUAL}"
                yield Check("identities", statement.text, False, explanation=why)
            continue
        check = held(trial, statement)
        if check.explanation:
            trial.statements.remove(statement)
        yield check


def _choices(trial: Trial) -> Iterator[Check]:
    """Yields the check that what says which experts are chosen is whole numbers, and how much they count others."""
    for point in trial.model.index:
        if point.name.endswith("hook_expert_indices") and point.name in trial.cache:
            weights = point.name.replace("indices", "weights")
            right = not trial.cache[point.name].is_floating_point()
            right = right and (weights not in trial.cache or trial.cache[weights].is_floating_point())
            what = f"{point.name} are whole numbers, and {weights.rpartition('.')[2]} numbers"
            yield Check("identities", what, right, explanation="" if right else UNEQUAL)


def _read(trial: Trial, point: HookPoint, heard: dict[str, Tensor]) -> Check:
    """Returns the check that a point was passed, in its axes, with the value that the cache has."""
    cache, (rows, length) = trial.cache, trial.tokens.shape
    if point.name not in heard or point.name not in cache:
        return Check("reads", point.name, False, explanation=f"{point.place} was not passed. {UNEQUAL}")
    known = {"batch": rows, **dict.fromkeys(("pos", "q_pos", "k_pos"), length)}
    shape = tuple({**known, **point.sizes}.get(axis, -1) for axis in point.axes)
    if heard[point.name].shape != shape or cache[point.name].shape != shape:
        got = f"axes {point.axes} should be {list(shape)}, got {list(heard[point.name].shape)}"
        return Check("reads", point.name, False, explanation=f"{got}. {UNEQUAL}")
    return trial.compared("reads", point.name, unmasked(heard[point.name]), unmasked(cache[point.name]))


def held(trial: Trial, statement: Statement) -> Check:
    """Returns the check that an identity holds in the trial's cache."""
    text, allowed = statement.text, tolerance_of(trial, statement)
    try:
        error = statement.error(trial.cache)
    except FAULTS as raised:
        return fault("identities", text, raised)
    return Check("identities", text, error <= allowed, error, allowed, "" if error <= allowed else UNEQUAL)


def tolerance_of(trial: Trial, statement: Statement) -> float:
    """Returns the error that is allowed: more where a map is quantised."""
    is_quantised = any(linear.is_quantised for linear in statement.through)
    return max(trial.tolerance, QUANTISED) if is_quantised else trial.tolerance


def _out_of_reach(trial: Trial) -> Iterator[Check]:
    """Yields points at which a run fails, each with what it raised. They are looked for only if one does."""
    for point in trial.model.index:
        failed = refused(
            "reads", point.name, lambda point=point: runs.run_with_cache(trial.model, trial.tokens, point.name)
        )
        if failed is not None:
            yield Check("reads", point.name, False, explanation=failed.explanation)


def unmasked(value: Tensor) -> Tensor:
    """Returns a value with zeros where a mask hides it."""
    if not value.is_floating_point():
        return value
    return torch.where(is_visible(value), value, 0)


def is_visible(scores: Tensor) -> Tensor:
    """Returns where no mask hides a value; masks in float64 may have float32's least number."""
    return scores > least_score(scores.dtype) / 2


def precision(trial: Trial, control: Trial) -> Iterator[Check]:
    """Yields how far the logits in half precision are from a copy in float32, and that the identities hold there."""
    error = relative(trial.base, control.base)
    yield Check("precision", f"logits in {trial.model.hf_model.dtype} against float32", True, error, None)
    for statement in statements_of(control.model):
        found = held(control, statement)
        passed = found.passed and (found.error or 0.0) <= FULL_PRECISION
        what = f"in float32: {statement.text}"
        yield Check(
            "precision", what, passed, found.error, FULL_PRECISION, "" if passed else found.explanation or UNEQUAL
        )
