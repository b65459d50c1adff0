"""Attribution patching and edge attribution: against gradients that autograd finds at the reference's own points."""

import pytest
import torch

from clearspan import analysis

from . import gradients, ours
from .changes import AXES
from .draws import INPUTS, NORMS
from .gradients import by_unit, first_order
from .reference import full_name
from .test_paths import Pair

UNITS, EDGES = 18, 12


@pytest.mark.parametrize("number", range(UNITS))
def test_effects_of_units_are_changes_times_gradients(number):
    pair = Pair("attribution", number)
    draw, reference = pair.draw, pair.reference
    fix = draw.note("qk_fix", draw.chance(0.25) and reference.family.attention == "eager")
    points = [point for point in draw.points(pair.subject, ends=False) if point not in (*INPUTS, *NORMS)]
    point = draw.one("point", ("q", "k") if fix else points)
    by_position = draw.one("by position", (True, True, False))
    layers = draw.one("chosen layers", (None, draw.some(range(reference.n_layers), 1, 2)))
    drop = draw.note("grad_drop", draw.chance(0.25))
    chosen = range(reference.n_layers) if layers is None else layers
    names = [full_name(point, layer) for layer in chosen]
    base, source = (reference.run(rows, (), names).values for rows in (pair.base, pair.source))

    def effects(edits):
        """Returns the effects by layer, with edits that stop gradients."""
        at = [full_name("pattern", layer) for layer in chosen] if fix else names
        found = gradients.slopes(reference, pair.base, pair.measured, at, edits)
        if not fix:
            each = [first_order(base[name], source[name], found[name]) for name in names]
            return torch.stack([by_unit(one, point, pair.base, by_position) for one in each], 1)
        plain = reference.run(pair.base, (), at).values
        every = []
        for layer, name, pattern in zip(chosen, names, at, strict=True):
            changed = gradients.changed_patterns(reference, pair.base, point, layer, source[name], by_position)
            every.append(gradients.through_patterns(pair.base, plain[pattern], changed, found[pattern]))
        return torch.stack(every, 1)

    if drop:
        is_stream = point.startswith("resid_")
        total, counts = 0, torch.zeros(len(chosen))
        for dropped in range(reference.n_layers):
            counted = torch.tensor([is_stream or layer != dropped for layer in chosen])
            found = effects(gradients.stopped(reference, dropped)).abs()
            total = total + found * counted.view(1, -1, *[1] * (found.ndim - 2))
            counts += counted
        expected = total / counts.view(1, -1, *[1] * (total.ndim - 2))
    else:
        expected = effects(())
    found = analysis.attribution_patch(
        *pair.arguments(),
        point,
        layers=layers,
        by_position=by_position,
        direction=pair.direction,
        qk_fix=fix,
        grad_drop=drop,
    )
    assert (found.axes.keys() - {"layer"} == set()) == (not by_position and not has_heads(point))
    ours.agree(draw, ours.by_row(found), expected, "effects of units", ours.GRADIENTS)


def has_heads(point):
    """Whether a unit is a head or a neuron."""
    return bool({"head", "group", "neuron"} & set(AXES[point].split()))


@pytest.mark.parametrize("number", range(EDGES))
def test_scores_of_edges_are_changes_times_gradients(number):
    pair = Pair("edge attribution", number, longest=5)
    draw, reference = pair.draw, pair.reference
    steps = draw.one("steps", (None, None, 1, 3, 4))
    scheme = draw.one("scheme", ("midpoint", "paper"))
    options = {} if steps is None else {"steps": steps, "scheme": scheme}
    if steps is not None and scheme == "midpoint" and draw.chance(0.5):
        options.pop("scheme")  # the default
    shift = 0.5 if scheme == "midpoint" else 1.0
    alphas = None if steps is None else [(step + shift) / steps for step in range(steps)]
    expected = gradients.edge_scores(reference, pair.base, pair.source, pair.measured, alphas)
    found = analysis.edge_attribution(*pair.arguments(), direction=pair.direction, **options)
    ours.agree(draw, ours.by_row(found), expected, "scores of edges", ours.GRADIENTS)
