import pytest
import torch
from tests.conftest import tiny_model

import clearspan
from clearspan.analysis import train_probe, train_sparse_probe
from clearspan.analysis.sparse_probing import Fit
from clearspan.errors import InvalidArgumentError, NotFiniteError

POINT = "blocks.1.mlp.hook_post"


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(count, length=4, seed=0):
    return torch.randint(1, 97, (count, length), generator=torch.Generator().manual_seed(seed))


def planted(values, told_by, noise=0.0, seed=0):
    """Features in place of neurons of which some tell the class of each example, which is whether its number is odd."""
    found = drawn(len(values), 30, seed=seed)
    is_odd = torch.arange(len(values)) % 2 == 1
    for feature in told_by:
        found[:, feature] = torch.where(is_odd, 3.0, -3.0) + noise * drawn(len(values), seed=feature)
    return found


def odd(count):
    return [number % 2 for number in range(count)]


def sparse(bridge, input, labels, **options):
    chosen = {"layers": 1, "folds": 4, "controls": 3, "progress": False}
    return train_sparse_probe(bridge, input, labels, **{**chosen, **options})


@pytest.fixture(scope="module")
def model():
    return clearspan.boot(tiny_model())


def test_a_class_that_one_feature_tells_is_told_by_it(model):
    found = sparse(model, rows(40), odd(40), ks=[1, 3], features=lambda values: planted(values, [17]))
    assert found.neurons(1, k=1) == (17,)
    assert len(found.neurons(1)) == 3
    assert found.mean().tolist() == [[1.0, 1.0]]
    assert found.majority == 0.5
    assert found.mean("random neurons")[0, 0] < 0.8
    assert (found.mean("shuffled labels") < 0.8).all()
    probe = found.at(1, k=1)
    assert probe.weight[1].nonzero()[:, 0].tolist() == [17]
    values = torch.zeros(2, 30)
    values[0, 17], values[1, 17] = -3, 3
    assert probe.predict(values).tolist() == [0, 1]


def test_a_class_that_several_features_tell_takes_several(model):
    def spread(values):
        found = planted(values, [])
        found[:, 4] = torch.where(torch.arange(len(values)) % 2 == 1, 0.6, -0.6) - found[:, 5]
        return found

    found = sparse(model, rows(80), odd(80), ks=[1, 30], features=spread, controls=0)
    assert found.mean()[0, 1] > found.mean()[0, 0] + 0.1
    assert list(found.values) == ["accuracy"]


def test_chosen_without_the_held_out_examples_noise_is_chance(model):
    """Of 2,000 features of noise some tell 24 examples by chance: chosen on all of them, they would be right."""
    noise = drawn(24, 2000, seed=5)
    labels = odd(24)
    fair = [
        sparse(model, rows(24), labels, ks=4, features=lambda values: noise, controls=0, seed=seed).mean().item()
        for seed in range(6)
    ]
    assert 0.3 < sum(fair) / 6 < 0.7
    order = Fit([4], "mean_difference", 2, 1.0).order(noise, torch.tensor(labels))
    peeked = noise[:, order[:4]]
    found = sparse(model, rows(24), labels, ks=4, features=lambda values: peeked, controls=0)
    assert found.mean().item() > 0.85


def test_with_all_neurons_it_is_the_dense_probe(model):
    tokens, labels = rows(20), ["b", "a"] * 10
    dense = train_probe(model, tokens, labels, layers=1, name="post", folds=4, controls=2, progress=False)
    width = model.cfg.d_mlp
    found = sparse(model, tokens, labels, ks=[width], controls=2)
    assert torch.equal(found.of()[0, 0].bool(), dense.predicted[0] == dense.labels)
    torch.testing.assert_close(found.of("shuffled labels")[0, 0], dense.control_accuracy[:, 0])
    torch.testing.assert_close(found.at(1, k=width).weight, dense.at(1).weight, rtol=1e-3, atol=1e-4)
    assert found.at(POINT, k=width).classes == ("a", "b")
    assert torch.equal(found.folds, dense.folds)
    assert sorted(found.neurons(1)) == list(range(width))


