"""Keywords of TransformerLens's `generate` mean the same."""

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria

import clearspan
from clearspan.errors import InvalidArgumentError, NoTokenizerError, UnknownArgumentError

OPTIONS = {"max_new_tokens": 6, "do_sample": False}


def penalised(model, tokens, steps, penalty, temperature):
    """Returns the most likely tokens under a frequency penalty, one forward a token."""
    for _ in range(steps):
        logits = model(tokens).logits[:, -1] / temperature
        counts = torch.stack([torch.bincount(row, minlength=logits.shape[1]) for row in tokens])
        tokens = torch.cat([tokens, (logits - penalty * counts).argmax(-1, keepdim=True)], 1)
    return tokens


@pytest.mark.parametrize("temperature", [1.0, 0.25, 4.0])
def test_a_frequency_penalty_is_taken_from_scaled_logits(temperature, bridge, tokens):
    for penalty in (0.5, 3.0):
        expected = penalised(bridge.hf_model, tokens, 8, penalty, temperature)
        options = {"do_sample": True, "top_k": 1, "temperature": temperature, "max_new_tokens": 8}
        found = bridge.generate(tokens, freq_penalty=penalty, stop_at_eos=False, **options)
        assert torch.equal(found, expected)
        config = GenerationConfig(**options)
        assert torch.equal(
            bridge.generate(tokens, freq_penalty=penalty, eos_token_id=None, generation_config=config), expected
        )


def test_without_sampling_a_frequency_penalty_would_do_nothing(bridge, tokens):
    with pytest.raises(
        InvalidArgumentError, match=r"freq_penalty changes how .*\n  got: do_sample=False\n  fix: .*do_sample=True"
    ):
        bridge.generate(tokens, freq_penalty=1.0, **OPTIONS)
    with pytest.raises(InvalidArgumentError, match="freq_penalty=-1"):
        bridge.generate(tokens, freq_penalty=-1, do_sample=True)
    with pytest.raises(InvalidArgumentError, match="freq_penalty='x'\n  expected: a number"):
        bridge.generate(tokens, freq_penalty="x", do_sample=True)
    assert torch.equal(bridge.generate(tokens, freq_penalty=0.0, **OPTIONS), bridge.generate(tokens, **OPTIONS))


def test_stopping_at_the_end_of_a_sequence_can_be_left_out(bridge, tokens):
    whole = bridge.generate(tokens[:1], eos_token_id=None, **OPTIONS)
    end = int(whole[0, 8])
    stopped = bridge.generate(tokens[:1], eos_token_id=end, **OPTIONS)
    assert stopped.shape[1] < whole.shape[1]
    assert torch.equal(bridge.generate(tokens[:1], stop_at_eos=True, eos_token_id=end, **OPTIONS), stopped)
    bridge.hf_model.generation_config.eos_token_id = end
    assert torch.equal(bridge.generate(tokens[:1], **OPTIONS), stopped)
    assert torch.equal(bridge.generate(tokens[:1], stop_at_eos=False, **OPTIONS), whole)
    with pytest.raises(InvalidArgumentError, match=f"stop_at_eos=False and eos_token_id={end} say different things"):
        bridge.generate(tokens, stop_at_eos=False, eos_token_id=end)


def test_a_cache_of_keys_is_used_or_not(bridge, tokens):
    widths = []
    hooks = [("blocks.0.hook_resid_pre", lambda value, hook: widths.append(value.shape[1]))]
    for use, expected in ((True, [7, 1, 1]), (False, [7, 8, 9])):
        widths.clear()
        bridge.generate(tokens, max_new_tokens=3, use_past_kv_cache=use, stop_at_eos=False, fwd_hooks=hooks)
        assert widths == expected
    with pytest.raises(InvalidArgumentError, match="use_past_kv_cache=False and use_cache=True"):
        bridge.generate(tokens, use_past_kv_cache=False, use_cache=True)


