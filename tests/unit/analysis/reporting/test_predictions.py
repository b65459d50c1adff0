import pytest
import torch

import clearspan
from clearspan.analysis import NotFiniteError, predictions


@torch.no_grad()
def test_predictions_are_the_softmax_of_the_logits(bridge, tokens):
    probs = bridge(tokens)[0].softmax(-1)
    found = predictions(bridge, tokens, k=3)
    expected = probs.sort(-1, descending=True)
    torch.testing.assert_close(found.top_probs, expected.values[:, :3])
    assert torch.equal(found.top_ids[:, 0], probs.argmax(-1))
    for i in range(tokens.shape[1] - 1):
        assert found.next_probs[i] == pytest.approx(float(probs[i, tokens[0, i + 1]]), rel=1e-5)


def test_one_token_has_predictions_and_no_next_probability(bridge, tokens):
    found = predictions(bridge, tokens[:, :1])
    assert found.top_ids.shape == (1, 5)
    assert found.next_probs.shape == (0,)


def test_a_model_that_returns_nan_is_refused():
    broken = clearspan.boot("tiny-bigcode")
    with torch.no_grad():
        next(broken.hf_model.parameters()).fill_(torch.nan)
    with pytest.raises(NotFiniteError) as error:
        predictions(broken, torch.tensor([[0, 1]]))
    assert str(error.value) == (
        "the model's logits are not numbers (NaN), so it predicts nothing\n"
        "  where: tiny-bigcode, weights in torch.float32\n"
        "  fix: clearspan.boot(model, dtype=torch.float32), if they overflow"
    )
