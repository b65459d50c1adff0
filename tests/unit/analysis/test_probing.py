import pytest
import torch
from tests.conftest import tiny_model
from tests.zoo import build

import clearspan
from clearspan.analysis import Probes, train_probe
from clearspan.errors import InvalidArgumentError

VARIANTS = ["gpt_bigcode", "gemma2", "mixtral", "falcon", "opt post-norm"]
POINT = "blocks.0.hook_resid_pre"


def ids(*shape, seed=0, low=1, high=97):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def random_model():
    return clearspan.boot(tiny_model())


@pytest.fixture(scope="module")
def wide_model():
    return clearspan.boot(tiny_model(n_embd=200))


def trained(bridge, features, labels, **settings):
    """Probes of given features, which a hook writes into the residual stream; features that are missing are 0."""

    def write(value, hook):
        value[:, -1] = torch.nn.functional.pad(features, (0, value.shape[-1] - features.shape[1]))

    rows = len(features)
    settings = {"groups": range(rows), "controls": 0, "batch_size": rows, **settings}
    with bridge.hooks(fwd_hooks=[(POINT, write)]):
        return train_probe(bridge, ids(rows, 2), labels, name=POINT, **settings)


# --- logistic regression ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "width", "classes"), [(30, 80, 2), (90, 20, 3), (40, 40, 2), (25, 60, 5)])
@pytest.mark.parametrize("l2", [1e-3, 1.0, 100.0])
def test_the_gradient_is_zero_where_a_fit_ends(wide_model, count, width, classes, l2):
    """The loss is convex, so that this is its minimum. Written for features as they are, and by hand."""
    labels = torch.cat([torch.arange(classes), torch.arange(classes), ids(count - 2 * classes, low=0, high=classes)])
    features = normal(count, width) * torch.linspace(0.1, 50, width) + 7 + labels[:, None] * normal(width, seed=1)
    exact, spread = features.double(), features.double().std(0, correction=0)
    standard = (exact - exact.mean(0)) / spread
    probe = trained(wide_model, features, labels, l2=l2, folds=2).at(0)
    weight = probe.weight[:, :width]
    assert not probe.weight[:, width:].any()
    excess = (exact @ weight.T + probe.bias).softmax(-1) - torch.nn.functional.one_hot(labels, classes)
    gradient = excess.T @ standard + l2 * weight * spread
    assert gradient.abs().max() < 2e-6 * count
    assert excess.sum(0).abs().max() < 1e-6 * count


def test_a_fit_of_one_feature_is_that_of_a_fine_grid(random_model):
    features, labels = normal(20, 1), torch.arange(20) % 2
    features = (features - features.mean()) / features.std(correction=0)
    found = trained(random_model, features, labels, l2=0.5, folds=2).at(0)
    slopes, biases = torch.meshgrid(torch.linspace(-2, 2, 801), torch.linspace(-2, 2, 801), indexing="ij")
    slopes, biases = slopes.reshape(-1).double(), biases.reshape(-1).double()
    logits = (features.double() * slopes + biases) * (2 * labels[:, None] - 1)
    # Weights of the two classes are opposite, so their penalty is l2 / 2 * 2 * (slope / 2)².
    loss = -torch.nn.functional.logsigmoid(logits).sum(0) + 0.5 / 2 * slopes**2 / 2
    best = loss.argmin()
    assert (found.weight[1] - found.weight[0])[0].item() == pytest.approx(slopes[best].item(), abs=0.005)
    assert (found.bias[1] - found.bias[0]).item() == pytest.approx(biases[best].item(), abs=0.005)
    torch.testing.assert_close(found.weight[0], -found.weight[1])


def test_features_that_do_not_vary_have_no_weight(random_model):
    features = torch.cat([normal(30, 4), torch.full((30, 2), 1234.567)], dim=1)
    features[:, 5] *= 1 + 1e-7 * normal(30, seed=3)
    labels = (features[:, 0] > 0).long()
    found, without = (trained(random_model, some, labels, folds=2).at(0) for some in (features, features[:, :4]))
    assert found.weight[:, 4:].abs().max() == 0
    torch.testing.assert_close(found.weight, without.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.bias, without.bias, rtol=1e-4, atol=1e-5)
    nothing = trained(random_model, torch.ones(8, 3), [0, 0, 0, 0, 0, 0, 1, 1], folds=2).at(0)
    assert nothing.weight.abs().max() == 0
    torch.testing.assert_close(nothing.bias.softmax(-1), torch.tensor([0.75, 0.25]).double(), rtol=1e-5, atol=1e-6)


