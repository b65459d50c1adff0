"""Gradients: at points, they are what small writes there do to the loss."""

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from clearspan._run import runs
from clearspan.errors import PointNotReachedError
from clearspan.modes import with_gradients
from clearspan.points import HookPoint
from clearspan.verification.report import Check
from clearspan.verification.trial import Trial, layer_of

POINTS = (
    "hook_embed",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_streams_pre",
    "hook_streams_mid",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_z",
    "hook_q_input",
    "mixer.hook_scan_in",
    "mixer.hook_v",
    "mixer.hook_ssm_out",
)
"""Points that are tried, in one layer of each kind."""
STEP = 2e-3
"""Size of a write over that of the value."""
SIZES = {torch.float32: (1.0, 0.1, 0.01), torch.float64: (0.1, 0.01, 0.001)}
"""Steps that are tried: small ones where a large one chooses other experts or keys, or is no longer small."""
TOLERANCE = 2e-2
"""Relative error allowed. Measured at most 3e-3 in float32; a branch that is missed makes 0.1 and more."""
FAINT = 1e-3
"""Change of the loss, over the loss, below which rounding hides it."""


def gradients(trial: Trial) -> Iterator[Check]:
    """Yields the checks of gradients, on a model in single precision or better."""
    why_not = _why_not(trial)
    if why_not is not None:
        trial.skip(f"gradients: {why_not}")
        return
    model, row = trial.model, trial.tokens[:1]
    layers = (None, *trial.layers())
    points = [
        point
        for point in model.index
        if layer_of(point) in layers and point.name.endswith(POINTS) and trial.is_readable(point.name)
    ]
    plain = trial.cache["hook_logits"]
    ahead = torch.randn(plain.shape[-1], generator=torch.Generator().manual_seed(0)).to(plain)

    def score(logits: Tensor) -> Tensor:
        return (logits[:, -1] @ ahead).sum() / plain.abs().max()

    names = [point.name for point in points]
    backward = functools.partial(runs.run_with_cache, model, row, incl_bwd=score)
    try:
        _, cache = with_gradients(True, functools.partial(backward, names))
    except PointNotReachedError:
        names = _after_the_last_without(trial, row, names)
        if not names:
            return
        _, cache = with_gradients(True, functools.partial(backward, names))
    steps = {name: _step(cache[name], cache[f"{name}_grad"]) for name in names}
    sizes = SIZES[model.hf_model.dtype]
    after, chosen = _written(trial, row, steps, sizes)
    for index, name in enumerate(names):
        found = (steps[name] * cache[f"{name}_grad"]).double().sum().item()
        measured = []
        for size_index, size in enumerate(sizes):
            first = 2 * (index * len(sizes) + size_index)
            if all(
                torch.equal(one[first : first + 2], trial.cache[key][:1].expand_as(one[first : first + 2]))
                for key, one in chosen.items()
            ):
                up, down = (score(logits[None]).double().item() for logits in after[first : first + 2])
                measured.append((up - down) / (2 * size))
        if measured:
            yield _check(name, found, min(measured, key=lambda one: abs(one - found)))
        else:
            trial.skip(f"the gradient at {name}: small writes there choose other experts")


def _why_not(trial: Trial) -> str | None:
    """Returns why no gradients can be had of this model here, or None."""
    if torch.is_inference_mode_enabled():
        return "there are none in inference mode"
    if not any(parameter.requires_grad for parameter in trial.model.parameters()):
        return "no parameter requires one"
    if any(parameter.is_meta or not parameter.is_floating_point() for parameter in trial.model.parameters()):
        return "weights are offloaded or quantised"
    return None


def _after_the_last_without(trial: Trial, row: Tensor, names: Sequence[str]) -> list[str]:
    """Returns the points of the layers after the last one that the model's own forward computes without gradients.

    Those before have a gradient that leaves out what passes through that layer.
    """
    depth = {name: -1 if (layer := layer_of(trial.model.hook_dict[name])) is None else layer for name in names}
    without: list[int] = []

    def note(_: Tensor, hook: HookPoint) -> None:
        if not torch.is_grad_enabled():
            without.append(depth[hook.name])

    hooks = [(name, note) for name in names]
    with_gradients(True, functools.partial(runs.run_with_hooks, trial.model, row, fwd_hooks=hooks))
    last = max(without, default=-1)
    trial.skip(f"gradients up to layer {last}: the model's own forward computes it without gradients")
    return [name for name in names if depth[name] > last]


def _step(value: Tensor, gradient: Tensor) -> Tensor:
    """Returns a small write in the direction of the gradient."""
    return gradient * (STEP * value.norm() / gradient.norm().clamp(min=1e-30))


def _written(
    trial: Trial, row: Tensor, steps: Mapping[str, Tensor], sizes: Sequence[float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns logits with each step added, and subtracted, in each size: a row for each; and the experts chosen."""
    rows = {name: 2 * len(sizes) * index for index, name in enumerate(steps)}

    def write(value: Tensor, hook: HookPoint) -> Tensor:
        edited = value.clone()
        for index, size in enumerate(sizes):
            first = rows[hook.name] + 2 * index
            edited[first] += size * steps[hook.name][0]
            edited[first + 1] -= size * steps[hook.name][0]
        return edited

    tokens = row.expand(2 * len(sizes) * len(steps), -1)
    chosen = [point.name for point in trial.model.index if point.name.endswith("hook_expert_indices")]
    hooks = [(name, write) for name in steps]
    logits, cache = runs.run_with_cache(trial.model, tokens, chosen or ["hook_logits"], fwd_hooks=hooks)
    return logits, {name: cache[name] for name in chosen}


def _check(name: str, found: float, expected: float) -> Check:
    error = abs(found - expected) / max(abs(found), abs(expected), FAINT)
    passed = error <= TOLERANCE
    why = (
        f"By its gradient a small write changes the result by {found:.3e}, and it does by {expected:.3e}: gradients "
        "miss something that reads the point, or writes do."
    )
    return Check("gradients", f"gradient at {name}", passed, error, TOLERANCE, "" if passed else why)
