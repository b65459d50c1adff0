"""Chat messages go through the tokenizer's template, as transformers' own `apply_chat_template` writes them."""

import pytest
import torch
from tests.vocabularies import CHAT, byte_level
from tests.zoo import build

import clearspan
from clearspan.errors import InputError, InvalidArgumentError, NoTokenizerError

USER, ANSWER = {"role": "user", "content": "The cat"}, {"role": "assistant", "content": "sat on the mat"}
ASKED, ANSWERED = [USER], [USER, ANSWER]
LONG = [{"role": "system", "content": "a dog"}, USER, ANSWER, {"role": "user", "content": "ran to Paris and the cat"}]


def booted(template=CHAT, **settings):
    tokenizer = byte_level()
    tokenizer.chat_template = template
    return clearspan.boot(build("llama", vocab_size=len(tokenizer), **settings), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def bridge():
    return booted(max_position_embeddings=256)


def ids(bridge, messages, **settings):
    """What transformers gives."""
    return bridge.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **settings)


@pytest.mark.parametrize("messages", [ASKED, LONG])
def test_an_answer_is_asked_for(bridge, messages):
    expected = ids(bridge, messages, add_generation_prompt=True)
    assert expected[0] == bridge.tokenizer.bos_token_id != expected[1]  # the template's BOS is the only one
    assert bridge.to_tokens(messages).tolist() == bridge.to_batch(messages).tokens.tolist() == [expected]
    assert bridge.to_batch({"messages": messages}).tokens.tolist() == [expected]
    assert bridge.to_batch([{"messages": messages}]).tokens.tolist() == [expected]
    assert bridge.to_tokens(tuple(messages), prepend_bos=True).tolist() == [expected]
    assert bridge.to_tokens(messages, prepend_bos=False).tolist() == [expected]
    assert "".join(bridge.to_str_tokens(messages)) == bridge.to_string(torch.tensor(expected))
    assert torch.equal(bridge(messages), bridge(torch.tensor([expected])))
    without = bridge.to_tokens(messages, add_generation_prompt=False).tolist()
    assert without == [ids(bridge, messages, add_generation_prompt=False)] != [expected]


def test_after_an_answer_nothing_follows(bridge):
    expected = ids(bridge, ANSWERED, add_generation_prompt=False)
    assert bridge.to_tokens(ANSWERED).tolist() == bridge.to_batch(ANSWERED).tokens.tolist() == [expected]
    prompted = bridge.to_tokens(ANSWERED, add_generation_prompt=True).tolist()
    assert prompted == [ids(bridge, ANSWERED, add_generation_prompt=True)]
    continued = [ids(bridge, ANSWERED, continue_final_message=True)]
    assert bridge.to_tokens(ANSWERED, continue_final_message=True).tolist() == continued
    assert bridge.to_batch(ANSWERED, continue_final_message=None).tokens.tolist() == continued
    assert bridge.to_tokens(ASKED, continue_final_message=None).tolist() == bridge.to_tokens(ASKED).tolist()
    with pytest.raises(InvalidArgumentError, match="a last message that is continued has no answer after it"):
        bridge.to_tokens(ASKED, add_generation_prompt=True, continue_final_message=True)


def test_generation_answers_and_continues_an_answer(bridge):
    settings = {"max_new_tokens": 3, "do_sample": False}
    tokens = bridge.hf_model.generate(torch.tensor([ids(bridge, ASKED, add_generation_prompt=True)]), **settings)
    text = bridge.tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
    assert bridge.generate(ASKED, **settings) == text
    streamed = "".join(bridge.generate_stream(ASKED, **settings))
    start = bridge.tokenizer.decode(ids(bridge, ASKED, add_generation_prompt=True), skip_special_tokens=True)
    assert text == start + streamed
    continued = torch.tensor([ids(bridge, ANSWERED, continue_final_message=True)])
    tokens = bridge.hf_model.generate(continued, **settings)
    assert bridge.generate(ANSWERED, **settings) == bridge.text.without_special(tokens)[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_several_conversations_are_rows(bridge, side):
    batch = bridge.to_batch([ASKED, LONG, ANSWERED], padding_side=side)
    expected = [ids(bridge, one, add_generation_prompt=one is not ANSWERED) for one in (ASKED, LONG, ANSWERED)]
    rows = [row[list(real)].tolist() for row, real in zip(batch.tokens, batch.real_columns, strict=True)]
    assert rows == expected
    assert torch.equal(bridge.to_tokens([ASKED, LONG, ANSWERED], padding_side=side), batch.tokens)
    assert bridge.to_batch([{"messages": one} for one in (ASKED, LONG, ANSWERED)]).lengths.tolist() == [
        *map(len, expected)
    ]
    assert [len(row) for row in bridge.to_str_tokens([ASKED, LONG, ANSWERED])] == [*map(len, expected)]
    assert isinstance(bridge.generate([ASKED, LONG], max_new_tokens=1), list)


def test_a_bos_that_the_template_does_not_put_is_put_when_asked_for():
    bridge = booted(CHAT.replace("{{ bos_token }}", ""))
    plain = ids(bridge, ASKED, add_generation_prompt=True)
    assert bridge.to_tokens(ASKED).tolist() == [plain]
    assert bridge.to_tokens(ASKED, prepend_bos=True).tolist() == [[bridge.tokenizer.bos_token_id, *plain]]


def test_without_a_template_or_a_tokenizer_the_error_says_so(bridge):
    without = booted(None)
    for call in (without, without.to_tokens, without.to_batch, without.generate, without.run_with_cache):
        with pytest.raises(InputError) as error:
            call(ASKED)
        assert str(error.value).splitlines() == [
            "the tokenizer has no chat template",
            "  where: TokenizersBackend",
            "  reason: it is a base model's, or the template was not saved with it",
            "  fix: bridge.tokenizer.chat_template = ..., or pass text",
        ]
    with pytest.raises(NoTokenizerError):
        clearspan.boot(build("llama"))(ASKED)


def test_what_the_template_refuses_raises_with_its_reason(bridge):
    refusing = "{% if messages[0].role != 'user' %}{{ raise_exception('the first is not the user') }}{% endif %}"
    with pytest.raises(InputError) as error:
        booted(refusing + CHAT).to_tokens([ANSWER])
    assert str(error.value).splitlines() == [
        "the tokenizer's chat template cannot write these messages",
        "  expected: messages with a role and content, in the order that the template allows",
        f"  got: {[ANSWER]!r}",
        "  reason: the first is not the user",
    ]
    for wrong in ([USER, "text"], [USER, None], [[USER], "text"], [[USER], []], [[USER], [3]]):
        for call in (bridge.to_tokens, bridge.to_batch):
            with pytest.raises(InputError):
                call(wrong)
    with pytest.raises(InputError, match="the chat template makes an empty text"):
        booted("{{ '' }}").to_tokens(ASKED)


def test_a_row_of_a_data_set_that_has_a_role_is_no_message(bridge):
    row = {"text": "The cat", "role": "a column"}
    assert torch.equal(bridge.to_batch([row, row]).tokens, bridge.to_tokens(["The cat"] * 2))