def test_a_fit_that_does_not_end_raises(monkeypatch, random_model):
    monkeypatch.setattr("clearspan.analysis.logistic._MOST_STEPS", 2)
    with pytest.raises(InvalidArgumentError) as raised:
        trained(random_model, torch.tensor([[-1.0], [1.0]] * 4), [0, 1] * 4, folds=2, l2=1e-3)
    what, expected, got, fix = str(raised.value).splitlines()
    assert what == "a logistic regression was not fitted to the end"
    assert expected == "  expected: a gradient below 1e-07"
    assert (got[:7], fix) == ("  got: ", "  fix: a larger l2")


# --- folds and leakage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_folds_keep_groups_together_and_classes_in_their_shares(random_model, seed):
    labels = torch.cat([torch.zeros(60), torch.ones(30), torch.full((10,), 2)]).long()

    def folds(groups, seed):
        return trained(random_model, normal(100, 3), labels, groups=groups, seed=seed).folds

    single = folds(range(100), seed)
    counts = torch.stack([labels[single == fold].bincount(minlength=3) for fold in range(5)])
    assert counts.tolist() == [[12, 6, 2]] * 5
    groups = ids(100, seed=seed, low=0, high=30)
    grouped = folds(groups, seed)
    for group in groups.unique():
        assert len(grouped[groups == group].unique()) == 1
    assert grouped.bincount(minlength=5).min() >= 12
    assert torch.equal(grouped, folds(groups, seed))
    assert not torch.equal(single, folds(range(100), seed + 1))


def test_what_is_held_out_is_not_seen(wide_model):
    """A probe that was trained without a fold, means and spreads of features included, gives its predictions."""
    features, labels = normal(40, 60) + 0.2, torch.arange(40) % 2
    found = trained(wide_model, features, labels, folds=4)
    for fold in range(4):
        held_out = found.folds == fold
        probe = trained(wide_model, features[~held_out], labels[~held_out], folds=2).at(0)
        padded = torch.nn.functional.pad(features[held_out], (0, 140))
        assert torch.equal(probe.predict(padded), found.predicted[0, held_out])


def test_random_labels_are_read_as_well_as_by_chance(wide_model):
    """Mean over 40 draws of 60 examples in 200 dimensions: 0.5, with a standard error of 0.01."""
    found = trained(wide_model, normal(60, 200), torch.arange(60) % 2, controls=40)
    # Where fewer of a class are held out, more of it are trained on: a little below one half.
    assert 0.42 < found.control_accuracy.mean() < 0.53


def test_rows_of_the_same_tokens_are_one_group(random_model):
    """Each row four times, with random labels: known by heart where its copies are in other folds."""
    tokens = ids(20, 5).repeat(4, 1)
    labels = (ids(20, seed=3) % 2).repeat(4)
    found = train_probe(random_model, tokens, labels, layers=1, folds=4, controls=1)
    leaking = train_probe(random_model, tokens, labels, layers=1, folds=4, groups=range(80), controls=0)
    assert found.groups.tolist() == list(range(20)) * 4
    assert leaking.accuracy.item() > 0.95
    assert found.accuracy.item() < 0.75
    assert found.control_accuracy.max() < 0.8


# --- probes on models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=VARIANTS)
def random_bridge(request):
    return clearspan.boot(build(request.param))


@torch.no_grad()
def test_a_planted_token_is_read_and_the_probe_reads_a_cache(random_bridge):
    bridge, labels = random_bridge, torch.arange(40) % 2
    tokens = ids(40, 6, low=10)
    tokens[:, -2] = torch.where(labels == 1, 5, 7)
    found = train_probe(bridge, tokens, labels, layers=[0, 1], positions=-2, batch_size=16, controls=8)
    assert found.points == ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    assert (found.accuracy >= 0.9).all()
    # Of 40 shuffled labels, mean over 8 draws.
    assert (found.control_accuracy.mean(0) - 0.5).abs().max() < 0.2
    for layer in (0, 1):
        probe = found.at(layer)
        values = bridge.run_with_cache(tokens, names_filter=probe.name)[1][probe.name]
        assert (probe.predict(values[:, -2]) == labels).double().mean() > 0.95
        assert probe.predict(values).shape == (40, 6)
        expected = values.double() @ probe.weight.T + probe.bias
        torch.testing.assert_close(probe.logits(values), expected)
        means = torch.stack([values[labels == i, -2].double().mean(0) for i in (0, 1)])
        torch.testing.assert_close(probe.means, means, rtol=1e-3, atol=1e-3)
    elsewhere = train_probe(bridge, tokens, labels, layers=0, positions=1, controls=0)
    assert elsewhere.accuracy.item() < 0.75


