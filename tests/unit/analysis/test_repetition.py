import math

import pytest
import torch

from clearspan.analysis.repeated_tokens import repeated_tokens
from clearspan.analysis.repetition import evaluate_repetition
from clearspan.errors import InvalidArgumentError, NoTokenizerError


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
