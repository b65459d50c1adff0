import math

import pytest
import torch
from tests.zoo import build

import clearspan
from clearspan.analysis import (
    LossByPosition,
    evaluate_repetition,
    induction_loss,
    loss_by_position,
    next_token_loss,
    repeated_tokens,
)
from clearspan.errors import InputError, InvalidArgumentError, NotFiniteError
from clearspan.sweep import NextTokenLoss

TEXTS = ["import os, sys", "def f(self, x):\n    return self.x + x", "x = 1"]


def test_each_loss_is_that_of_the_text_alone(embedded):
    found = loss_by_position(embedded, TEXTS, batch_size=2)
    lengths = []
    with torch.no_grad():
        for row, text in enumerate(TEXTS):
            alone = embedded(text, return_type="loss", loss_per_token=True)[0]
            lengths.append(len(alone))
            torch.testing.assert_close(found.of()[: len(alone), row], alone, rtol=1e-4, atol=1e-4)
            assert found.of()[len(alone) :, row].isnan().all()
    assert found.of().shape == (max(lengths), 3)
    assert found.counts.tolist() == [sum(length > place for length in lengths) for place in range(max(lengths))]
    last = lengths.index(max(lengths))
    assert found.mean()[-1] == found.of()[-1, last]


@pytest.mark.parametrize("variant", ["gpt_bigcode", "llama", "bloom"])
def test_long_texts_are_read_in_pieces(variant):
    bridge = clearspan.boot(build(variant))
    tokens = torch.randint(1, 97, (2, 21), generator=torch.Generator().manual_seed(0))
    found = loss_by_position(bridge, tokens, length=10)
    assert found.of().shape == (9, 4)  # two pieces of ten a row; the piece of one token predicts nothing
    with torch.no_grad():
        expected = bridge(tokens[:, :20].reshape(4, 10), return_type="loss", loss_per_token=True)
    torch.testing.assert_close(found.of(), expected.T, rtol=1e-4, atol=1e-4)


def test_a_repetition_is_learned_from_the_context(embedded):
    score = loss_by_position(embedded, repeated_tokens(embedded, rows=8, period=40).tokens)
    found = score.in_context_learning_score(early=30, late=70)
    differences = (score.of()[69] - score.of()[29]).double()
    assert found.mean == pytest.approx(differences.mean().item())
    assert found.error == pytest.approx(differences.std().item() / 8**0.5)
    assert found.mean < -10


def rows_of(*lengths):
    losses = torch.full((max(lengths), len(lengths)), torch.nan)
    for row, length in enumerate(lengths):
        losses[:length, row] = torch.arange(length).flip(0) + 10.0 * row
    return LossByPosition({"loss": losses}, {"position": tuple(range(1, max(lengths) + 1))})


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
    assert rows_of(*lengths).compared == places


def test_rows_that_are_too_short_do_not_count(embedded):
    score = rows_of(30, 8, 30).in_context_learning_score(5, 20)
    assert (score.mean, score.error, score.rows) == (-15, 0, 2)
    assert rows_of(30, 8).in_context_learning_score(5, 20).rows == 1


@pytest.mark.parametrize("place", [0, 31])
def test_a_position_that_no_row_has(place):
    with pytest.raises(InvalidArgumentError) as error:
        rows_of(30, 8).in_context_learning_score(early=place)
    assert str(error.value) == f"there is no position={place}\n  expected: position=1…30"


def test_losses_print_and_plot(embedded):
    found = loss_by_position(embedded, TEXTS)
    early, late = found.compared
    assert found.title == (
        f"loss in nats of each position; mean over 3 pieces; in-context learning score "
        f"{found.in_context_learning_score()} (position {late} minus position {early}, ± standard error)"
    )
    table = found.to_dataframe()
    assert table["position"].tolist() == list(range(1, len(found.of()) + 1))
    assert table["rows"].tolist() == found.counts.tolist()
    assert [line.split()[0] for line in str(found).splitlines()[2:5]] == ["1", "2", "3"]
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


def test_a_corpus_is_any_input_and_any_number_of_them(embedded):
    texts = ["import os, sys", "x = 1"]
    whole = loss_by_position(embedded, texts).of()
    rows = [embedded.to_tokens(text)[0] for text in texts]
    batch = embedded.to_batch(texts, padding_side="left")
    for corpus in (
        iter(texts),
        [{"text": text} for text in texts],
        {"text": texts},
        rows,
        [row.tolist() for row in rows],
        [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows],
        batch,
        {"input_ids": batch.ids, "attention_mask": batch.mask},
        [*texts, "", {"text": ""}],
    ):
        torch.testing.assert_close(loss_by_position(embedded, corpus).of(), whole, rtol=1e-4, atol=1e-4, equal_nan=True)


