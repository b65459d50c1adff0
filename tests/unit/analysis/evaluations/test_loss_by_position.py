import pytest
import torch
from clearspan.analysis.evaluations.loss_by_position import LossByPosition, loss_by_position
from clearspan.analysis.heads.repeated_tokens import repeated_tokens
from tests.zoo import build

import clearspan
from clearspan.analysis.reporting.predictions import NotFiniteError
from clearspan.errors import InvalidArgumentError

TEXTS = ["import os, sys", "def f(self, x):\n    return self.x + x", "x = 1"]


def test_each_loss_is_that_of_the_text_alone(embedded):
    found = loss_by_position(embedded, TEXTS, batch_size=2)
    lengths = []
    with torch.no_grad():
        for row, text in enumerate(TEXTS):
            alone = embedded(text, return_type="loss", loss_per_token=True)[0]
            lengths.append(len(alone))
            torch.testing.assert_close(found.losses[row, : len(alone)], alone, rtol=1e-4, atol=1e-4)
            assert found.losses[row, len(alone) :].isnan().all()
    assert found.losses.shape == (3, max(lengths))
    assert found.counts.tolist() == [sum(length > place for length in lengths) for place in range(max(lengths))]
    last = lengths.index(max(lengths))
    assert found.mean[-1] == found.losses[last, -1]


@pytest.mark.parametrize("variant", ["gpt_bigcode", "llama", "bloom"])
def test_long_texts_are_read_in_pieces(variant):
    bridge = clearspan.boot(build(variant))
    tokens = torch.randint(1, 97, (2, 21), generator=torch.Generator().manual_seed(0))
    found = loss_by_position(bridge, tokens, length=10)
    assert found.losses.shape == (4, 9)  # two pieces of ten a row; the piece of one token predicts nothing
    with torch.no_grad():
        expected = bridge(tokens[:, :20].reshape(4, 10), return_type="loss", loss_per_token=True)
    torch.testing.assert_close(found.losses, expected, rtol=1e-4, atol=1e-4)


def test_a_repetition_is_learned_from_the_context(embedded):
    score = loss_by_position(embedded, repeated_tokens(embedded, rows=8, period=40).tokens)
    found = score.in_context_learning_score(early=30, late=70)
    differences = (score.losses[:, 69] - score.losses[:, 29]).double()
    assert found.mean == pytest.approx(differences.mean().item())
    assert found.error == pytest.approx(differences.std().item() / 8**0.5)
    assert found.mean < -10


def rows_of(*lengths):
    losses = torch.full((len(lengths), max(lengths)), torch.nan)
    for row, length in enumerate(lengths):
        losses[row, :length] = torch.arange(length).flip(0) + 10.0 * row
    return LossByPosition(losses)


@pytest.mark.parametrize(
    ("lengths", "places"),
    [
        ((600, 600), (50, 500)),
        ((500,), (50, 500)),
        ((100, 300), (30, 300)),
        ((100, 120, 300), (12, 120)),
        ((1,), (1, 1)),
    ],
)
def test_positions_are_those_that_half_of_the_rows_reach(lengths, places):
    assert rows_of(*lengths).places == places


def test_rows_that_are_too_short_do_not_count(embedded):
    score = rows_of(30, 8, 30).in_context_learning_score(5, 20)
    assert (score.mean, score.error, score.rows) == (-15, 0, 2)
    assert rows_of(30, 8).in_context_learning_score(5, 20).rows == 1


@pytest.mark.parametrize("place", [0, 31])
def test_a_position_that_no_row_has(place):
    with pytest.raises(InvalidArgumentError) as error:
        rows_of(30, 8).in_context_learning_score(early=place)
    assert str(error.value) == f"no row has a loss on position {place}\n  expected: 1 to 30"


def test_it_prints_and_plots(embedded):
    found = loss_by_position(embedded, TEXTS)
    early, late = found.places
    assert found.title == (
        f"loss by position in nats, mean over 3 rows; in-context learning score {found.in_context_learning_score()} "
        f"(position {late} minus position {early}, ± standard error)"
    )
    table = found.to_dataframe()
    assert table["position"].tolist() == list(range(1, found.losses.shape[1] + 1))
    assert table["rows"].tolist() == found.counts.tolist()
    assert list(found.plot().data[0].y) == pytest.approx(table["loss"].tolist())


def test_what_cannot_be_read_is_said(embedded):
    with pytest.raises(InvalidArgumentError) as error:
        loss_by_position(embedded, torch.tensor([[5], [6]]))
    assert str(error.value) == "there is no next token to predict\n  expected: a text of two tokens or more"
    with pytest.raises(InvalidArgumentError, match="there is nothing to read"):
        loss_by_position(embedded, [])
    with pytest.raises(InvalidArgumentError, match="batch_size=0"):
        loss_by_position(embedded, TEXTS, batch_size=0)


def test_losses_that_are_not_numbers_raise(make_bridge):
    bridge = make_bridge()
    with torch.no_grad():
        bridge.hf_model.lm_head.weight[3] = torch.nan
    with pytest.raises(NotFiniteError, match=r"the model's losses are not numbers \(NaN\)"):
        loss_by_position(bridge, torch.tensor([[5, 6]]))
