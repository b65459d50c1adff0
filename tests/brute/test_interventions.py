"""Runs with interventions, hook functions and permanent hooks, mixed: logits and caches of one forward."""

import contextlib

import pytest
import torch

from . import ours
from .changes import AXES, sources_of
from .draws import INPUTS, Draw
from .models import subject as subject_of

CASES = 50


def drawn_changes(draw, subject, rows, names, count, what="changes"):
    """Draws changes that exclude each other at no layer: a norm's output is written, or inputs by head are."""
    found = [draw.change(subject, rows, names) for _ in range(count)]
    return draw.note(what, found)


def is_excluded(changes, n_layers):
    """Whether a norm's output and an input of its readers are written in one layer: one would hide the other."""
    layers = {each.layer % n_layers for each in changes if each.point in (*INPUTS, "mlp_in")}
    return any(each.point.startswith("ln1.") and each.layer % n_layers in layers for each in changes)


def hook_of(change, rows, n_layers, sources):
    """Returns a change as a hook function of the run."""
    return change.name(n_layers), lambda value, hook: change.applied(value, rows, n_layers, sources)


@pytest.mark.parametrize("number", range(CASES))
def test_interventions_and_hooks_give_what_plain_hooks_give(number):
    draw = Draw("interventions", number)
    padding = draw.padding()
    subject = draw.subject(is_padded=padding != "none")
    rows = draw.rows(padding)
    bridge, reference, n_layers = ours.bridge_to(subject), subject.reference, subject.reference.n_layers
    relaid = draw.note("source is laid out otherwise", rows.is_padded and draw.chance(0.2))
    inputs = {"clean": draw.other_rows(rows, relaid=relaid)}
    while True:
        changes = drawn_changes(draw, subject, rows, list(inputs), draw.random.randint(1, 3))
        permanent = drawn_changes(draw, subject, rows, (), 0 if relaid else draw.chance(0.2), "permanent hooks")
        hooks = drawn_changes(draw, subject, rows, (), draw.random.choice((0, 0, 1, 2)), "hook functions")
        if not is_excluded([*permanent, *changes, *hooks], n_layers):
            break
    way = draw.one(
        "way", [*WAYS, *(WITHIN if hooks and not relaid else ()), *(WAYS_WITHOUT_FUNCTIONS if not hooks else ())]
    )
    already_on = [*permanent, *(hooks if way in WITHIN else ())]
    on = [change.edit(rows, n_layers, {}) for change in already_on]
    sources = sources_of(reference, changes, inputs, on)
    rest = [] if way in WITHIN else hooks
    edits = [*on, *(change.edit(rows, n_layers, sources) for change in [*changes, *rest])]
    shown = sorted({change.name(n_layers) for change in [*already_on, *changes, *rest]} - {"hook_logits"})
    embeds = None
    value, keywords = ours.given(bridge, rows, draw.one("form", ours.FORMS))
    if draw.note("embeddings", "hook_embed" not in shown and draw.chance(0.15)):
        embeds = subject.model.get_input_embeddings()(rows.ids).detach() * 1.5
        given = {"attention_mask": rows.mask} if rows.is_padded else {}
        value, keywords = (embeds, given) if draw.chance(0.5) else (None, {"inputs_embeds": embeds, **given})
    expected = reference.run(rows, edits, shown, embeds)
    functions = [hook_of(change, rows, n_layers, sources) for change in hooks]
    with contextlib.ExitStack() as stack:
        stack.callback(bridge.reset_hooks, including_permanent=True)
        for change in permanent:
            bridge.add_hook(*hook_of(change, rows, n_layers, {}), is_permanent=True)
        if way in WITHIN:
            stack.enter_context(bridge.hooks(fwd_hooks=functions))
        keywords["interventions"] = ours.interventions_of(changes, n_layers)
        like = None if way == "hooks" or embeds is not None else rows
        keywords["sources"] = ours.sources_of(draw, bridge, changes, inputs, like)
        logits, cache = run(way, bridge, value, keywords, functions)
    ours.agree(draw, rows.real(logits), rows.real(expected.logits), "logits")
    if cache is not None:
        for name in shown:
            compare_cached(draw, rows, name, cache[name], expected.values[name])


WAYS = ("run_with_hooks", "run_with_hooks", "hooks")
WITHIN = ("run_with_hooks within hooks", "run_with_cache within hooks")
WAYS_WITHOUT_FUNCTIONS = ("forward", "forward", "run_with_cache", "run_with_cache")
"""Ways of a run: hook functions come with the interventions, or are on already."""


def run(way, bridge, value, keywords, hooks):
    """Returns logits, and the cache where one is made."""
    match way:
        case "forward":
            return bridge(value, **keywords), None
        case "run_with_cache" | "run_with_cache within hooks":
            return bridge.run_with_cache(value, **keywords)
        case "run_with_hooks":
            return bridge.run_with_hooks(value, fwd_hooks=hooks, **keywords), None
        case "run_with_hooks within hooks":
            return bridge.run_with_hooks(value, **keywords), None
    drawn = {name: keywords.pop(name) for name in ("interventions", "sources")}
    with bridge.hooks(fwd_hooks=hooks, **drawn):
        return bridge(value, **keywords), None


def compare_cached(draw, rows, name, found, expected):
    """Compares a cached value at real tokens; scores where they are not masked."""
    if expected.ndim == 4 and name.endswith(("pattern", "attn_scores")):
        found, expected = (value.movedim(1, 2) for value in (found, expected))
    found, expected = rows.real(found), rows.real(expected)
    if name.endswith("attn_scores"):
        is_seen = expected > torch.finfo(expected.dtype).min / 4
        found, expected = (value.masked_fill(~is_seen, 0) for value in (found, expected))
    ours.agree(draw, found, expected, name)


def test_every_point_that_is_drawn_has_axes():
    for variant in ("gpt2", "gemma2", "gpt_neox"):
        points = Draw("points", 0).points(subject_of(variant))
        assert set(points) <= set(AXES)
