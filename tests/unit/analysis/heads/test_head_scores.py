import pytest
import torch

from clearspan.analysis import Head, HeadScores, head_scores, strongest


@pytest.fixture
def period():
    return 20


def test_a_perfect_head_of_each_kind_scores_one_and_others_stay(bridge, period):
    """Patterns written into two heads: what they are scored by is the definition, position by position."""

    def plant(pattern, hook):
        pattern[:, [3, 5]] = 0
        for q in range(1, pattern.shape[2]):
            pattern[:, 5, q, q - 1] = 1
            if q > period:
                pattern[:, 3, q, q - period + 1] = 1

    before = head_scores(bridge, period=period)
    with bridge.hooks(fwd_hooks=[("blocks.2.attn.hook_pattern", plant)]):
        planted = head_scores(bridge, period=period)
    assert planted.induction[2, 3] == 1
    assert planted.previous_token[2, 3] == 0
    assert planted.previous_token[2, 5] == 1
    assert planted.induction[2, 5] == 0
    assert torch.equal(planted.induction[2, [0, 1, 2, 4, 6, 7]], before.induction[2, [0, 1, 2, 4, 6, 7]])
    assert strongest(planted.induction, 1)[0] == Head(2, 3, 1.0)


def test_the_head_of_the_models_card_is_found(bridge):
    """The card measures on blocks of 100 tokens: 0.980, layer 4, head 3. Random texts differ by some hundredths."""
    scores = head_scores(bridge, period=100)
    assert strongest(scores.induction, 1)[0] == Head(4, 3, pytest.approx(0.98, abs=0.01))
    assert strongest(scores.previous_token, 1)[0] == Head(3, 1, pytest.approx(0.90, abs=0.03))


def test_the_text_is_bos_and_one_random_block_twice(bridge, period):
    seen = []

    def keep(embedding, hook):
        seen.append(embedding)

    with bridge.hooks(fwd_hooks=[("hook_embed", keep)]):
        first = head_scores(bridge, rows=2, period=period, seed=7)
        again = head_scores(bridge, rows=2, period=period, seed=7)
        other = head_scores(bridge, rows=2, period=period, seed=8)
    assert seen[0].shape[:2] == (2, 1 + 2 * period)
    assert torch.equal(seen[0][:, 1 : 1 + period], seen[0][:, 1 + period :])
    assert torch.equal(first.induction, again.induction)
    assert not torch.equal(first.induction, other.induction)


def test_the_period_is_at_most_half_the_context(bridge):
    assert head_scores(bridge, rows=1, period=1000).induction.shape == (5, 8)


def test_strongest_are_in_order_with_their_places():
    scores = torch.tensor([[0.1, 0.9], [0.4, 0.2]])
    assert strongest(scores, 3) == [
        Head(0, 1, pytest.approx(0.9)),
        Head(1, 0, pytest.approx(0.4)),
        Head(1, 1, pytest.approx(0.2)),
    ]
    assert len(strongest(scores, 99)) == 4
    assert str(Head(3, 7, 0.5)) == "L3H7"


def test_scores_print_the_strongest_and_plot_each_kind():
    scores = HeadScores(torch.tensor([[0.1, 0.9], [0.4, 0.2]]), torch.tensor([[0.5, 0.0], [0.0, 0.25]]))
    assert str(scores) == (
        "induction and previous-token score of each head, in attention from 0 to 1\n"
        "layer  head  induction  previous token\n"
        "    0     1     0.9000          0.0000\n"
        "    1     0     0.4000          0.0000\n"
        "    1     1     0.2000          0.2500\n"
        "    0     0     0.1000          0.5000"
    )
    assert scores.plot().data[0].z[0] == [0.1, 0.9]
    assert scores.plot("previous_token").data[0].z[1] == [0.0, 0.25]
