"""Ablation: heads, sublayers and neurons, each in a forward of its own; means and other rows without padding."""

import pytest

from clearspan import analysis
from clearspan.errors import InvalidArgumentError

from . import cells, ours
from .changes import Change, Mean, Resample, Zero, sources_of
from .draws import Draw
from .metrics import NextTokenLoss

CASES = 14


@pytest.mark.parametrize("number", range(CASES))
def test_units_are_put_out_one_at_a_time(number):
    draw = Draw("ablation", number)
    padding = draw.padding()
    method = draw.one("method", ("zero", "mean", "mean", "resample"))
    subject = draw.subject(is_padded=padding != "none")
    rows = draw.rows(padding, count=2 if method == "resample" and padding == "none" else None)
    bridge, reference = ours.bridge_to(subject), subject.reference
    kinds = ("heads", "layers", *(["neurons"] if subject.family.post is not None else []))
    kind = draw.one("kind", kinds)
    has_reference = draw.note("has a reference", draw.chance(0.5))
    is_free = method == "mean" and has_reference and draw.chance(0.5)  # of other rows and lengths
    other = rows if not has_reference else draw.rows() if is_free else draw.other_rows(rows)
    seed = draw.random.randrange(5)
    action = {"zero": Zero(), "mean": Mean("reference"), "resample": Resample("reference", seed)}[method]
    layers = draw.one("chosen layers", (None, draw.some(range(reference.n_layers), 1, 2)))
    every = range(reference.n_layers) if layers is None else layers
    if kind == "heads":
        run, keywords = analysis.ablate_heads, {"layers": layers}
        made = [Change("z", action, layer, heads=(head,)) for layer in every for head in range(reference.n_heads)]
    elif kind == "layers":
        run, keywords = analysis.ablate_layers, {"layers": layers}
        made = [Change(point, action, layer) for layer in every for point in ("attn_out", "mlp_out")]
    else:
        layer, neurons = draw.random.randrange(reference.n_layers), draw.some(range(64), 2, 4)
        run, keywords = analysis.ablate_neurons, {"layer": layer, "neurons": list(neurons)}
        made = [Change("post", action, layer, neurons=(neuron,)) for neuron in neurons]
    draw.note("units", keywords)
    metric = draw.one("metric", (None, draw.metric(rows)))
    arguments = [ours.given(bridge, rows, draw.one("form", ours.form_of(rows)))[0]]
    arguments += [None if metric is None else ours.metric_of(metric, rows.mask)]
    if has_reference:
        keywords["reference"] = ours.given(bridge, other, draw.one("reference's form", ours.form_of(other)))[0]
    is_refused = method == "resample" and len(set(other.lengths)) > 1
    if is_refused:
        with pytest.raises(InvalidArgumentError, match=r"same position|one length"):
            run(bridge, *arguments, method=method, seed=seed, **keywords)
        return
    sources = sources_of(reference, made, {"reference": other})
    measured = NextTokenLoss() if metric is None else metric
    expected, base = cells.measured(reference, rows, [(one,) for one in made], {"metric": measured}, sources, {})
    found = run(bridge, *arguments, method=method, seed=seed, progress=False, **keywords)
    ours.agree(draw, found.of().flatten(0, -2), expected["metric"], "the metric of ablated runs")
    ours.agree(draw, next(iter(found.base.values())), base["metric"], "the metric of the plain run")