# --- the loss as a metric --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_the_metric_of_a_sweep(embedded, side):
    batch = embedded.to_batch(TEXTS, padding_side=side)
    logits = embedded(batch)
    alone = torch.stack([embedded(text, return_type="loss") for text in TEXTS])
    torch.testing.assert_close(next_token_loss(batch)(logits), alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(next_token_loss(batch.ids, batch.mask)(logits), alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(NextTokenLoss()(logits, batch), next_token_loss(batch)(logits))


def test_a_loss_of_nothing_raises(tokens):
    with pytest.raises(InvalidArgumentError, match="there is no next token to predict"):
        next_token_loss(tokens[:, :1])
    for wrong in ("text", tokens[0], tokens.float(), None):
        with pytest.raises(InputError, match="the loss is on token ids"):
            next_token_loss(wrong)


# --- repeated tokens --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_losses_are_those_of_the_bridge_by_token(embedded, prepend_bos):
    text = repeated_tokens(embedded, rows=2, period=6, prepend_bos=prepend_bos)
    assert text.tokens.shape == (2, 12 + prepend_bos)
    assert text.start == prepend_bos
    logits, per_token = embedded(text.tokens, return_type="both", loss_per_token=True)
    losses, correct = text.losses(logits), text.correct(logits)
    assert losses.shape == correct.shape == (2, 2, 5)
    for copy in range(2):
        for place in range(1, 6):
            position = text.start + copy * 6 + place
            torch.testing.assert_close(losses[:, copy, place - 1], per_token[:, position - 1])
            hits = logits[:, position - 1].argmax(-1) == text.tokens[:, position]
            assert torch.equal(correct[:, copy, place - 1], hits.float())
    torch.testing.assert_close(text.second_copy_loss(logits), losses[:, 1].mean(-1))


def test_the_model_learns_the_block_from_its_first_copy(embedded):
    found = evaluate_repetition(embedded, rows=8, period=30)
    assert found.first_loss > math.log(embedded.cfg.d_vocab)
    assert found.second_loss < 1
    assert found.accuracy > 0.9
    assert found.of("accuracy")[0].mean() < 0.1


def test_batches_change_nothing_and_seeds_do(embedded):
    whole = evaluate_repetition(embedded, rows=5, period=10)
    parts = evaluate_repetition(embedded, rows=5, period=10, batch_size=2)
    torch.testing.assert_close(parts.of("loss"), whole.of("loss"), rtol=1e-4, atol=1e-4)
    assert torch.equal(parts.of("accuracy"), whole.of("accuracy"))
    assert not torch.allclose(evaluate_repetition(embedded, rows=5, period=10, seed=1).of(), whole.of())


def test_repetitions_print_and_plot(embedded):
    found = evaluate_repetition(embedded, rows=2, period=4)
    first, second = found.of().mean((1, 2)).tolist()
    assert found.title == (
        f"loss on repeated random tokens: {first:.2f} nats on the first copy, {second:.2f} on the second; accuracy "
        f"{found.of('accuracy')[1].mean():.0%} on the second; mean over 2 rows"
    )
    table = found.to_dataframe()
    assert table[["copy", "place"]].values.tolist() == [
        [copy, place] for copy in ("first", "second") for place in (1, 2, 3)
    ]
    assert table["loss"].tolist() == pytest.approx(found.mean().flatten().tolist())
    assert [line.name for line in found.plot().data] == ["first", "second"]
    assert list(found.plot().data[1].y) == pytest.approx(found.mean()[1].tolist())


def test_the_fall_of_the_loss_is_by_row(embedded):
    found = evaluate_repetition(embedded, rows=6, period=8)
    by_row = (found.of()[0] - found.of()[1]).mean(0).double()
    assert found.loss_difference.mean == pytest.approx(found.first_loss - found.second_loss, rel=1e-5)
    assert found.loss_difference.error == pytest.approx(by_row.std().item() / 6**0.5, rel=1e-5)
    assert found.loss_difference.rows == 6


@torch.no_grad()
def test_the_induction_loss_is_the_second_copys(embedded):
    found = induction_loss(embedded, rows=3, period=20, seed=2, batch_size=2)
    tokens = repeated_tokens(embedded, rows=3, period=20, seed=2).tokens
    per_token = embedded(tokens, return_type="loss", loss_per_token=True)
    assert found == pytest.approx(per_token[:, 21:].mean().item(), rel=1e-3, abs=1e-4)


def test_the_embedded_model_needs_its_induction_heads(embedded):
    def ablate(z, hook):
        z[:] = 0

    clean = induction_loss(embedded, rows=2)
    with embedded.hooks(fwd_hooks=[("blocks.4.attn.hook_z", ablate), ("blocks.3.attn.hook_z", ablate)]):
        assert induction_loss(embedded, rows=2) > clean + 1


def test_a_bos_stands_first_where_texts_have_one(embedded):
    bos = embedded.tokenizer.bos_token_id
    by_default = repeated_tokens(embedded, rows=2, period=5)
    assert (by_default.start, by_default.tokens[:, 0].tolist()) == (1, [bos, bos])
    embedded.cfg.default_prepend_bos = False
    try:
        without, asked = repeated_tokens(embedded, period=5), repeated_tokens(embedded, period=5, prepend_bos=True)
    finally:
        embedded.cfg.default_prepend_bos = True
    assert (without.start, without.tokens.shape[1]) == (0, 10)
    assert asked.start == 1


@pytest.mark.parametrize(("prepend_bos", "width"), [(True, 1 + 2 * 255), (False, 2 * 256)])
def test_a_long_block_is_half_of_the_context(embedded, prepend_bos, width):
    assert repeated_tokens(embedded, rows=1, period=10_000, prepend_bos=prepend_bos).tokens.shape[1] == width


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gpt_bigcode", "llama", "gemma2"])
def test_tokens_of_ones_own_take_no_tokenizer(variant):
    bridge = clearspan.boot(build(variant))
    vocabulary = torch.tensor([5, 6, 90])
    found = evaluate_repetition(bridge, rows=3, period=8, vocabulary=vocabulary)
    text = repeated_tokens(bridge, rows=3, period=8, vocabulary=vocabulary.tolist())
    assert set(text.tokens.unique().tolist()) == {5, 6, 90}
    assert text.start == 0
    losses = bridge(text.tokens, return_type="loss", loss_per_token=True)
    torch.testing.assert_close(found.of()[0].T, losses[:, :7], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.of()[1].T, losses[:, 8:], rtol=1e-4, atol=1e-4)


def test_special_tokens_are_not_drawn(embedded):
    block = repeated_tokens(embedded, rows=40, period=255).tokens[:, 1:]
    assert not set(block.unique().tolist()) & set(embedded.tokenizer.all_special_ids)
    assert block.unique().numel() > 0.85 * embedded.cfg.d_vocab  # 10,200 of 4,095 drawn: 92 % expected


def test_an_empty_vocabulary_and_a_missing_bos_raise(bridge_without_tokenizer):
    with pytest.raises(InvalidArgumentError) as error:
        repeated_tokens(bridge_without_tokenizer, vocabulary=[])
    assert str(error.value) == "there is no token to draw\n  expected: a vocabulary of token ids\n  got: an empty one"
    with pytest.raises(InputError) as error:
        repeated_tokens(bridge_without_tokenizer, vocabulary=[1], prepend_bos=True)
    assert str(error.value) == "prepend_bos=True, but there is no BOS token\n  fix: prepend_bos=False"


@pytest.mark.parametrize("given", [{"rows": 0}, {"period": 1}])
def test_nothing_to_repeat_raises(embedded, given):
    settings = {"rows": 1, "period": 5, **given}
    with pytest.raises(InvalidArgumentError) as error:
        repeated_tokens(embedded, **settings)
    got = f"rows={settings['rows']}, period={settings['period']}"
    assert str(error.value) == f"there is nothing to repeat\n  expected: rows >= 1, period >= 2\n  got: {got}"


def test_without_a_tokenizer_all_tokens_but_those_that_the_config_names_are_drawn(bridge_without_tokenizer):
    drawn = repeated_tokens(bridge_without_tokenizer, rows=40, period=15).tokens
    assert drawn.unique().tolist() == list(range(1, bridge_without_tokenizer.cfg.d_vocab))  # 0 is BOS, EOS and padding
    assert evaluate_repetition(bridge_without_tokenizer, rows=1, period=3).first_loss > 0


@pytest.fixture
def bridge_without_tokenizer(make_bridge):
    return make_bridge()
