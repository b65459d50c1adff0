"""Activation patching on pairs of prompts: both directions, all paddings, paddings that differ between the pair."""

import pytest

from clearspan import patching
from clearspan.errors import ClearspanError

from . import cells, ours
from .changes import AXES, Change, Patch, sources_of
from .draws import INPUTS, NORMS, Draw

CASES = 30
WRONG_DIRECTIONS = ("denoise", "noise", "Denoising", "")


@pytest.mark.parametrize("number", range(CASES))
def test_patching_gives_what_a_forward_for_each_cell_gives(number):
    draw = Draw("patching", number)
    padding = draw.padding()
    relaid = draw.note("padding differs", draw.chance(0.4 if padding != "none" else 0.15))
    subject = draw.subject(is_padded=relaid or padding != "none")
    clean = draw.rows(padding, longest=6)
    corrupted = draw.other_rows(clean, relaid=relaid)
    bridge, reference = ours.bridge_to(subject), subject.reference
    names = [name for name in draw.points(subject, ends=False) if name not in (*INPUTS, *NORMS)]
    point = draw.one("point", names)
    axes, by, places = drawn_axes(draw, reference, point, min(clean.lengths))
    direction = draw.one("direction", ("denoising", "noising", *draw.some(WRONG_DIRECTIONS, 0, 1)))
    inputs = [ours.given(bridge, one, draw.one("form", ours.form_of(one)))[0] for one in (clean, corrupted)]
    corrupted = corrupted.laid_out_as(clean)
    rows, other = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    name = "clean" if direction == "denoising" else "corrupted"
    metric = draw.metric(rows, ("base", name))
    arguments = (bridge, *inputs, ours.metric_of(metric, clean.mask), point, by)
    memory = draw.one("memory", (None, 1, 100_000))
    if direction in WRONG_DIRECTIONS:
        with pytest.raises(ClearspanError, match="direction"):
            patching.activation_patching(*arguments, direction=direction, **places)
        return
    made = [(each,) for each in axes(max(rows.lengths), Patch(name))]
    sources = sources_of(reference, [each for (each,) in made], {name: other})
    runs = {name: reference.run(other).logits}
    expected, base = cells.measured(reference, rows, made, {"metric": metric}, sources, runs)
    found = patching.activation_patching(*arguments, direction=direction, memory=memory, progress=False, **places)
    ours.agree(draw, found.of().flatten(0, -2), expected["metric"], "the metric of cells")
    ours.agree(draw, next(iter(found.base.values())), base["metric"], "the metric of the run that is changed")


def drawn_axes(draw, reference, point, shortest):
    """Draws what a cell is: a function that makes the changes, the axes' names, and the places that are given."""
    axes = AXES[point].split()
    sizes = {"layer": reference.n_layers}
    if "head" in axes or "group" in axes:
        sizes["head"] = reference.n_heads if "head" in axes else reference.n_groups
    kinds = ["layer", "position", *(["head"] if "head" in sizes else [])]
    if axes[-1] == "k":
        kinds.append("key_position")
    by = draw.one("by", [tuple(draw.some(kinds, count, count)) for count in (1, 2, 2)])
    given = {}
    if "layer" not in by:
        by = ("layer", *by)
    for name in by:
        if draw.chance(0.3):
            size = sizes.get(name, shortest)
            given[name] = tuple(
                place - size if draw.chance(0.3) and name != "head" else place for place in draw.some(range(size), 1, 2)
            )
    draw.note("places", given)
    fields = {"layer": "layer", "position": "positions", "head": "heads", "key_position": "key_positions"}

    def changes(longest, action):
        found = [{}]
        for name in by:
            every = given.get(name, range(sizes.get(name, longest)))
            found = [{**one, name: place} for one in found for place in every]
        for one in found:
            made = {fields[name]: (place,) if name == "head" else place for name, place in one.items()}
            yield Change(point, action, **{"layer": 0, **made})

    return changes, by, given
