"""Generation: tokens made one by one see what one forward sees, and a hook acts at its step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from clearspan._run import generation as running
from clearspan._run import runs
from clearspan.hf.keywords import kv_cache_in, kv_cache_keyword
from clearspan.points import HookPoint, ReadOnly
from clearspan.verification.reads import unmasked
from clearspan.verification.report import Check
from clearspan.verification.statement import relative
from clearspan.verification.trial import UNEQUAL, Trial, layer_of

NEW = 3
"""Tokens that are made."""
LOOSE = 1e-4
"""Relative error allowed: one position at a time is computed by other kernels. Measured at most 5e-6."""


def generation(trial: Trial) -> Iterator[Check]:
    """Yields the checks of a short greedy generation from the first rows."""
    model, whole = trial.model, model_says_whole(trial)
    if whole is not None:
        yield whole
    prompt = trial.tokens[:, : trial.tokens.shape[1] - NEW]
    seen: list[tuple[int, int | None, int]] = []

    def note(value: Tensor, hook: HookPoint) -> None:
        seen.append((int(hook.position), hook.step, value.shape[1]))

    last = model.blocks[-1].leaves
    given = running.prepare(model, prompt, None, "left", None, None, _GREEDY)
    made, cache = running.generate_with_cache(model, given, [(last, note)], lambda name: _is_kept(trial, name))
    width = prompt.shape[1]
    # A model that keeps no keys and values goes through the whole sequence at each step.
    expected = [(0, 0, width)]
    expected += [
        ((0, step, width + step), (width + step - 1, step, 1))[seen[step][2] == 1] for step in range(1, len(seen))
    ]
    right = seen == expected and len(seen) == NEW
    why = "" if right else f"Hooks saw (position, step, tokens) {seen}, which should be {expected}. {UNEQUAL}"
    yield Check("generation", "hooks are told positions and steps", not why, explanation=why)
    _, once = runs.run_with_cache(model, made[:, :-1], lambda name: _is_kept(trial, name))
    if not _same_experts(trial, cache, once):
        trial.skip("a cache of a generation: rounding chose other experts there than in one forward")
        return
    layers = (None, *trial.layers())
    for point in model.index:
        if _is_kept(trial, point.name) and layer_of(point) in layers and _compares(point):
            shown, wanted = cache[point.name], once[point.name]
            what = f"{point.name} of a generation is that of one forward"
            yield trial.compared("generation", what, *_aligned(shown, wanted), max(LOOSE, trial.tolerance))
    yield _one_step(trial, prompt, once["hook_logits"][:, width - 1 :], last)


_GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def model_says_whole(trial: Trial) -> Check | None:
    """Returns the check of an adapter that says its model cannot continue from a KV cache, or None."""
    reason = trial.model.adapter.whole_sequences
    if reason is None:
        return None
    ids, half = trial.tokens, trial.tokens.shape[1] // 2
    hf_model = trial.model.hf_model
    said = f"whole_sequences: {reason}"
    past = kv_cache_in(hf_model(ids[:, :half], use_cache=True))
    if past is None:
        return Check("generation", said, True)
    found = hf_model(ids[:, half:], use_cache=True, **{kv_cache_keyword(hf_model): past}).logits
    error = relative(found, hf_model(ids, use_cache=False).logits[:, half:])
    passed = not error <= max(LOOSE, trial.tolerance)
    why = "" if passed else "The model's own forward continues from a KV cache and gives what one forward gives."
    return Check("generation", said, passed, error, None, why)


def _is_kept(trial: Trial, name: str) -> bool:
    """Whether a point can be read in a generation: what needs the sequence from its first token on cannot."""
    return trial.is_readable(name) and not isinstance(trial.model.hook_dict[name].access, ReadOnly)


def _compares(point: HookPoint) -> bool:
    """Whether a point has the same value in a generation: positions that are told differ in their rows."""
    return point.name not in ("pos_embed.hook_in", "hook_logits", "unembed.hook_out")


def _aligned(shown: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    return unmasked(shown), unmasked(wanted)


def _same_experts(trial: Trial, cache: object, once: object) -> bool:
    names = [point.name for point in trial.model.index if point.name.endswith("hook_expert_indices")]
    return all(torch.equal(cache[name].sort(-1).values, once[name].sort(-1).values) for name in names)  # pyright: ignore


def _one_step(trial: Trial, prompt: Tensor, base: Tensor, last: str) -> Check:
    """Returns the check that a hook which writes at one step changes the token of this step, and none before."""
    model, at = trial.model, 1

    def write(value: Tensor, hook: HookPoint) -> Tensor | None:
        return -value if hook.step == at else None

    heard: list[Tensor] = []

    def hear(value: Tensor, _: HookPoint) -> None:
        heard.append(value[:, -1].clone())

    given = running.prepare(
        model, prompt, None, "left", None, None, {**_GREEDY, "max_new_tokens": 2, "min_new_tokens": 2}
    )
    running.generate(model, given, [(last, write), ("hook_logits", hear)])
    moved = [relative(logits, base[:, step]) > max(LOOSE, trial.tolerance) for step, logits in enumerate(heard[:2])]
    why = "" if moved == [False, True] else f"Written at step 1, the logits of steps 0 and 1 moved: {moved}. {UNEQUAL}"
    return Check(
        "generation", f"a write to {last} at one step changes the logits of that step", not why, explanation=why
    )
