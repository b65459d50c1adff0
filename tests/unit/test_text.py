"""Text: BOS, padding and pieces, on the embedded model, whose BOS, EOS and padding token are one."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import tiny_model
from tests.vocabularies import KINDS, SPECIAL
from tests.zoo import build
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import clearspan
from clearspan.errors import InputError, TokenRangeError

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
    assert embedded.to_str_tokens(tokens.numpy()) == embedded.to_str_tokens(tokens[0].numpy()) == pieces
    assert len(embedded.to_str_tokens(embedded.to_tokens(TEXTS).numpy())) == 3


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


# --- round trips -----------------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from("The cat sat on the mat , and dog Paris def area(self): é".split()), min_size=1)
LOSSLESS = ["byte-level", "metaspace"]


@functools.cache
def of_kind(kind):
    tokenizer = KINDS[kind]()
    return clearspan.boot(build("llama", vocab_size=len(tokenizer)), tokenizer=tokenizer)


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=40)
@given(text=st.text(min_size=1, max_size=12))
def test_any_text_comes_back(kind, text):
    bridge = of_kind(kind)
    if kind == "metaspace" and text.startswith("▁"):
        return  # its own mark for a space
    text = text.replace("▁", "_")
    tokens = bridge.to_tokens(text, prepend_bos=False)[0]
    assert bridge.to_string(tokens) == text


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "wordpiece"])
@settings(max_examples=40)
@given(words=WORDS)
def test_words_come_back_and_pieces_join_to_the_text(kind, words):
    bridge, text = of_kind(kind), " ".join(words)
    tokens = bridge.to_tokens(text, prepend_bos=False)[0]
    found = bridge.to_string(tokens)
    if kind == "wordpiece":  # which keeps no white space
        assert found.replace(" ", "") == text.replace(" ", "")
    else:
        assert found == text
    pieces = bridge.to_str_tokens(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == found
    assert bridge.to_str_tokens(text, prepend_bos=False) == pieces


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_themselves(kind):
    bridge = of_kind(kind)
    for index, token in enumerate(SPECIAL):
        assert bridge.to_single_str_token(index) == bridge.to_string(index) == token
        assert bridge.to_single_token(token) == index
    assert bridge.to_str_tokens(torch.arange(4))[0] == SPECIAL[0]
    assert bridge.text.without_special(torch.arange(4)[None]) == [""]


def test_spaces_before_commas_are_kept():
    bridge = of_kind("wordpiece")
    assert bridge.tokenizer.clean_up_tokenization_spaces
    assert bridge.to_string(bridge.to_tokens("the cat , and", prepend_bos=False)[0]) == "the cat , and"
    assert bridge.generate("the cat , and", prepend_bos=False, max_new_tokens=1).startswith("the cat , and")


@pytest.mark.parametrize(("kind", "text"), [("byte-level", "é語"), ("metaspace", "é語")])
def test_a_token_that_is_part_of_a_character_shows_as_one_that_is(kind, text):
    bridge = of_kind(kind)
    tokens = bridge.to_tokens(text, prepend_bos=False)[0]
    pieces = bridge.to_str_tokens(tokens)
    assert len(pieces) == len(tokens)
    assert bridge.to_string(tokens) == text
    broken = [token for token, piece in zip(tokens.tolist(), pieces, strict=True) if piece == "\ufffd"]
    assert len(broken) == 3  # 語 is three bytes
    assert [bridge.text.label(token) for token in broken] == [f"\ufffd#{token}" for token in broken]


def test_the_same_word_within_a_word_and_behind_one_are_told_apart():
    for kind in ("byte-level", "metaspace", "wordpiece"):
        bridge = of_kind(kind)
        *_, last = bridge.to_tokens("and an mat", prepend_bos=False)[0].tolist()
        assert bridge.text.label(last).startswith("·"), kind
    bridge = of_kind("metaspace")
    inside, behind = (bridge.tokenizer.convert_tokens_to_ids(one) for one in ("a", "▁a"))
    assert bridge.text.label(inside), bridge.text.label(behind) == ("a", "·a")


def test_a_token_without_text_is_labelled_by_its_id(embedded, bridge):
    assert bridge.text.label(5) == "#5"
    padded = clearspan.boot(build("llama", vocab_size=4160), tokenizer=embedded.tokenizer)
    assert padded.text.label(4159) == "#4159"
    assert padded.text.label(embedded.to_single_token(" os")) == "·os"


def test_ids_that_neither_model_nor_tokenizer_has_are_no_text(embedded):
    for call in (embedded.to_string, embedded.to_str_tokens):
        with pytest.raises(TokenRangeError, match="token ids outside the vocabulary\n  expected: 0 to 4095"):
            call([5, 4096])


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "wordpiece"])
def test_a_word_behind_a_space_is_the_token_that_it_is_in_a_text(kind):
    bridge = of_kind(kind)
    *_, last = bridge.to_tokens("the dog and the cat")[0].tolist()
    assert bridge.to_single_token(" cat") == last


def test_an_unknown_word_is_no_token():
    bridge = of_kind("words")
    assert bridge.to_single_token("w3") == bridge.to_single_token(" w3") == 7
    with pytest.raises(InputError) as error:
        bridge.to_single_token("missing")
    assert str(error.value).splitlines() == [
        "the tokenizer does not know 'missing'",
        "  got: ['<unk>'], of which '<unk>' is its unknown token",
        "  where: TokenizersBackend",
        "  fix: a text of its vocabulary, or a token id",
    ]
