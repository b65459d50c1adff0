"""What is drawn, as clearspan takes it. The only module here that knows clearspan, besides the tests."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import clearspan
from clearspan import Intervention, TransformerBridge

from . import changes, metrics
from .changes import Change
from .draws import Draw
from .models import Subject
from .rows import Rows

for name, function in changes.FUNCTIONS.items():
    clearspan.register_function(name)(function)

TOLERANCE = {torch.float32: 1e-4, torch.float64: 5e-6}
"""Largest difference over the largest value. Edits amplify rounding, and models of float64 have norms in float32."""

GRADIENTS = 3e-4
"""The same of what gradients give."""
FLOOR = 0.02
"""Values all smaller than this are compared with it: a divergence near 0 is made of rounding."""

FORMS = ("ids", "batch", "mapping", "mappings")
"""Ways of giving token ids."""


def form_of(rows: Rows) -> tuple[str, ...]:
    """Returns ways of giving rows in which their mask is part of the input."""
    return FORMS[rows.is_padded :]


@functools.cache
def bridge_to(subject: Subject) -> TransformerBridge:
    """Returns the bridge to a model."""
    return clearspan.boot(subject.model)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def action_of(action: changes.Action) -> clearspan.interventions.Action:
    """Returns an action of the same name and fields."""
    fields = {field.name: getattr(action, field.name) for field in dataclasses.fields(action)}
    fields = {name: value for name, value in fields.items() if value is not None}
    return getattr(clearspan.interventions, type(action).__name__)(**fields)


def intervention_of(change: Change, n_layers: int) -> Intervention:
    """Returns a change as an intervention, after a look at its JSON form."""
    has_short_name = change.layer is not None and "." not in change.point
    found = Intervention(
        change.point if has_short_name else change.name(n_layers),
        action_of(change.action),
        change.layer if has_short_name else None,
        positions=change.positions,
        heads=change.heads,
        neurons=change.neurons,
        key_positions=change.key_positions,
        columns=change.columns,
    )
    assert Intervention.from_json(found.to_json()) == found
    return found


def interventions_of(drawn: Sequence[Change], n_layers: int) -> list[Intervention]:
    """Returns changes as interventions."""
    return [intervention_of(change, n_layers) for change in drawn]


def metric_of(metric: metrics.Metric, mask: Tensor) -> Any:
    """Returns a metric of the same name and fields, or a plain function of logits.

    Args:
        metric: What is drawn.
        mask: The mask of the run, for a plain function.
    """
    if isinstance(metric, metrics.Plain):
        return metric.function(mask)
    fields = {field.name: getattr(metric, field.name) for field in dataclasses.fields(metric)}
    return getattr(clearspan.sweep, type(metric).__name__)(**fields)


# --- inputs ----------------------------------------------------------------------------------------------------------


def given(bridge: TransformerBridge, rows: Rows, form: str) -> tuple[Any, dict[str, Any]]:
    """Returns rows as an input, and the keywords that belong to it.

    Args:
        bridge: The model.
        rows: What is given.
        form: One of `FORMS`.
    """
    match form:
        case "ids":
            return rows.ids, {"attention_mask": rows.mask} if rows.is_padded else {}
        case "mapping":
            return {"input_ids": rows.ids, "attention_mask": rows.mask}, {}
        case "mappings":
            pairs = zip(rows.ids.tolist(), rows.mask.tolist(), strict=True)
            return [{"input_ids": ids, "attention_mask": mask} for ids, mask in pairs], {}
        case "batch":
            return bridge.to_batch(rows.ids, attention_mask=rows.mask), {}
    raise ValueError(f"unknown form {form!r}")


def source_of(
    draw: Draw,
    bridge: TransformerBridge,
    rows: Rows,
    names: Sequence[str],
    like: Rows | None,
    may_be_cache: bool = True,
) -> Any:
    """Returns rows as a source run: an input, the cache of its run, or the values as tensors.

    Args:
        draw: Where the form is drawn from.
        bridge: The model.
        rows: The input.
        names: Points whose values will be taken.
        like: The run that is changed, whose mask bare ids share; None where the source's input is known before the run.
        may_be_cache: Whether the logits of the run are not needed, so that a cache or tensors suffice.
    """
    is_alike = not rows.is_padded
    if like is not None and like.is_padded and rows.size == like.size:
        is_alike = torch.equal(rows.mask, like.mask) and torch.equal(rows.ids[rows.mask == 0], like.ids[like.mask == 0])
    forms = ["batch", "mapping"] + ["ids", "ids"] * is_alike
    if may_be_cache:
        forms += ["cache"] + ["tensors"] * (not rows.is_padded)
    form = draw.one("source's form", forms)
    if form in ("cache", "tensors"):
        value, keywords = given(bridge, rows, "ids")
        _, cache = bridge.run_with_cache(value, names_filter=list(names) or None, **keywords)
        return cache if form == "cache" else {name: cache[name] for name in names}
    return rows.ids if form == "ids" else given(bridge, rows, form)[0]


def sources_of(
    draw: Draw,
    bridge: TransformerBridge,
    drawn: Sequence[Change],
    inputs: Mapping[str, Rows],
    like: Rows | None,
    *,
    may_be_cache: bool = True,
) -> dict[str, Any]:
    """Returns the source runs of changes, each in a form that is drawn. Arguments are those of `source_of`."""
    n_layers, found = bridge.cfg.n_layers, {}
    for name, rows in inputs.items():
        taken = [change for change in drawn if getattr(change.action, "source", None) == name]
        found[name] = source_of(
            draw, bridge, rows, list({change.source_name(n_layers): 0 for change in taken}), like, may_be_cache
        )
    return found


# --- comparison ------------------------------------------------------------------------------------------------------


def agree(draw: Draw, ours: Tensor, theirs: Tensor, what: str, tolerance: float | None = None) -> None:
    """Fails unless two values are the same, up to rounding; NaN is the same as NaN.

    Args:
        draw: The case, which a failure prints.
        ours: What clearspan found.
        theirs: What the reference found.
        what: What is compared.
        tolerance: Largest difference over the largest value; by default that of the model's dtype.
    """
    dtype = draw.facts.get("dtype", torch.float32)
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape, f"{what}: {list(ours.shape)}, and not {list(theirs.shape)}\n{draw}"
    assert torch.equal(ours.isnan(), theirs.isnan()), f"{what}: NaN at other places\n{ours}\n{theirs}\n{draw}"
    ours, theirs = ours[~ours.isnan()], theirs[~theirs.isnan()]
    if not theirs.numel():
        return
    difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert difference <= limit * max(largest, FLOOR), (
        f"{what}: {difference / max(largest, 1e-300):.2e} of the largest value {largest:.4g}\n"
        f"ours {ours.flatten()[:8].tolist()}\ntheirs {theirs.flatten()[:8].tolist()}\n{draw}"
    )


def replaced(one: Any, **fields: Any) -> Any:
    """Returns a change or an intervention with other fields."""
    return dataclasses.replace(one, **fields)


def by_row(found: Any) -> Tensor:
    """Returns a finding's values with the axis of rows first."""
    return found.of().movedim(-1, 0)