def test_groups_are_held_out_whole(model):
    """A feature that tells each group, and not the class, is of no use for a group that was not seen."""
    groups = [number // 4 for number in range(40)]
    labels = [number // 4 % 2 for number in range(40)]
    by_group = torch.nn.functional.one_hot(torch.tensor(groups)).float() * 5
    fair = sparse(model, rows(40), labels, ks=10, groups=groups, features=lambda values: by_group, controls=0)
    leaky = sparse(model, rows(40), labels, ks=10, features=lambda values: by_group, controls=0)
    assert leaky.mean().item() == 1.0
    assert fair.mean().item() < 0.7
    assert all(len(fair.folds[torch.tensor(groups) == one].unique()) == 1 for one in range(10))


def test_how_neurons_are_ranked():
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    values = torch.tensor([[-9.0, -1.0, 0], [9, -1.1, 0], [0, -0.9, 0], [-7, 1, 0], [11, 1.1, 0], [5, 0.9, 0]])
    by_difference, by_separation = (
        Fit([1], choice, 2, 1.0).order(values, labels).tolist() for choice in ("mean_difference", "separation")
    )
    assert by_difference == [0, 1, 2]
    assert by_separation == [1, 0, 2]


def test_three_classes_and_values_of_several_axes(model):
    tokens = rows(24)
    labels = [number % 3 for number in range(24)]
    found = sparse(model, tokens, labels, name="z", ks=[1, 5], controls=1, layers=None, folds=3)
    assert found.axes["point"] == tuple(f"blocks.{layer}.attn.hook_z" for layer in range(3))
    assert all(len(one) == 2 and one[0] < model.cfg.n_heads and one[1] < model.cfg.d_head for one in found.neurons(2))
    probe = found.at(2, k=5)
    assert probe.weight.shape == (3, model.cfg.n_heads, model.cfg.d_head)
    chosen = {tuple(one) for one in probe.weight.abs().sum(0).nonzero().tolist()}
    assert chosen == set(found.neurons(2))


def test_it_is_the_seeds_and_leaves_torchs_own_alone(model):
    state = torch.get_rng_state()
    one, again, other = (sparse(model, rows(20), odd(20), ks=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.folds, again.folds)
    assert torch.equal(one.of("random neurons"), again.of("random neurons"))
    assert not torch.equal(one.folds, other.folds)


def test_it_prints_selects_and_plots(model):
    found = sparse(model, rows(20), odd(20), ks=[4, 1, 1], layers=[0, 2])
    assert found.axes == {"point": ("blocks.0.mlp.hook_post", "blocks.2.mlp.hook_post"), "k": (1, 4)}
    assert found.title == (
        "accuracy and shuffled labels and random neurons of sparse probes for 2 classes, held out; 20 examples in 20 "
        "groups, 4 folds; majority 0.5000; mean over 20 examples"
    )
    assert found.select(k=4).at(2, k=4).name == "blocks.2.mlp.hook_post"
    assert len(found.plot().data) == 2
    assert {"point", "k", "accuracy", "shuffled labels", "random neurons", "standard error"} == set(found.columns())


def test_what_cannot_be_trained_is_named(model):
    tokens, labels = rows(8), odd(8)
    with pytest.raises(InvalidArgumentError) as error:
        sparse(model, tokens, labels, ks=[1, 10**6])
    width = model.cfg.d_mlp
    assert str(error.value) == f"k=1000000 neurons cannot be chosen\n  expected: 1 to {width}\n  where: {POINT}"
    with pytest.raises(InvalidArgumentError, match="are no numbers of neurons"):
        sparse(model, tokens, labels, ks=[0, 2])
    with pytest.raises(InvalidArgumentError, match="are not one row for each example"):
        sparse(model, tokens, labels, features=lambda values: values[0])
    with pytest.raises(NotFiniteError, match=r"the features at .* are not finite"):
        sparse(model, tokens, labels, ks=1, features=lambda values: values / 0)
    found = sparse(model, tokens, labels, ks=2, controls=0)
    with pytest.raises(InvalidArgumentError, match=r"there is no probe of k=1 neurons\n  expected: one of \[2\]"):
        found.at(1, k=1)
    with pytest.raises(InvalidArgumentError, match="k=3 neurons were not chosen\n  expected: 1 to 2"):
        found.neurons(1, k=3)
    with pytest.raises(InvalidArgumentError, match="there is not one probe at 0"):
        found.at(0, k=2)
