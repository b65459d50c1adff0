"""Steering vectors: made of means over real tokens, and added where they are told."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from clearspan import analysis

from . import cells, ours
from .changes import Add, Change, ProjectOut, positions_of
from .draws import Draw
from .metrics import NextTokenLoss
from .reference import full_name

FITTED, SWEPT = 8, 10
POINTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "post")


def drawn_points(draw, subject):
    """Draws a point that has one vector at each position."""
    return draw.one("point", [point for point in draw.points(subject, ends=False) if point in POINTS])


def row_means(rows, value, positions):
    """Returns the mean of each row's value over chosen positions, all where they are None."""
    found = []
    for row, columns in enumerate(rows.columns):
        chosen = columns[positions] if isinstance(positions, slice) else columns
        if not isinstance(positions, slice) and positions is not None:
            chosen = [columns[place] for place in positions_of(positions, row, len(columns))]
        found.append(value[row, chosen].mean(0))
    return torch.stack(found)


@pytest.mark.parametrize("number", range(FITTED))
def test_vectors_are_differences_of_means_over_real_tokens(number):
    draw = Draw("steering vectors", number)
    paddings = [draw.padding(), draw.padding()]
    subject = draw.subject(is_padded=paddings != ["none", "none"])
    bridge, reference = ours.bridge_to(subject), subject.reference
    method = draw.one("method", ("mean_difference", "paired_pca"))
    positive = draw.rows(paddings[0])
    negative = draw.rows(paddings[1], count=positive.size[0] if method == "paired_pca" else None)
    point = drawn_points(draw, subject)
    layers = draw.one("chosen layers", (None, -1, draw.some(range(reference.n_layers), 1, 2)))
    shortest = min(*positive.lengths, *negative.lengths)
    options = (None, -1, slice(1, None), slice(-2, None), draw.some(range(-shortest, shortest), 1, 2))
    positions = draw.one("positions", options)
    chosen = range(reference.n_layers) if layers is None else [layers] if isinstance(layers, int) else layers
    names = [full_name(point, layer % reference.n_layers) for layer in chosen]
    more, less = (reference.run(rows, (), names).values for rows in (positive, negative))
    inputs = [ours.given(bridge, rows, draw.one("form", ours.form_of(rows)))[0] for rows in (positive, negative)]
    found = analysis.fit_steering_vector(
        bridge, *inputs, layers=layers, name=point, positions=positions, method=method,
        batch_size=draw.one("batch size", (1, 2, 32)),
    )  # fmt: skip
    for name in names:
        high, low = row_means(positive, more[name], positions), row_means(negative, less[name], positions)
        expected = high.mean(0) - low.mean(0)
        if method == "paired_pca":
            differences = (high - low).flatten(1)
            direction = torch.linalg.svd(differences).Vh[0]
            expected = ((differences @ direction).mean() * direction).view(expected.shape)
        ours.agree(draw, found.vectors[name], expected, name)


@pytest.mark.parametrize("number", range(SWEPT))
def test_steering_adds_the_vector_at_real_positions(number):
    draw = Draw("steering", number)
    padding = draw.padding()
    subject = draw.subject(is_padded=padding != "none")
    rows = draw.rows(padding)
    bridge, reference = ours.bridge_to(subject), subject.reference
    point = drawn_points(draw, subject)
    layers = draw.note("chosen layers", draw.some(range(reference.n_layers), 1, 2))
    shape = reference.run(rows, (), [full_name(point, 0)]).values[full_name(point, 0)].shape[2:]
    vectors = {full_name(point, layer): torch.randn(shape, generator=draw.generator) for layer in layers}
    vector = analysis.SteeringVector(vectors)
    positions, strengths = draw.positions(rows), draw.one("strengths", ((1.0,), (-2.0, 0.5), (0.0, 3.0)))
    draw.note("positions", positions)
    metric = draw.one("metric", (None, draw.metric(rows)))
    if draw.chance(0.3):  # the vector's interventions in one run
        check_interventions(draw, bridge, reference, rows, vector, layers, point, positions, strengths[0])
        return
    controls = draw.one("controls", (0, 1))
    jointly = draw.one("jointly", (False, True))
    units = [layers] if jointly else [[layer] for layer in layers]
    directions = [vector, *(None for _ in range(controls))]
    made = []
    for unit in units:
        own = [full_name(point, layer) for layer in unit]
        for number, _ in enumerate(directions):
            part = analysis.SteeringVector({name: vectors[name] for name in own})
            added = part if number == 0 else part.random_like(5 + number - 1)
            for strength in strengths:
                pairs = zip(unit, own, strict=True)
                made.append([adding(point, layer, added.vectors[name], strength, positions) for layer, name in pairs])
    measured = NextTokenLoss() if metric is None else metric
    expected, base = cells.measured(reference, rows, made, {"metric": measured}, {}, {})
    other = draw.rows(draw.one("padding of the other text", ("none", *["right"] * (padding != "none"))))
    has_cost = draw.note("has a cost", draw.chance(0.4))
    found = analysis.steering_sweep(
        bridge,
        vector,
        ours.given(bridge, rows, draw.one("form", ours.form_of(rows)))[0],
        None if metric is None else ours.metric_of(metric, rows.mask),
        strengths=strengths,
        positions=positions,
        controls=controls,
        jointly=jointly,
        seed=5,
        progress=False,
        unrelated=ours.given(bridge, other, "mapping")[0] if has_cost else None,
    )
    ours.agree(draw, found.of().flatten(0, -2), expected["metric"], "the metric of steered runs")
    ours.agree(draw, next(iter(found.base.values())), base["metric"], "the metric of the plain run")
    if has_cost:
        everywhere = [[dataclasses.replace(change, positions=None) for change in cell] for cell in made]
        costs, _ = cells.measured(reference, other, everywhere, {"loss": NextTokenLoss()}, {}, {})
        ours.agree(draw, found.of("loss on other text").flatten(0, -2), costs["loss"], "the cost")


def check_interventions(draw, bridge, reference, rows, vector, layers, point, positions, strength):
    """Compares a run that is steered, or from which the vector is projected out."""
    ablates = draw.note("ablates", draw.chance(0.5))
    given = vector.ablation(positions) if ablates else vector.interventions(strength, positions)
    value, keywords = ours.given(bridge, rows, draw.one("form", ours.FORMS))
    logits = bridge(value, **keywords, interventions=given)
    made = []
    for layer in layers:
        values = tuple(vector.vectors[full_name(point, layer)].flatten().tolist())
        made.append((layer, ProjectOut(values) if ablates else Add(values, strength)))
    made = [Flat(point, action, layer, positions) for layer, action in made]
    edits = [change.edit(rows, reference.n_layers, {}) for change in made]
    ours.agree(draw, rows.real(logits), rows.real(reference.run(rows, edits).logits), "logits")


@dataclass(frozen=True)
class Flat(Change):
    """A change of a value whose axes after the positions are one vector."""

    def applied(self, value, rows, n_layers, sources):
        flat = Change("resid_pre", self.action, self.layer, self.positions)
        return flat.applied(value.flatten(2), rows, n_layers, sources).view(value.shape)


def adding(point, layer, vector, strength, positions):
    """Returns the change that adds a vector."""
    return Flat(point, Add(tuple(vector.flatten().tolist()), strength), layer, positions)