@torch.no_grad()
def test_padded_rows_are_read_as_alone(random_model):
    tokens, labels = ids(24, 7, low=10), torch.arange(24) % 2
    mask = torch.ones_like(tokens)
    mask[::3, 5:] = mask[1::3, :2] = 0
    rows = [row[real] for row, real in zip(tokens, mask.bool(), strict=True)]
    name = "blocks.1.hook_resid_mid"
    alone = torch.cat([random_model.run_with_cache(row[None], names_filter=name)[1][name][0] for row in rows])
    found = train_probe(
        random_model, tokens, labels, name="resid_mid", layers=1, positions=None, attention_mask=mask, controls=0
    )
    assert found.places == tuple((row, position) for row in range(24) for position in range(len(rows[row])))
    assert found.labels.tolist() == [row % 2 for row, _ in found.places]
    expected = trained(random_model, alone, found.labels, groups=found.groups, batch_size=len(alone))
    assert torch.equal(expected.folds, found.folds)
    assert (found.predicted[0] == expected.predicted[0]).double().mean() > 0.98
    assert len({(int(group), int(fold)) for group, fold in zip(found.groups, found.folds, strict=True)}) == 24


def test_labels_of_positions_lie_as_tokens_do(random_model):
    tokens = ids(15, 6, low=10)
    labels = (tokens % 3).clone()
    mask = torch.ones_like(tokens)
    mask[::2, :2] = 0
    labels[mask == 0] = 9
    found = train_probe(
        random_model, tokens, labels, name="hook_embed", positions=slice(1, None), attention_mask=mask, controls=4,
        control="by_token",
    )  # fmt: skip
    assert found.classes == (0, 1, 2)
    expected = [
        int(tokens[row][mask[row].bool()][position]) % 3
        for row in range(15)
        for position in range(1, int(mask[row].sum()))
    ]
    assert found.labels.tolist() == expected
    assert found.points == ("hook_embed",)


def test_labels_by_token_are_known_by_who_knows_tokens(random_model):
    """Ten tokens, each with a random label: read from embeddings, and unlike labels in a random order."""
    tokens = ids(60, 4, low=10, high=20)
    settings = {"name": "hook_embed", "positions": 2, "controls": 3}
    by_token = train_probe(random_model, tokens, ids(60, seed=4) % 2, control="by_token", **settings)
    shuffled = train_probe(random_model, tokens, ids(60, seed=4) % 2, control="shuffled", **settings)
    assert by_token.control_accuracy.min() > 0.95
    assert shuffled.control_accuracy.mean() < 0.7
    assert list(by_token.columns())[-1] == "control (by token)"


def test_groups_given_stay_together(random_model):
    groups = [f"source {i // 3}" for i in range(12)]
    found = train_probe(
        random_model, ids(12, 4), ["a", "a", "a", "b", "b", "b"] * 2, folds=2, groups=groups, controls=0
    )
    assert found.groups.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for group in range(4):
        assert len(found.folds[found.groups == group].unique()) == 1


