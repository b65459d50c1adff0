"""Whether a tokenizer can turn text into a model's ids: made-up ones, other models', and all legal ones."""

import pytest
import torch
from tests.conftest import tiny_model
from tests.vocabularies import KINDS, SPECIAL, characters, words, wrapped
from tests.zoo import MODELS, build
from tokenizers import Tokenizer, decoders, models
from transformers import ByT5Tokenizer, GemmaTokenizer, GPT2Tokenizer

import clearspan
from clearspan.errors import InputError, InvalidArgumentError, NoTokenizerError, TokenizerWarning, TokenRangeError
from clearspan.hf.tokenizers import tokenizer_doubt, tokenizer_fault

FAMILIES = [name for name in MODELS if " " not in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_tokenizer_files_has_no_tokenizer(tmp_path, family):
    model = build(family)
    model.save_pretrained(tmp_path)
    bridge = clearspan.boot(tmp_path, attn_implementation=model.config._attn_implementation)
    assert bridge.tokenizer is None
    with pytest.raises(NoTokenizerError) as error:
        bridge("text")
    what, _, reason, fix = str(error.value).splitlines()
    assert what == "this bridge has no tokenizer, so it takes no text"
    assert reason.startswith(("  reason: transformers loads no tokenizer", "  reason: the tokenizer gives every text"))
    assert fix == "  fix: clearspan.boot(model, tokenizer=...), or pass token ids as a tensor [batch, pos]"
    tokens = torch.tensor([[5, 3, 9]])
    assert torch.equal(bridge(tokens), model.eval()(tokens, use_cache=False).logits)
    with pytest.raises(NoTokenizerError) as later:
        bridge.processed(fold_value_biases=None)("text")
    assert str(later.value) == str(error.value)


def test_the_fault_of_a_made_up_tokenizer_says_what_it_is():
    assert tokenizer_fault(GPT2Tokenizer(), 97) == (
        "the tokenizer gives every text the same ids, none at all; it has 1 token and the model 97 (transformers makes "
        "up such a one, of special tokens alone, where a checkpoint has no tokenizer files)"
    )
    assert "the same ids, [3]; it has 5 tokens and the model 97" in str(tokenizer_fault(GemmaTokenizer(), 97))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_every_kind_is_used(tmp_path, kind):
    tokenizer = KINDS[kind]()
    for size in (len(tokenizer), len(tokenizer) + 1, 2048):  # a vocabulary is padded to a multiple
        assert tokenizer_fault(tokenizer, size) is None
    build("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    bridge = clearspan.boot(tmp_path)
    text = "the w3 A"
    assert bridge.to_tokens(text).tolist() == [[1, *tokenizer(text)["input_ids"]]]


def test_a_tokenizer_in_python_is_used():
    tokenizer = ByT5Tokenizer()
    bridge = clearspan.boot(build("llama", vocab_size=384), tokenizer=tokenizer)
    text = "é, os"
    assert bridge.to_string(bridge.to_tokens(text)[0]) == text
    assert tokenizer_fault(tokenizer, 259) is None  # those that stand for gaps were added
    assert "ids 200 to 258 are outside" in str(tokenizer_fault(tokenizer, 200))


def test_a_tokenizer_whose_ordinary_tokens_are_outside_the_vocabulary_is_refused():
    tokenizer = words([*SPECIAL, *(f"w{index}" for index in range(100))])
    with pytest.raises(InvalidArgumentError) as error:
        clearspan.boot(tiny_model(), tokenizer=tokenizer)
    assert str(error.value).splitlines() == [
        "this tokenizer cannot turn text into the model's ids",
        "  where: TokenizersBackend for GPTBigCodeForCausalLM",
        "  reason: the tokenizer has 104 tokens and the model 97: ids 97 to 103 are outside the model's, "
        "'w93' the first",
        "  fix: the tokenizer that the model was trained with; or none, and token ids in place of text",
    ]
    bridge = clearspan.boot(tiny_model())
    with pytest.raises(InvalidArgumentError, match="ids 97 to 103 are outside the model's"):
        bridge.tokenizer = tokenizer
    assert bridge.tokenizer is None


UNKNOWN_ALONE = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))


