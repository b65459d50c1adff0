import math

import pytest
import torch
from clearspan.analysis.evaluations.repetition import evaluate_repetition, induction_loss
from clearspan.analysis.heads.repeated_tokens import repeated_tokens
from tests.zoo import build

import clearspan
from clearspan.errors import InputError, InvalidArgumentError, NoTokenizerError


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
    assert found.correct[:, 0].mean() < 0.1


def test_batches_change_nothing_and_seeds_do(embedded):
    whole = evaluate_repetition(embedded, rows=5, period=10)
    parts = evaluate_repetition(embedded, rows=5, period=10, batch_size=2)
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-4, atol=1e-4)
    assert torch.equal(parts.correct, whole.correct)
    assert not torch.allclose(evaluate_repetition(embedded, rows=5, period=10, seed=1).losses, whole.losses)


def test_it_prints_and_plots(embedded):
    found = evaluate_repetition(embedded, rows=2, period=4)
    first, second = found.losses.mean((0, 2)).tolist()
    assert found.title == (
        f"loss on repeated random tokens: {first:.2f} nats on the first copy, {second:.2f} on the second; accuracy "
        f"{found.correct[:, 1].mean():.0%} on the second; mean over 2 rows"
    )
    assert found.to_dataframe()["place"].tolist() == [1, 2, 3]
    assert [line.name for line in found.plot().data] == ["first copy", "second copy"]
    assert list(found.plot().data[1].y) == pytest.approx(found.losses[:, 1].mean(0).tolist())


def test_the_fall_of_the_loss_is_by_row(embedded):
    found = evaluate_repetition(embedded, rows=6, period=8)
    by_row = (found.losses[:, 0] - found.losses[:, 1]).mean(-1).double()
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
    torch.testing.assert_close(found.losses[:, 0], losses[:, :7], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.losses[:, 1], losses[:, 8:], rtol=1e-4, atol=1e-4)


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


def test_without_a_tokenizer_it_raises(bridge_without_tokenizer):
    with pytest.raises(NoTokenizerError):
        evaluate_repetition(bridge_without_tokenizer)


@pytest.fixture
def bridge_without_tokenizer(make_bridge):
    return make_bridge()
