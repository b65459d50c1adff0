import pytest
import torch
from tests.unit.circuits.frozen import laid_alike, pair_of
from tests.zoo import CONTINUOUS, build

import clearspan
from clearspan.circuits import Agreement, attribution_patch
from clearspan.circuits.attribution import KeyChange, dropped_gradients, pearson, ranks
from clearspan.circuits.runs import PairRuns
from clearspan.errors import AbsentPointError, InvalidArgumentError
from clearspan.interventions import Patch
from clearspan.sweep import KLDivergence, LogitDifference, NextTokenLoss, Sweep, grid

VARIANTS = [
    *("gpt_bigcode", "llama", "gemma2", "qwen3", "olmo2", "granite", "opt post-norm", "bloom normed residual"),
    *("falcon grouped", "mixtral", "gpt_oss", "deepseek_v3"),
]
"""Shared keys and values, rotation, caps, norms of queries and on outputs, parallel blocks, experts, sinks, latents."""
METRIC = LogitDifference((3, 4), (5, 6))


def in_float64(variant):
    smooth = {"activation_function": "gelu"} if variant.startswith("opt") else {}
    model = build(variant, **CONTINUOUS.get(variant, {}), **smooth).double()
    if variant in CONTINUOUS:  # the grouped kernel has no float64
        model.set_experts_implementation("eager")
    return clearspan.boot(model)


@pytest.fixture(scope="module", params=VARIANTS)
def bridge(request):
    return in_float64(request.param)


@pytest.fixture(scope="module")
def exact():
    return clearspan.boot(build("llama").double())


def ids(seed):
    return torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(seed))


CLEAN, CORRUPTED = ids(3), ids(4)


def slope(bridge, hooks_at, step=0.02):
    """Returns the numeric derivative of each row's metric of the corrupted run, along what hooks add, to order 4."""

    def measure(factor):
        with torch.no_grad():
            return METRIC(bridge.run_with_hooks(CORRUPTED, fwd_hooks=hooks_at(factor)))

    near, far = (measure(size) - measure(-size) for size in (step, 2 * step))
    return (8 * near - far) / (12 * step)


def adding(direction, factor):
    return lambda value, hook: value + (factor * direction).to(value)


def close(terms, expected):
    """Compares sums of terms. Softmax is in float32 in most models, so that numeric slopes are coarse."""
    terms = terms.double().flatten(1)
    size = float(terms.abs().sum(1).max())
    torch.testing.assert_close(terms.sum(1), expected.double(), rtol=1e-3, atol=3e-4 * size + 2e-5)


UNITS = [
    "resid_pre",
    "resid_post",
    "attn_out",
    "mlp_out",
    "z",
    "q",
    "k",
    "v",
    "rot_q",
    "rot_k",
    "post",
    "pattern",
    "attn_scores",
]