@pytest.mark.parametrize("tokenizer", [GPT2Tokenizer(), wrapped(UNKNOWN_ALONE)])
def test_a_tokenizer_that_tells_no_texts_apart_is_refused(tokenizer):
    with pytest.raises(InvalidArgumentError, match="reason: the tokenizer gives every text the same ids"):
        clearspan.boot(tiny_model(), tokenizer=tokenizer)


def test_a_tokenizer_whose_text_never_comes_back_is_refused():
    tokenizer = characters("ACD")
    tokenizer.backend_tokenizer.decoder = decoders.Replace("A", "x")
    assert tokenizer_fault(tokenizer, 97) is None
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace(one, "x") for one in "ACD"])
    assert tokenizer_fault(tokenizer, 97) == "the tokenizer turns no text that it was tried on back into itself"


def test_a_much_shorter_tokenizer_warns():
    tokenizer = words([*SPECIAL, "w0", "w1"])
    assert tokenizer_doubt(tokenizer, 1030) is None
    model = build("gpt2", vocab_size=1031)
    with pytest.warns(TokenizerWarning, match="ids end at 5, and the model's at 1030: it may be another model's"):
        bridge = clearspan.boot(model, tokenizer=tokenizer)
    with pytest.warns(TokenizerWarning) as found:
        bridge.tokenizer = tokenizer
    assert found[0].filename == __file__
    for tokens, vocabulary in ((50_295, 51_200), (32_100, 32_128)):  # those of published models
        padded = words(["<unk>", *(f"w{index}" for index in range(1, tokens))])
        assert tokenizer_fault(padded, vocabulary) is tokenizer_doubt(padded, vocabulary) is None


def test_added_tokens_beyond_the_vocabulary_raise_where_a_text_holds_them():
    tokenizer = words([*SPECIAL, *(f"w{index}" for index in range(93))])
    tokenizer.add_tokens(["<think>"])
    tokenizer.pad_token = "<think>"  # as where a padding token was added, and the model was not resized
    bridge = clearspan.boot(tiny_model(), tokenizer=tokenizer)
    assert bridge.to_batch(["w1", "w1 w2"]).tokens.max() < 97
    for call in (bridge, bridge.to_tokens, bridge.to_batch, bridge.generate):
        with pytest.raises(TokenRangeError) as error:
            call("w1 <think>")
        assert str(error.value).splitlines() == [
            "the model has no embedding for '<think>'",
            "  expected: ids 0 to 96",
            "  got: 97, in 'w1 <think>'",
            "  where: TokenizersBackend of 98 tokens",
            "  fix: bridge.hf_model.resize_token_embeddings(len(bridge.tokenizer)), and train the new rows",
        ]
    bridge.hf_model.resize_token_embeddings(98)
    assert bridge("w1 <think>", prepend_bos=False).shape == (1, 2, 98)


def test_a_text_that_the_tokenizer_knows_nothing_of_warns(tmp_path):
    bridge = clearspan.boot(tiny_model(), tokenizer=characters("ACDEFGHIKLMNPQRSTVWY"))
    with pytest.warns(TokenizerWarning, match="knows nothing of 'def f': each of its tokens is '<unk>'"):
        bridge.to_tokens("def f")
    bridge.to_tokens("EVQLx")
    bridge.to_tokens("<unk>")


def test_a_text_without_tokens_raises_behind_a_bos_too():
    bridge = clearspan.boot(tiny_model(), tokenizer=KINDS["words"]())
    for prepend_bos in (True, False):
        with pytest.raises(InputError, match="a text has no tokens"):
            bridge.to_tokens(" \n", prepend_bos=prepend_bos)
