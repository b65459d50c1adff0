import itertools
import math

import pytest
import torch

from clearspan import statistics
from clearspan.errors import InvalidArgumentError
from clearspan.statistics import bootstrap_interval, permutation_p_value, share_interval, standard_error


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_standard_error_is_the_spread_of_means():
    """Means of many samples of 25 from a distribution of spread 1 are spread by 1/5, and each sample says so itself."""
    samples = normal(25, 4000)
    errors = standard_error(samples)
    assert errors.square().mean() == pytest.approx(0.04, rel=0.02)
    assert samples.mean(0).std() == pytest.approx(0.2, rel=0.03)
    assert standard_error(samples.reshape(25, 40, 100)).shape == (40, 100)


def test_bootstrap_intervals_hold_the_true_mean_as_often_as_they_say():
    """On 1,000 samples of 50 at level 0.9: 0.9 give or take 0.0095, and a little less, as percentile intervals do."""
    found = bootstrap_interval(normal(50, 1000) + 3, level=0.9)
    held = ((found.low <= 3) & (found.high >= 3)).double().mean()
    assert 0.86 < held < 0.92
    assert ((found.low < found.mean) & (found.mean < found.high)).all()


def test_bootstrap_is_that_of_rows_drawn_one_by_one():
    values = normal(7, 3)
    found = bootstrap_interval(values, level=0.8, samples=50, seed=4)
    drawn = torch.randint(7, (50, 7), generator=torch.Generator().manual_seed(4))
    means = torch.stack([torch.stack([values[i] for i in row.tolist()]).mean(0) for row in drawn])
    torch.testing.assert_close(found.mean, values.mean(0))
    torch.testing.assert_close(found.low, means.quantile(0.1, dim=0))
    torch.testing.assert_close(found.high, means.quantile(0.9, dim=0))


def test_every_sign_flip_of_few_rows_is_counted():
    differences = torch.tensor([[1.0, -1.0], [2.0, 1.0], [-0.5, 0.0], [3.0, 2.0], [1.0, 1.0], [0.25, -3.0]])
    observed = differences.mean(0).abs()
    flips = [torch.tensor(signs)[:, None] * differences for signs in itertools.product((1.0, -1.0), repeat=6)]
    far = sum((flip.mean(0).abs() >= observed - 1e-9).double() for flip in flips)
    torch.testing.assert_close(permutation_p_value(differences), far / 64)


def test_random_flips_agree_with_all_of_them():
    differences = normal(13, 20) + 0.3
    exact = permutation_p_value(differences, samples=2**13)
    random = permutation_p_value(differences, samples=2**13 - 1)
    assert not torch.equal(exact, random)
    # Standard error of a share of 8,191: at most 0.0056.
    torch.testing.assert_close(random, exact, rtol=0, atol=0.025)


def test_p_values_are_uniform_where_nothing_is_there_and_least_where_all_is():
    chance = permutation_p_value(normal(30, 2000), samples=999)
    for share in (0.05, 0.2, 0.5):
        assert (chance <= share).double().mean() == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / 2000))
    assert permutation_p_value(normal(30, 2).abs() + 9, samples=999).tolist() == [1 / 1000] * 2
    assert permutation_p_value(torch.zeros(5)).item() == 1


def test_chunks_change_nothing_and_neither_does_torchs_seed(monkeypatch):
    values = normal(20, 4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = bootstrap_interval(values, samples=101), permutation_p_value(values, samples=101)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(statistics, "_CHUNK", 20 * 7)
    parts = bootstrap_interval(values, samples=101), permutation_p_value(values, samples=101)
    torch.testing.assert_close(whole[0].low, parts[0].low)
    torch.testing.assert_close(whole[1], parts[1])
    assert not torch.equal(bootstrap_interval(values, seed=1).low, whole[0].low)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: standard_error(torch.ones(1, 3)),
            "there are too few rows\n  expected: [row, ...] with at least 2\n  got: [1, 3]",
        ),
        (
            lambda: permutation_p_value(torch.tensor(1.0)),
            "there are too few rows\n  expected: [row, ...] with at least 1\n  got: []",
        ),
        (lambda: bootstrap_interval(torch.ones(3), level=95), "level=95 is no share\n  expected: 0 < level < 1"),
        (lambda: bootstrap_interval(torch.ones(3), samples=0), "samples=0\n  expected: a whole number, samples >= 1"),
        (lambda: permutation_p_value(torch.ones(20), samples=0), "samples=0\n  expected: a whole number, samples >= 1"),
    ],
)
def test_what_cannot_be_said_raises(call, message):
    with pytest.raises(InvalidArgumentError) as raised:
        call()
    assert str(raised.value) == message


def test_what_a_row_lacks_is_left_out_of_its_quantity():
    rows = normal(9, 2, 3)
    rows[:4, 0, 1] = math.nan
    rows[5:, 1, 2] = math.nan
    rows[1:, 1, 0] = math.nan
    for found in (
        standard_error,
        lambda one: bootstrap_interval(one).low,
        lambda one: permutation_p_value(one, seed=2),
    ):
        whole = found(rows)
        for at in itertools.product(range(2), range(3)):
            own = rows[:, *at][~rows[:, *at].isnan()]
            if at == (1, 0):
                assert own.shape == (1,)
                continue
            assert whole[at].item() == pytest.approx(found(own).item())
    assert standard_error(rows)[1, 0].isnan()
    assert permutation_p_value(rows)[1, 0] == 1
    assert bootstrap_interval(torch.full((2, 3), math.nan)).high.isnan().all()


def test_a_share_counts_only_what_is_known():
    hits = torch.tensor([[1.0, 0.0, 1.0, math.nan], [1.0, 1.0, 1.0, 1.0]])
    whole, alone = share_interval(hits), share_interval(hits[0, :3])
    for end in ("mean", "low", "high"):
        assert getattr(whole, end)[0] == getattr(alone, end)
    assert whole.low[1] < whole.mean[1] == whole.high[1] == 1