def test_what_is_returned_can_be_chosen(embedded):
    tokens = embedded.to_tokens("import o")
    generated = embedded.generate(tokens, verbose=False, **OPTIONS)
    text = embedded.generate("import o", return_type="input", **OPTIONS)
    assert torch.equal(embedded.generate("import o", return_type="tokens", **OPTIONS), generated)
    assert embedded.generate(tokens, return_type="str", **OPTIONS) == text == embedded.generate("import o", **OPTIONS)
    assert embedded.generate(tokens.repeat(2, 1), return_type="str", **OPTIONS) == [text, text]
    assert embedded.generate(["import o"], return_type="str", **OPTIONS) == [text]
    streamed = "".join(embedded.generate_stream(tokens, return_type="str", **OPTIONS))
    assert "import o" + streamed == text
    assert torch.cat(list(embedded.generate_stream("import o", return_type="tokens", **OPTIONS)), 1).shape == (1, 6)
    with pytest.raises(
        InvalidArgumentError, match="unknown return_type 'text'\n  expected: 'input' or 'str' or 'tokens'"
    ):
        embedded.generate(tokens, return_type="text")


def test_logits_of_each_step_are_returned(bridge, tokens):
    found = bridge.generate(tokens, output_logits=True, stop_at_eos=False, **OPTIONS)
    expected = bridge(found.sequences[:, :-1])[:, 6:]
    assert torch.allclose(torch.stack(found.logits, 1), expected, atol=1e-4)


def test_strings_stop_a_generation_with_the_bridges_tokenizer(embedded, bridge, tokens):
    text = embedded.generate("import o", max_new_tokens=10, do_sample=False)
    stop = text.removeprefix("import o")[2:5]
    assert len(stop) == 3
    found = embedded.generate("import o", max_new_tokens=10, do_sample=False, stop_strings=stop)
    assert stop in found.removeprefix("import o")
    assert text.startswith(found)
    assert len(found) < len(text)
    assert embedded.generate("import o", stop_strings=[stop], max_new_tokens=10, do_sample=False) == found
    with pytest.raises(NoTokenizerError):
        bridge.generate(tokens, stop_strings="x")
    with pytest.raises(NoTokenizerError):
        bridge.generate(tokens, return_type="str")


class Longer(StoppingCriteria):
    """Stops at a number of tokens."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("given", [Longer(9), [Longer(9)], (Longer(9), Longer(12))])
def test_one_criterion_or_several_stop_a_generation(given, bridge, tokens):
    assert bridge.generate(tokens, stopping_criteria=given, stop_at_eos=False, **OPTIONS).shape[1] == 9


def test_the_number_of_new_tokens_may_come_second(bridge, tokens):
    assert bridge.generate(tokens, 3, stop_at_eos=False).shape == (2, 10)
    assert len(list(bridge.generate_stream(tokens, 3, stop_at_eos=False))) == 3


def test_other_keywords_raise(bridge, tokens):
    with pytest.raises(UnknownArgumentError, match=r"unknown keyword 'stop_at_eoss'\n.*\n  nearest: stop_at_eos"):
        bridge.generate(tokens, stop_at_eoss=True)
    with pytest.raises(UnknownArgumentError, match=r"unknown keyword 'typical_pp'\n.*\n  nearest: typical_p"):
        bridge.generate(tokens, typical_pp=0.5)
    with pytest.raises(UnknownArgumentError, match=r"generate does not take 'device'\n  fix: cache\.to\(device\)"):
        bridge.generate(tokens, device="cpu")
    with pytest.raises(UnknownArgumentError, match=r"fix: bridge\.to_batch\(input\)\.tokens"):
        bridge.generate(tokens, return_input_tokens=True)
    with pytest.raises(InvalidArgumentError, match="verbose=3\n  expected: True or False"):
        bridge.generate(tokens, verbose=3)


def test_texts_are_filled_on_the_left_by_default(embedded):
    texts = ["import o", "def area(self):\n    return"]
    alone = [embedded.generate(text, **OPTIONS) for text in texts]
    assert embedded.generate(texts, padding_side=None, **OPTIONS) == alone
    assert clearspan.boot(embedded.hf_model).tokenizer is None
