"""Caches: every point's value by the reference's hooks, whole, in slices, at positions, with gradients, and stacked."""

import re

import pytest
import torch

from . import gradients, ours
from .draws import ENDS, Draw
from .reference import full_name
from .test_interventions import compare_cached

VALUES, SLICES, GRADIENTS, STACKS = 16, 10, 6, 6


def drawn_names(draw, subject, count=8):
    """Draws full names of points."""
    points = [point for point in draw.points(subject) if point != "logits"]
    names = []
    for point in draw.some(list(dict.fromkeys(points)), 2, count):
        layer = None if point in ENDS else draw.random.randrange(subject.reference.n_layers)
        names.append(full_name(point, layer))
    return draw.note("names", names)


def filter_of(draw, names):
    """Returns a filter of the names, in one of the ways there are."""
    match draw.one("filter", ("all", "list", "function", "pattern")):
        case "all":
            return None
        case "list":
            return names
        case "function":
            return lambda name: name in names
    return re.compile("|".join(map(re.escape, names)) + "$")


def case(kind, number, **options):
    """Returns a draw, a model, rows and the two sides."""
    draw = Draw(kind, number)
    padding = draw.padding()
    subject = draw.subject(is_padded=padding != "none", **options)
    rows = draw.rows(padding)
    value, keywords = ours.given(ours.bridge_to(subject), rows, draw.one("form", ours.FORMS))
    return draw, subject, rows, ours.bridge_to(subject), subject.reference, value, keywords


@pytest.mark.parametrize("number", range(VALUES))
def test_values_are_those_that_hooks_see(number):
    draw, subject, rows, bridge, reference, value, keywords = case("caches", number)
    names = drawn_names(draw, subject)
    expected = reference.run(rows, (), names)
    logits, cache = bridge.run_with_cache(value, filter_of(draw, names), **keywords)
    ours.agree(draw, rows.real(logits), rows.real(expected.logits), "logits")
    for name in names:
        compare_cached(draw, rows, name, cache[name], expected.values[name])


@pytest.mark.parametrize("number", range(SLICES))
def test_slices_are_of_columns_and_positions_of_real_tokens(number):
    draw, subject, rows, bridge, reference, value, keywords = case("slices", number)
    names = drawn_names(draw, subject)
    expected = reference.run(rows, (), names).values
    if draw.one("way", ("position", "columns")) == "position":
        position = draw.note("position", draw.random.randrange(-min(rows.lengths), min(rows.lengths)))
        _, whole = bridge.run_with_cache(value, names, **keywords)
        cache = whole.at(position)
        for name in names:
            picked = [
                at_column(expected[name], rows, row, rows.column(row, position), name) for row in range(rows.size[0])
            ]
            for row, own in enumerate(picked):
                found = cache[name][row]
                if is_square(name):
                    found = found[:, rows.columns[row]]
                if name.endswith("attn_scores"):
                    is_seen = own > torch.finfo(own.dtype).min / 4
                    found, own = found.masked_fill(~is_seen, 0), own.masked_fill(~is_seen, 0)
                ours.agree(draw, found, own, f"{name} of row {row}")
        return
    width = rows.size[1]
    first = draw.random.randrange(width - 1)
    chosen = draw.one("columns", ((first, width), slice(first, None), sorted(draw.some(range(width), 1, 3))))
    columns = chosen if isinstance(chosen, list) else list(range(first, width))
    names = [name for name in names if not is_square(name)] or ["blocks.0.hook_resid_pre"]
    expected = reference.run(rows, (), names).values
    _, cache = bridge.run_with_cache(value, names, pos_slice=chosen, **keywords)
    index, real = torch.tensor(columns), rows.mask.bool()[:, columns]
    for name in names:
        found, own = cache[name], expected[name][:, index]
        ours.agree(draw, found[real], own[real], name)


def is_square(name):
    """Whether a value has queries and keys."""
    return name.endswith(("hook_pattern", "hook_attn_scores"))


def at_column(value, rows, row, column, name):
    """Returns a row's value at a column; of queries by keys, that of its real keys."""
    return value[row][:, column][:, rows.columns[row]] if is_square(name) else value[row, column]


@pytest.mark.parametrize("number", range(GRADIENTS))
def test_gradients_are_those_of_autograd(number):
    draw, subject, rows, bridge, reference, value, keywords = case("gradients", number)
    metric = draw.metric(rows, kinds=("plain", "difference", "probability"))
    names = [name for name in drawn_names(draw, subject, 5) if not name.endswith("hook_scale")]
    names = names or ["blocks.0.hook_resid_pre"]

    def total(logits):
        return metric.of(logits, rows, {})

    _, cache = bridge.run_with_cache(value, names, incl_bwd=lambda logits: total(logits).sum(), **keywords)
    for name in names:
        found, own = cache[f"{name}_grad"], gradients.slopes(reference, rows, total, [name])[name]
        if is_square(name):  # what padding holds is in the gradient at its keys
            real = rows.mask.bool()[:, None, None]
            found, own = (one.masked_fill(~real, 0).movedim(1, 2) for one in (found, own))
        ours.agree(draw, rows.real(found), rows.real(own), f"gradient at {name}", ours.GRADIENTS)


@pytest.mark.parametrize("number", range(STACKS))
def test_stacks_are_what_parts_add(number):
    draw, subject, rows, bridge, reference, value, keywords = case("stacks", number)
    layers = range(reference.n_layers)
    depth = draw.one("layer", (None, *range(1, reference.n_layers)))
    upto = reference.n_layers if depth is None else depth
    everywhere = ("resid_pre", "resid_post", "attn_out", "mlp_out", "result")
    names = [full_name(point, layer) for point in everywhere for layer in layers]
    names += ["hook_embed", *(["hook_pos_embed"] if subject.family.pos_embed else [])]
    has_mid, has_norm = not subject.family.is_parallel, subject.family.attn_out is not None
    names += [full_name("resid_mid", layer) for layer in layers if has_mid]
    names += [full_name("ln1_post.scale", layer) for layer in layers if has_norm]
    values = reference.run(rows, (), names).values
    _, cache = bridge.run_with_cache(value, **keywords)
    match draw.one("stack", ("accumulated", "decomposed", "heads")):
        case "accumulated":
            mid = draw.note("incl_mid", draw.chance(0.5))
            found = cache.accumulated_resid(depth, incl_mid=mid)
            expected = [values["blocks.0.hook_resid_pre"]]
            for layer in range(upto):
                expected += [values[full_name("resid_mid", layer)]] if mid and has_mid else []
                expected.append(values[full_name("resid_post", layer)])
        case "decomposed":
            found = cache.decompose_resid(depth)
            expected = [values[name] for name in ("hook_embed", "hook_pos_embed") if name in values]
            for layer in range(upto):
                expected += [values[full_name(point, layer)] for point in ("attn_out", "mlp_out")]
        case _:
            found = cache.stack_head_results(depth)
            expected = []
            for layer in range(upto):
                write = values[full_name("result", layer)] * reference.multiplier
                if has_norm:
                    norm = reference.module(layer, subject.family.attn_out)
                    weight = 1 + norm.weight if type(norm).__name__.startswith("Gemma") else norm.weight
                    write = write / values[full_name("ln1_post.scale", layer)].unsqueeze(2) * weight
                expected += list(write.unbind(2))
    ours.agree(draw, rows.real(found.movedim(0, 2)), rows.real(torch.stack(expected, 2)), "the stack")