def test_shuffled_labels_go_between_groups_where_each_has_one_label(random_model):
    """Nothing can be read here, so each held-out example is taken for the commoner class of the others.

    Where the three examples of each group keep one label, right ones come in threes.
    """
    settings = {"groups": torch.arange(12) // 3, "folds": 2, "controls": 20}
    right = {
        is_of_group: 12 * trained(random_model, torch.ones(12, 1), labels, **settings).control_accuracy[:, 0]
        for is_of_group, labels in {True: [0, 0, 0, 1, 1, 1] * 2, False: [0, 1, 0, 1, 1, 1] * 2}.items()
    }
    assert all(round(count) % 3 == 0 for count in right[True].tolist())
    assert any(round(count) % 3 != 0 for count in right[False].tolist())
    assert len(right[True].round().unique()) > 1


def test_several_classes_texts_and_a_point_of_several_axes(embedded):
    words = ["area", "name", "size", "path", "data", "key"]
    texts = [f"{start}{word}" for start in ("def ", "import ", "self.") for word in words]
    labels = [kind for kind in ("function", "module", "attribute") for _ in words]
    found = train_probe(embedded, texts, labels, name="z", layers=[1, -1], folds=3, groups=words * 3, controls=1)
    assert found.classes == ("attribute", "function", "module")
    assert found.points == ("blocks.1.attn.hook_z", "blocks.4.attn.hook_z")
    assert found.at(1).weight.shape == (3, 8, 32)
    assert found.accuracy.min() > 0.9
    assert found.majority == pytest.approx(1 / 3)
    vector = found.at(4).steering_vector("module")
    assert vector.vectors["blocks.4.attn.hook_z"].shape == (8, 32)
    vector.check_fits(embedded)


@torch.no_grad()
def test_its_direction_steers_what_it_reads(random_model):
    labels = torch.arange(40) % 2
    tokens = ids(40, 5, low=10)
    tokens[:, -1] = torch.where(labels == 1, 5, 7)
    probe = train_probe(random_model, tokens, labels, layers=1, controls=0).at(1)
    vector = probe.steering_vector(1)
    steered = random_model.run_with_cache(tokens, probe.name, interventions=vector.interventions(2.0))[1][probe.name]
    values = random_model.run_with_cache(tokens, names_filter=probe.name)[1][probe.name]
    rise = (probe.logits(steered) - probe.logits(values)) @ torch.tensor([-1.0, 1.0]).double()
    unit = probe.direction(1)
    assert unit.norm().item() == pytest.approx(1)
    along = ((probe.means[1] - probe.means[0]) @ unit).item()
    assert along > 0
    expected = 2 * along * (probe.weight[1] - probe.weight[0]).norm()
    torch.testing.assert_close(rise, expected.expand(40, 5), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(probe.direction(0), -unit)
    torch.testing.assert_close(probe.direction(1, 0), unit)
    assert vector.norms[probe.name] == pytest.approx(along, rel=1e-5)
    assert vector.made_by == "linear probe for 1 against the others"
    assert vector.activation_norms[probe.name] == pytest.approx(values[:, -1].norm(dim=-1).mean().item(), rel=1e-5)


def test_activations_are_gathered_once_and_seeds_are_its_own(embedded):
    ran, texts = [], [f"x = {i}" for i in range(10)]
    handle = embedded.hf_model.transformer.h[0].register_forward_hook(lambda *_: ran.append(0))
    state, steps = torch.get_rng_state(), []
    settings = {"folds": 2, "batch_size": 5, "controls": 2}
    first = train_probe(embedded, texts, [0, 1] * 5, progress=lambda *step: steps.append(step), **settings)
    handle.remove()
    assert len(ran) == 2
    assert steps == [*(("activations", i, 2) for i in (1, 2)), *(("probes", i, 5) for i in range(1, 6))]
    assert torch.equal(torch.get_rng_state(), state)
    again, other = (train_probe(embedded, texts, [0, 1] * 5, seed=seed, **settings) for seed in (0, 1))
    assert torch.equal(first.predicted, again.predicted)
    assert torch.equal(first.control_accuracy, again.control_accuracy)
    assert not torch.equal(first.folds, other.folds)


def test_it_trains_under_inference_mode_and_in_half_precision():
    bridge = clearspan.boot(tiny_model().bfloat16())
    tokens, labels = ids(20, 4), torch.arange(20) % 2
    tokens[:, -1] = torch.where(labels == 1, 5, 7)
    with torch.inference_mode():
        found = train_probe(bridge, tokens, labels, layers=0, controls=1)
    assert found.accuracy.item() > 0.8
    probe = found.at(0)
    assert probe.predict(torch.zeros(48, dtype=torch.bfloat16)).ndim == 0


# --- results ---------------------------------------------------------------------------------------------------------


def result(right, total, groups=None, controls=1):
    labels = torch.zeros(total, dtype=torch.long)
    labels[: total // 2] = 1
    predicted = labels.clone()
    predicted[right:] = 1 - labels[right:]
    probe = type("P", (), {"name": "blocks.3.hook_resid_post"})()
    groups = torch.arange(total) if groups is None else groups
    return Probes(
        probes=(probe,),
        classes=("a", "b"),
        labels=labels,
        groups=groups,
        folds=torch.arange(total) % 2,
        places=tuple((i, 0) for i in range(total)),
        predicted=predicted[None],
        control_accuracy=torch.full((controls, 1), 0.5).double(),
        control="shuffled",
    )


def test_intervals_are_wilsons_by_group():
    """Values of Brown, Cai and DasGupta (2001) and of the closed form for all right, n / (n + z²)."""
    every = result(10, 10).interval()
    assert every.low.item() == pytest.approx(10 / (10 + 1.959964**2), abs=1e-6)
    assert every.high.item() == 1
    half = result(5, 10).interval()
    assert (half.low.item(), half.high.item()) == pytest.approx((0.236593, 0.763407), abs=1e-5)
    assert half.low + half.high == pytest.approx(1)
    grouped = result(20, 20, groups=torch.arange(20) // 2).interval()
    assert grouped.low.item() == pytest.approx(every.low.item())
    assert result(10, 10).interval(level=0.5).low > every.low
    with pytest.raises(InvalidArgumentError, match="level=95 is no share"):
        result(5, 10).interval(level=95)


def test_it_prints_and_plots(embedded):
    texts = [f"x = {i}" for i in range(8)]
    found = train_probe(embedded, texts, ["a", "b"] * 4, layers=[1, 2], folds=2, controls=2)
    assert found.title == (
        "held-out accuracy of linear probes for 2 classes; 8 examples in 8 groups, 2 folds; majority 0.5000"
    )
    frame = found.to_dataframe()
    assert list(frame) == ["point", "accuracy", "low", "high", "control (shuffled)"]
    assert frame["accuracy"].tolist() == found.accuracy.tolist()
    assert frame["control (shuffled)"].tolist() == found.control_accuracy.mean(0).tolist()
    assert [line.name for line in found.plot().data] == ["probe", "control (shuffled)", "majority"]
    assert list(found.plot().data[0].x) == ["1", "2"]
    assert list(found.plot().data[0].y) == found.accuracy.tolist()
    bare = train_probe(embedded, texts, ["a", "b"] * 4, name="hook_embed", folds=2, controls=0)
    assert bare.control_accuracy.shape == (0, 1)
    assert list(bare.columns()) == ["point", "accuracy", "low", "high"]
    assert list(bare.plot().data[0].x) == ["hook_embed"]


TOKENS = torch.arange(1, 13).view(6, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": [0, 1]}, "labels are one for each row\n  expected: 6 labels\n  got: 2"),
        (
            {"labels": torch.zeros(6, 3)},
            "labels of positions lie as the token ids do\n"
            "  expected: rows of [2, 2, 2, 2, 2, 2] labels, padding included\n  got: rows of [3, 3, 3, 3, 3, 3]",
        ),
        ({"labels": ["a"] * 6}, "a probe tells classes apart\n  expected: two classes or more\n  got: 'a'"),
        ({"groups": [1, 2]}, "groups are one for each row\n  expected: 6 groups\n  got: 2"),
        ({"folds": 1}, "folds=1 cannot be made\n  expected: 2 to 6, the number of groups\n  got: 1"),
        ({"folds": 7}, "folds=7 cannot be made\n  expected: 2 to 6, the number of groups\n  got: 7"),
        (
            {"labels": [0, 0, 0, 0, 0, 1], "folds": 2},
            "class 1 is in one fold alone\n  expected: groups of each class in two folds or more\n"
            "  reason: when that fold is held out, no example of the class is left to train on\n"
            "  fix: more groups of that class",
        ),
        ({"control": "none"}, "unknown control 'none'\n  expected: 'shuffled' or 'by_token'"),
        ({"l2": 0}, "l2=0\n  expected: l2 > 0"),
        ({"positions": 2}, "row 0 has no position 2\n  expected: -2 to 1\n  got: 2 real tokens"),
    ],
)
def test_what_cannot_be_trained_raises(random_model, given, message):
    with pytest.raises(InvalidArgumentError) as raised:
        train_probe(random_model, TOKENS, **{"labels": [0, 1] * 3, "folds": 3, **given})
    assert str(raised.value) == message


def test_what_a_probe_does_not_have_raises(random_model):
    found = train_probe(random_model, TOKENS, [0, 1] * 3, layers=[0, 1], folds=3, controls=0)
    with pytest.raises(InvalidArgumentError) as raised:
        found.at(2)
    assert str(raised.value).splitlines() == [
        "there is not one probe at 2",
        "  expected: one of blocks.0.hook_resid_post, blocks.1.hook_resid_post",
        "  got: 0",
    ]
    probe = found.at(0)
    for wrong in (torch.zeros(4, 47), torch.zeros(())):
        with pytest.raises(InvalidArgumentError) as raised:
            probe.predict(wrong)
        assert str(raised.value).splitlines() == [
            "the probe at blocks.0.hook_resid_post cannot read these values",
            "  expected: [..., 48]",
            f"  got: {list(wrong.shape)}",
        ]
    with pytest.raises(InvalidArgumentError, match="the probe knows no class 'x'\n  expected: \\(0, 1\\)"):
        probe.direction("x")
    with pytest.raises(InvalidArgumentError, match="and not from 1 itself"):
        probe.steering_vector(1, 1)