@pytest.mark.parametrize("unit", UNITS)
def test_scores_are_derivatives_towards_the_source(bridge, unit):
    """Along a random mix of all units of a layer, the slope is the same mix of scores."""
    layer = 1
    name = clearspan.get_act_name(unit, layer)
    if name not in bridge.hook_dict:
        with pytest.raises(AbsentPointError):
            attribution_patch(bridge, CLEAN, CORRUPTED, METRIC, unit, layers=[layer])
        return
    found = attribution_patch(bridge, CLEAN, CORRUPTED, METRIC, unit, layers=[layer])
    _, clean = bridge.run_with_cache(CLEAN, name)
    _, corrupted = bridge.run_with_cache(CORRUPTED, name)
    change = torch.where(clean[name] == corrupted[name], 0, clean[name] - corrupted[name])
    scores = found.of().movedim(-1, 0)[:, 0]
    weights = torch.rand(scores.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mix = weights.reshape(*weights.shape, *[1] * (change.ndim - weights.ndim)) * change
    expected = slope(bridge, lambda factor: [(name, adding(mix, factor))])
    close(scores * weights, expected)
    assert expected.abs().max() > 1e-4


def test_positions_together_are_the_sum(bridge):
    apart = attribution_patch(bridge, CLEAN, CORRUPTED, METRIC, "z")
    together = attribution_patch(bridge, CLEAN, CORRUPTED, METRIC, "z", by_position=False)
    assert list(apart.axes) == ["layer", "position", "head"]
    assert list(together.axes) == ["layer", "head"]
    assert together.mean().shape == (bridge.cfg.n_layers, bridge.cfg.n_heads)
    torch.testing.assert_close(together.of(), apart.of().sum(1))


# --- the QK fix ------------------------------------------------------------------------------------------------------


def changed_pattern(bridge, layer, name, source, streams, positions, head):
    """Returns a layer's pattern with one head's queries or keys changed, in a run of that layer alone."""

    def write(value, hook):
        value[:, positions, head] = source[:, positions, head]

    pattern = f"blocks.{layer}.attn.hook_pattern"
    with bridge.hooks([(name, write)]), torch.no_grad():
        _, cache = bridge.run_with_cache(
            streams["resid_pre", layer], pattern, start_at_layer=layer, stop_at_layer=layer + 1
        )
    return cache[pattern]


@pytest.mark.parametrize("unit", ["q", "k", "rot_q", "rot_k"])
def test_the_qk_fix_takes_the_pattern_that_each_changed_query_or_key_gives(bridge, unit):
    layer = 1
    name, pattern = clearspan.get_act_name(unit, layer), f"blocks.{layer}.attn.hook_pattern"
    if name not in bridge.hook_dict:
        with pytest.raises(AbsentPointError):
            attribution_patch(bridge, CLEAN, CORRUPTED, METRIC, unit, qk_fix=True)
        return
    source = bridge.run_with_cache(CLEAN, name)[1][name]
    _, base = bridge.run_with_cache(
        CORRUPTED, [f"blocks.{layer}.hook_resid_pre", pattern], incl_bwd=lambda logits: METRIC(logits).sum()
    )
    found = attribution_patch(bridge, CLEAN, CORRUPTED, METRIC, unit, layers=[layer], qk_fix=True)
    together = attribution_patch(bridge, CLEAN, CORRUPTED, METRIC, unit, layers=[layer], qk_fix=True, by_position=False)
    gradient, scale = base[f"{pattern}_grad"].double(), found.mean().abs().max()
    for head in range(source.shape[2]):
        for position in (0, 2, 5):
            changed = changed_pattern(bridge, layer, name, source, base, [position], head)
            expected = ((changed - base[pattern]) * gradient).sum((1, 2, 3))
            torch.testing.assert_close(
                found.of()[0, position, head].double(), expected, rtol=1e-4, atol=float(1e-5 * scale)
            )
        changed = changed_pattern(bridge, layer, name, source, base, slice(None), head)
        expected = ((changed - base[pattern]) * gradient).sum((1, 2, 3))
        torch.testing.assert_close(together.of()[0, head].double(), expected, rtol=1e-4, atol=float(1e-5 * scale))


def saturated(strength, outputs):
    """A model of one layer with peaked attention, whose heads add so little that the metric is linear in it."""
    bridge = clearspan.boot(build("gpt_bigcode multi-head", n_layer=1).double())
    with torch.no_grad():
        bridge.blocks[0].attn.W_Q *= strength
        bridge.blocks[0].attn.W_O *= outputs
    return bridge


@pytest.mark.parametrize("unit", ["q", "k"])
def test_where_attention_is_saturated_the_fix_is_exact_and_the_gradient_is_not(unit):
    bridge = saturated(strength=8.0, outputs=1e-4)
    plain = attribution_patch(bridge, CLEAN, CORRUPTED, METRIC, unit).compared_with_exact(None).agreement
    fixed = attribution_patch(bridge, CLEAN, CORRUPTED, METRIC, unit, qk_fix=True).compared_with_exact(None).agreement
    size = fixed.exact.abs().max()
    assert plain.largest_error > size / 2
    assert fixed.largest_error < 1e-3 * size
    assert fixed.pearson > 0.9999 > plain.pearson


def test_a_changed_key_is_exact_also_where_one_key_has_all_attention():
    """In float32, with scores that leave the other keys 1e-12 and less, some of them masked."""
    generator = torch.Generator().manual_seed(8)
    before, after, gradient = torch.randn(3, 1, 2, 6, 6, generator=generator)
    before[..., 1] += 30
    after[..., 1] -= 2
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    for lowest in (-torch.inf, torch.finfo(torch.float32).min):
        scores, changed = (one.masked_fill(hidden, lowest) for one in (before, after))
        found = KeyChange.of(scores, changed)(gradient)
        for key in range(6):
            one = scores.double()
            one[..., key] = changed[..., key].double()
            pattern = one.softmax(-1) - scores.double().softmax(-1)
            expected = (pattern * gradient).sum((-2, -1))
            torch.testing.assert_close(found[..., key].double(), expected, rtol=1e-4, atol=1e-5)


# --- GradDrop --------------------------------------------------------------------------------------------------------


def test_a_dropped_layer_is_as_if_what_it_adds_were_held(bridge):
    names = ["blocks.0.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.2.attn.hook_z"]
    pair = PairRuns.of(bridge, CLEAN, CORRUPTED, METRIC)
    held = [f"blocks.1.hook_{part}_out" for part in ("attn", "mlp")]
    _, cache = bridge.run_with_cache(CORRUPTED, [*names, *held])
    holding = [(name, lambda value, hook: cache[hook.name].clone()) for name in held]
    gradients = list(dropped_gradients(pair, names, pair.source_run(names)))
    assert len(gradients) == bridge.cfg.n_layers
    for name in names:
        direction = torch.randn(cache[name].shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64) / 4
        expected = slope(bridge, lambda factor: [(name, adding(direction, factor)), *holding])
        close(gradients[1][name] * direction, expected)


@pytest.mark.parametrize("unit", ["z", "resid_mid", "q", "attn_out"])
def test_grad_drop_is_the_mean_of_sizes_over_other_layers(unit):
    bridge, layers = clearspan.boot(build("gpt_bigcode").double()), range(3)
    found = attribution_patch(bridge, CLEAN, CORRUPTED, METRIC, unit, grad_drop=True)
    names = [clearspan.get_act_name(unit, layer) for layer in layers]
    _, clean = bridge.run_with_cache(CLEAN, names)
    _, corrupted = bridge.run_with_cache(CORRUPTED, names)
    pair = PairRuns.of(bridge, CLEAN, CORRUPTED, METRIC)
    drops = list(dropped_gradients(pair, names, pair.source_run(names)))
    for layer, name in enumerate(names):
        counted = [drop for drop in layers if drop != layer or unit == "resid_mid"]
        sizes = [((clean[name] - corrupted[name]) * drops[drop][name]).sum(-1).abs() for drop in counted]
        torch.testing.assert_close(found.of()[layer].movedim(-1, 0), torch.stack(sizes).mean(0))


def test_sizes_are_compared_with_sizes(exact):
    plain = attribution_patch(exact, CLEAN, CORRUPTED, METRIC, "q", qk_fix=True).compared_with_exact(20)
    both = attribution_patch(exact, CLEAN, CORRUPTED, METRIC, "q", qk_fix=True, grad_drop=True).compared_with_exact(20)
    assert (plain.of() < 0).any()
    assert (both.of() >= 0).all()
    assert (plain.agreement.exact < 0).any()
    assert (both.agreement.exact >= plain.agreement.exact.abs() - 1e-9).all()
    assert both.title.startswith("attribution patching with QK fix and GradDrop: approximate size of the change of ")


# --- runs and metrics ------------------------------------------------------------------------------------------------


def test_noising_is_denoising_with_the_inputs_exchanged(exact):
    one = attribution_patch(exact, CLEAN, CORRUPTED, METRIC, "z", direction="noising")
    other = attribution_patch(exact, CORRUPTED, CLEAN, METRIC, "z")
    assert torch.equal(one.of(), other.of())
    torch.testing.assert_close(one.before, METRIC(exact(CLEAN)).detach())
    torch.testing.assert_close(one.after, METRIC(exact(CORRUPTED)).detach())


def test_a_metric_may_be_any_function(exact):
    declared = attribution_patch(exact, CLEAN, CORRUPTED, METRIC, "mlp_out")
    by_row = attribution_patch(exact, CLEAN, CORRUPTED, lambda logits: METRIC(logits), "mlp_out")
    in_all = attribution_patch(exact, CLEAN, CORRUPTED, lambda logits: METRIC(logits).mean(), "mlp_out")
    torch.testing.assert_close(by_row.of(), declared.of())
    assert in_all.of().shape[-1] == 1
    torch.testing.assert_close(in_all.mean(), declared.mean())
    torch.testing.assert_close(in_all.before, declared.before.mean()[None])


@pytest.mark.parametrize("metric", [NextTokenLoss(), KLDivergence("clean"), KLDivergence("clean", position=None)])
def test_metrics_that_need_tokens_or_another_run(exact, metric):
    found = attribution_patch(exact, CLEAN, CORRUPTED, metric, "resid_pre", layers=[2])
    name = "blocks.2.hook_resid_pre"
    change = exact.run_with_cache(CLEAN, name)[1][name] - exact.run_with_cache(CORRUPTED, name)[1][name]

    def measure(factor):
        cells = grid("resid_post", Patch("moved"), layer=[1])
        moved = exact.run_with_cache(CORRUPTED, name)[1][name] + factor * change
        sources = {"moved": {"blocks.1.hook_resid_post": moved}, "clean": CLEAN}
        return Sweep(exact, CORRUPTED, cells, metric, sources=sources).run(progress=False).of()[0]

    close(found.of()[0].T, (measure(1e-3) - measure(-1e-3)) / 2e-3)


@pytest.mark.parametrize("unit", ["z", "q", "resid_mid", "pattern"])
def test_runs_in_one_batch_are_those_in_two(bridge, unit):
    """Two rows of twelve tokens are two batches; each row alone is one."""
    clean, corrupted = (torch.cat([ids(seed), ids(seed + 2)], 1) for seed in (3, 4))
    if f"blocks.0.hook_{unit}" not in bridge.hook_dict and f"blocks.0.attn.hook_{unit}" not in bridge.hook_dict:
        return
    both = attribution_patch(bridge, clean, corrupted, METRIC, unit)
    for row in range(2):
        metric = LogitDifference(METRIC.correct[row], METRIC.incorrect[row])
        alone = attribution_patch(bridge, clean[row : row + 1], corrupted[row : row + 1], metric, unit)
        size = float(alone.mean().abs().max())
        torch.testing.assert_close(both.of()[..., row], alone.of()[..., 0], rtol=1e-4, atol=1e-4 * size)
        torch.testing.assert_close(both.before[row], alone.before[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(both.after[row], alone.after[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_metric_that_raises_leaves_the_model_as_it_was(exact, error):
    def metric(logits):
        raise error

    before = [(parameter.requires_grad, parameter.grad) for parameter in exact.hf_model.parameters()]
    with pytest.raises(error):
        attribution_patch(exact, CLEAN, CORRUPTED, metric)
    assert torch.is_grad_enabled()
    assert before == [(parameter.requires_grad, parameter.grad) for parameter in exact.hf_model.parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in exact.hf_model.modules())


KINDS = [
    *(("z", {}), ("k", {"qk_fix": True}), ("q", {"qk_fix": True}), ("z", {"grad_drop": True}), ("pattern", {})),
    ("z", {"by_position": False}),
]


@pytest.mark.parametrize(
    ("variant", "padding"), [("llama", "left"), ("llama", "holes"), ("gemma2", "right"), ("gemma2", "mixed")]
)
def test_padded_rows_are_each_alone(variant, padding):
    """Positions count among real tokens: a shorter row is NaN past its end."""
    bridge, metric = clearspan.boot(build(variant)), LogitDifference(3, 5)
    pair = pair_of(padding)
    rows = [batch.ids[1:, list(batch.real_columns[1])] for batch in laid_alike(bridge, pair)]
    for unit, options in KINDS:
        both, alone = (attribution_patch(bridge, *given, metric, unit, **options) for given in (pair, rows))
        axes = {axis: range(4) for axis in both.axes if axis.endswith("position")}
        assert [both.axes[axis] for axis in axes] == [tuple(range(6))] * len(axes)
        own, scale = both.select(**axes).of()[..., 1], float(alone.mean().abs().max())
        torch.testing.assert_close(own, alone.of()[..., 0], rtol=1e-3, atol=1e-4 * scale)
        for axis in axes:
            assert both.select(**{axis: [4, 5]}).of()[..., 1].isnan().all()
    exact = attribution_patch(bridge, *pair, metric, "z").compared_with_exact(None).agreement
    one = attribution_patch(bridge, *pair, lambda logits: logits[0].mean(), "z").compared_with_exact(None).agreement
    assert exact.exact.isfinite().all()
    assert (len(exact.labels), len(one.labels)) == (72, 48)  # units that all rows have


def test_it_leaves_the_model_as_it_was(exact):
    attribution_patch(exact, CLEAN, CORRUPTED, METRIC, "q", qk_fix=True, grad_drop=True)
    assert all(parameter.grad is None for parameter in exact.hf_model.parameters())
    assert not exact.taps.is_listening


def test_it_works_on_frozen_parameters(exact):
    expected = attribution_patch(exact, CLEAN, CORRUPTED, METRIC, "z", grad_drop=True)
    frozen = clearspan.boot(build("llama").double().requires_grad_(False))
    found = attribution_patch(frozen, CLEAN, CORRUPTED, METRIC, "z", grad_drop=True)
    torch.testing.assert_close(found.of(), expected.of())


# --- comparison ------------------------------------------------------------------------------------------------------


def test_comparison_is_with_the_sweep_of_its_grid(exact):
    found = attribution_patch(exact, CLEAN, CORRUPTED, METRIC, "k")
    sweep = Sweep(exact, CORRUPTED, found.grid, METRIC, sources={"clean": CLEAN}).run(progress=False)
    assert dict(sweep.axes) == dict(found.axes)
    every, same = found.compared_with(sweep).agreement, found.compared_with_exact(None).agreement
    torch.testing.assert_close(every.exact, sweep.change().mean(-1).flatten())
    torch.testing.assert_close(every.exact, same.exact)
    torch.testing.assert_close(every.approximate, found.mean().flatten())
    some = found.compared_with_exact(5, seed=1).agreement
    numbers = [same.labels.index(label) for label in some.labels]
    torch.testing.assert_close(some.exact, same.exact[numbers])
    torch.testing.assert_close(some.approximate, same.approximate[numbers])
    other = Sweep(exact, CORRUPTED, grid("z", Patch(), layer=[0]), METRIC, sources={"clean": CLEAN})
    with pytest.raises(InvalidArgumentError, match="the sweep is of other cells"):
        found.compared_with(other.run(progress=False))
    for some in (found.select(layer=1), found.top(3)):
        with pytest.raises(InvalidArgumentError, match="these are some of the effects"):
            some.compared_with_exact(2)


def test_correlations_are_those_of_the_textbook():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 50, generator=generator)
    other = (other + one).round(decimals=1)
    assert pearson(one, other) == pytest.approx(float(torch.corrcoef(torch.stack([one, other]))[0, 1]), abs=1e-6)
    below = (other[:, None] > other).sum(1) + 0.5 * ((other[:, None] == other).sum(1) - 1) + 1
    assert torch.equal(ranks(other).double(), below.double())
    assert torch.tensor(pearson(torch.zeros(3), torch.arange(3.0))).isnan()


def test_an_agreement_prints_and_plots():
    found = Agreement(torch.tensor([1.0, 2.0, 3.5]), torch.tensor([1.0, 2.5, 3.0]), ["a", "b", "c"], total=7)
    assert found.title == (
        "the approximation compared with exact patching of 3 of 7 cells: Pearson 0.923, Spearman 1.000, "
        "largest error 0.5 of effects up to 3, at b"
    )
    assert list(found.columns()) == ["cell", "approximate", "exact", "error"]
    figure = found.plot()
    assert list(figure.data[0].x) == [1.0, 2.5, 3.0]
    assert figure.data[0].mode == "markers"
    with pytest.raises(InvalidArgumentError, match="no correlation can be known"):
        attribution_patch(clearspan.boot(build("llama")), CLEAN, CORRUPTED, METRIC).compared_with_exact(1)


def test_it_prints_plots_and_exports(exact):
    found = attribution_patch(exact, CLEAN, CORRUPTED, METRIC, "z")
    base, source = float(found.before.mean()), float(found.after.mean())
    assert found.title == (
        "attribution patching: approximate change of logit difference with one layer, position, head of z taken from "
        f"the clean run; corrupted run {base:.4f}, clean run {source:.4f}; mean over 2 rows; "
        "not compared with exact patching"
    )
    assert list(found.to_dataframe().columns) == ["layer", "position", "head", "effect", "standard error"]
    assert list(found.plot(head=2).data[0].z[1]) == pytest.approx(found.mean()[1, :, 2].tolist(), abs=1e-4)
    assert list(found.plot(layer=0, head=1).data[0].y) == pytest.approx(found.mean()[0, :, 1].tolist())
    compared = found.compared_with_exact(12)
    assert compared.title.endswith(compared.agreement.summary)
    assert "with exact patching of 12 of 72 cells: Pearson " in str(compared)
    with pytest.raises(InvalidArgumentError) as error:
        found.plot()
    assert str(error.value) == (
        "a picture has one axis or two, and there are 3: layer, position, head\n  fix: plot(head=0)"
    )
    with pytest.raises(InvalidArgumentError, match="there is no head=9"):
        found.plot(head=9)
    assert found.top(1).title.startswith("attribution patching: approximate change of logit difference with one layer")


# --- what cannot be done ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"unit": "embed"}, "the point 'embed' is in no layer\n  fix: unit='resid_pre' for what enters one"),
        ({"unit": 3}, "unit=3 is no hook point's name\n  expected: such as 'z'"),
        ({"layers": [3]}, "layers=[3]\n  expected: layers from -3 to 2"),
        ({"layers": []}, "layers=[]\n  expected: a list, not empty"),
        ({"layers": 2.5}, "layers=2.5\n  expected: a list, not empty"),
        ({"layers": "all"}, "layers=['a', 'l', 'l']\n  expected: layers from -3 to 2"),
        ({"direction": "both"}, "unknown direction 'both'\n  expected: 'denoising' or 'noising'"),
        (
            {"qk_fix": True},
            "the QK fix is about queries and keys, and not 'z'\n  expected: q, rot_q, k, rot_k",
        ),
        (
            {"corrupted": CORRUPTED[:, :5]},
            "the two inputs do not lie position on position\n"
            "  expected: as many rows, and as many real tokens in each\n  got: [5, 5] and [6, 6] real tokens\n"
            "  argument: corrupted",
        ),
        (
            {"metric": KLDivergence("base")},
            "the gradient of kl divergence from the base run is zero at the base run\n  got: against='base'\n"
            "  reason: there it is least, so that a first-order approximation of every effect is zero\n"
            "  fix: against='clean', or edge_attribution(..., steps=5)",
        ),
        (
            {"metric": {"one": METRIC}},
            "the metric is a function of logits\n  expected: such as clearspan.sweep.LogitDifference(...), one and not "
            "several\n  got: {'one': LogitDifference(correct=(3, 4), incorrect=(5, 6), position=-1)}",
        ),
        (
            {"metric": lambda logits: logits[0, 0]},
            "the metric is not a number for each row\n  expected: a tensor [batch=2], or of no axes\n  got: [97]",
        ),
        (
            {"metric": lambda logits: logits[:, -1].argmax(-1)},
            "the function of what the run returns has no gradient\n"
            "  reason: its number does not depend on that by differentiable operations\n"
            "  fix: a smooth function, such as a logit, a log-probability or a loss, under torch.enable_grad()",
        ),
    ],
)
def test_what_cannot_be_attributed_is_said(exact, given, message):
    settings = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC, "unit": "z", **given}
    with pytest.raises(InvalidArgumentError) as error:
        attribution_patch(exact, **settings)
    assert str(error.value) == message


def test_one_layer_has_none_to_drop():
    bridge = clearspan.boot(build("gpt2", n_layer=1))
    with pytest.raises(InvalidArgumentError) as error:
        attribution_patch(bridge, CLEAN, CORRUPTED, METRIC, grad_drop=True)
    assert str(error.value) == (
        "with one layer there is none to drop but the unit's own\n  fix: grad_drop=False, or unit='resid_pre'"
    )


def test_training_mode_and_hooks_are_refused():
    bridge = clearspan.boot(build("gpt2"))
    with (
        bridge.hooks([("blocks.1.hook_resid_pre", lambda value, hook: None)]),
        pytest.raises(InvalidArgumentError) as error,
    ):
        attribution_patch(bridge, CLEAN, CORRUPTED, METRIC)
    assert str(error.value) == (
        "hooks are on the model, which would be called with the rows and positions of batches\n"
        "  where: blocks.1.hook_resid_pre\n"
        "  fix: bridge.reset_hooks(), or background=[...] for what is to be done in every cell"
    )
    bridge.hf_model.train()
    with pytest.raises(InvalidArgumentError, match="runs are compared on a model in evaluation mode"):
        attribution_patch(bridge, CLEAN, CORRUPTED, METRIC)
