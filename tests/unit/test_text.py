"""Text: BOS, padding and pieces, on the embedded model, whose BOS, EOS and padding token are one."""

import pytest
import torch
from tests.conftest import tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import clearspan
from clearspan.errors import InputError

TEXTS = ["def area(self):", "import os\nimport sys\n", "x"]


def test_round_trip(embedded):
    tokens = embedded.to_tokens(TEXTS[0])
    assert tokens[0, 0] == embedded.tokenizer.bos_token_id
    assert embedded.to_string(tokens[0, 1:]) == TEXTS[0]
    assert embedded.to_string(tokens) == ["<|endoftext|>" + TEXTS[0]]
    without = embedded.to_tokens(TEXTS[0], prepend_bos=False)
    assert torch.equal(without, tokens[:, 1:])
    pieces = embedded.to_str_tokens(TEXTS[0])
    assert "".join(pieces) == "<|endoftext|>" + TEXTS[0]
    assert embedded.to_str_tokens(tokens) == embedded.to_str_tokens(tokens[0]) == pieces
    assert [len(row) for row in embedded.to_str_tokens(TEXTS)] == [embedded.to_tokens(t).shape[1] for t in TEXTS]
    assert len(embedded.to_str_tokens(embedded.to_tokens(TEXTS))) == 3


def test_exactly_one_bos(embedded):
    assert torch.equal(embedded.to_tokens("<|endoftext|>x"), embedded.to_tokens("x"))
    embedded.cfg.default_prepend_bos = False
    try:
        assert embedded.to_tokens("x").shape == (1, 1)
        assert embedded.to_tokens("x", prepend_bos=True).shape == (1, 2)
    finally:
        embedded.cfg.default_prepend_bos = True


def test_single_token(embedded):
    token = embedded.to_single_token("def")
    assert embedded.to_string(token) == embedded.to_single_str_token(token) == "def"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_each_row_of_a_batch_has_the_logits_it_has_alone(embedded, side, prepend_bos):
    with torch.no_grad():
        logits = embedded(TEXTS, padding_side=side, prepend_bos=prepend_bos)
        losses = embedded(
            TEXTS[:2], padding_side=side, prepend_bos=prepend_bos, return_type="loss", loss_per_token=True
        )
        for row, text in enumerate(TEXTS):
            alone = embedded(text, prepend_bos=prepend_bos)
            length = alone.shape[1]
            found = logits[row, -length:] if side == "left" else logits[row, :length]
            torch.testing.assert_close(found, alone[0], rtol=1e-5, atol=1e-4)
            if row < 2:
                expected = embedded(text, prepend_bos=prepend_bos, return_type="loss", loss_per_token=True).sum()
                torch.testing.assert_close(losses[row].sum(), expected, rtol=1e-5, atol=1e-4)


def test_the_mean_loss_of_a_batch_counts_real_tokens_alone(embedded):
    with torch.no_grad():
        both = [embedded(text, return_type="loss", loss_per_token=True) for text in TEXTS[:2]]
        expected = torch.cat([losses[0] for losses in both]).mean()
        torch.testing.assert_close(embedded(TEXTS[:2], return_type="loss"), expected, rtol=1e-5, atol=1e-5)


def test_a_tokenizer_given_to_boot(tokens):
    vocabulary = {f"t{index}": index for index in range(97)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), unk_token="t0"
    )
    bridge = clearspan.boot(tiny_model(), tokenizer=tokenizer)
    assert bridge.to_tokens("t5").tolist() == [[5]]
    with pytest.raises(InputError, match="the tokenizer has no BOS token"):
        bridge.to_tokens("t5", prepend_bos=True)
