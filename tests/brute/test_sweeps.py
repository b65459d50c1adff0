"""Sweeps: each cell is what a forward of its own gives, whatever batches the planner makes."""

import pytest

from clearspan.interventions import Intervention
from clearspan.sweep import Sweep, grid

from . import cells, ours
from .changes import AXES, Change, sources_of
from .draws import ENDS, INPUTS, NORMS, SQUARES, Draw
from .test_interventions import is_excluded

CASES = 40


def drawn_grid(draw, subject, rows):
    """Draws one change at every place of a few axes: the axes, and the changes of the cells in their order."""
    reference, longest = subject.reference, max(rows.lengths)
    points = [point for point in draw.points(subject) if point not in (*ENDS, *NORMS)]
    change = draw.change(subject, rows, ["clean"], points=points, may_be_columns=False)
    names = AXES[change.point].split()
    axes = {"layer": draw.some(range(reference.n_layers), 1, 3)}
    if draw.chance(0.7):
        axes["position"] = range(longest) if draw.chance(0.6) else draw.some(range(-longest, longest), 1, 3)
    heads = {"head": reference.n_heads, "group": reference.n_groups}
    if draw.chance(0.5) and not {"head", "group"}.isdisjoint(names):
        axes["head"] = draw.some(range(heads["head" if "head" in names else "group"]), 1, 2)
    if change.key_positions is not None:
        axes["key_position"] = draw.some(range(1, min(rows.lengths)), 1, 2)
    order = draw.note("axes", {name: tuple(axes[name]) for name in draw.some(list(axes), len(axes), len(axes))})
    fields = {"layer": "layer", "position": "positions", "head": "heads", "key_position": "key_positions"}
    found = [{}]
    for name, places in order.items():
        found = [{**one, fields[name]: (place,) if name == "head" else place} for one in found for place in places]
    plain = {name: getattr(change, name) for name in ("positions", "heads", "neurons", "key_positions")}
    template = draw.note("template", Change(change.point, change.action, 0, **plain))
    made = [Change(**{**vars(template), **one}) for one in found]
    kept = {fields[name] for name in order}
    places = {name: value for name, value in plain.items() if name not in kept}
    intervention = Intervention(change.point, ours.action_of(change.action), **places)
    return grid(intervention, **order), [(change,) for change in made]


def drawn_cells(draw, subject, rows):
    """Draws cells of several changes each, in any order."""
    n_layers, found = subject.reference.n_layers, []
    points = [point for point in draw.points(subject) if point != "logits"]
    for _ in range(draw.random.randint(2, 8)):
        while True:
            cell = tuple(draw.change(subject, rows, ["clean"], points=points) for _ in range(draw.random.randint(1, 3)))
            if not is_excluded(cell, n_layers):
                break
        found.append(cell)
    if draw.chance(0.4):
        found.append(one_tensor_under_two_names(draw, subject, rows))
    draw.note("cells", found)
    return {f"cell {number}": ours.interventions_of(cell, n_layers) for number, cell in enumerate(found)}, found


def one_tensor_under_two_names(draw, subject, rows):
    """Draws changes of what leaves a block and enters the next one, the later one first in the list."""
    last = subject.reference.n_layers - 1
    layer, positions = draw.random.randrange(last), draw.random.randrange(-min(rows.lengths), 0)
    kinds = ["Zero", "Add", "ProjectOut", "Inject", "Patch"]
    first, second = (draw.change(subject, rows, ["clean"], points=["resid_post"], kinds=kinds) for _ in range(2))
    plain = {"positions": positions, "columns": None}
    first = ours.replaced(first, layer=layer, **plain)
    return ours.replaced(second, point="resid_pre", layer=layer + 1, **plain), first


@pytest.mark.parametrize("number", range(CASES))
def test_cells_are_what_a_forward_of_their_own_gives(number):
    draw = Draw("sweeps", number)
    padding = draw.padding()
    subject = draw.subject(is_padded=padding != "none")
    rows = draw.rows(padding, longest=7)
    bridge, reference = ours.bridge_to(subject), subject.reference
    relaid = draw.note("source is laid out otherwise", rows.is_padded and draw.chance(0.2))
    inputs = {"clean": draw.other_rows(rows, relaid=relaid)}
    given, made = (drawn_grid if draw.chance(0.5) else drawn_cells)(draw, subject, rows)
    points = [
        point for point in draw.points(subject) if point not in (*INPUTS, *SQUARES) and not point.startswith("ln1")
    ]
    background = [draw.change(subject, rows, ["clean"], points=points)] if draw.chance(0.25) else []
    draw.note("background", background)
    drawn = [change for cell in made for change in cell]
    may_compare = ["base"] if relaid else ["base", "clean"]
    kinds = ("difference", "probability", "divergence", "loss", *["plain"] * (not relaid))
    metrics = {f"metric {i}": draw.metric(rows, may_compare, kinds=kinds) for i in range(draw.random.randint(1, 2))}
    draw.note("metrics", metrics)
    sources = sources_of(reference, [*drawn, *background], inputs)
    runs = {} if relaid else {"clean": reference.run(inputs["clean"]).logits}
    expected, base = cells.measured(reference, rows, made, metrics, sources, runs, background)
    memory = draw.one("memory", (None, None, 1, 30_000, 300_000))
    value, keywords = ours.given(bridge, rows, draw.one("form", ours.form_of(rows)))
    may_be_cache = not any(getattr(metric, "against", None) == "clean" for metric in metrics.values())
    found = Sweep(
        bridge,
        value,
        given,
        {name: ours.metric_of(metric, rows.mask) for name, metric in metrics.items()},
        sources=ours.sources_of(draw, bridge, [*drawn, *background], inputs, rows, may_be_cache=may_be_cache),
        background=ours.interventions_of(background, reference.n_layers),
        **keywords,
    ).run(memory, progress=False)
    for name in metrics:
        ours.agree(draw, found.of(name).flatten(0, -2), expected[name], f"{name} of cells")
        ours.agree(draw, found.base[name], base[name], f"{name} of the run that is changed")
