import random

import pytest
import torch
from tests.zoo import build
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import clearspan
from clearspan.analysis import evaluate_ioi, ioi_prompts
from clearspan.analysis.ioi import NAMES, TEMPLATES, WORDS
from clearspan.errors import InvalidArgumentError, NoTokenizerError

SHORT = ["After {first} and {second} left , {again} gave the {object} to", "So {first} met {second} and {again} told"]
PEOPLE = ["Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace"]
THINGS = {"object": ["book", "old book", "very old book"]}


def words_of(*parts):
    return [word for part in parts for word in pre_tokenizers.Whitespace().pre_tokenize_str(part)]


def tokenizer_of(vocabulary, pre_tokenizer, **special):
    ids = {word: number for number, word in enumerate(["<unk>", "<s>", *dict.fromkeys(vocabulary)])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", **special)


def word_tokenizer(**special):
    """Every word and mark is a token, known without the space before it."""
    blank = {"first": "", "second": "", "again": "", "place": "", "object": ""}
    texts = [template.format(**blank) for template in (*TEMPLATES, *SHORT)]
    words = [word for word, _ in words_of(*texts, "very old and", *NAMES, *PEOPLE, *WORDS["place"], *WORDS["object"])]
    return tokenizer_of(words, pre_tokenizers.Whitespace(), **special)


def spaced_tokenizer():
    """As SentencePiece has it: a space belongs to the word after it, and one is put before the text."""
    text = " ".join([*SHORT, *PEOPLE, "very old book"])
    words = [f"▁{word}" for word in text.split() if "{" not in word]
    return tokenizer_of(words, pre_tokenizers.Metaspace(prepend_scheme="always"))


def bridge_of(variant, tokenizer):
    return clearspan.boot(build(variant, vocab_size=len(tokenizer)), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def worded():
    return bridge_of("gpt_bigcode", word_tokenizer())


@pytest.fixture(scope="module", params=["words", "spaced"])
def either(request):
    return bridge_of("llama", word_tokenizer() if request.param == "words" else spaced_tokenizer())


def real(batch, row):
    return batch.ids[row, list(batch.real_columns[row])]


def named(bridge, tokens):
    return [bridge.to_string(token).strip().removeprefix("▁") for token in tokens]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("corruption", ["abc", "swapped"])
def test_names_stand_where_it_is_said_in_padded_prompts(either, side, corruption):
    prompts = ioi_prompts(
        either, 40, templates=SHORT, names=PEOPLE, words=THINGS, corruption=corruption, padding_side=side
    )
    assert len(prompts) == 40
    assert 0 < prompts.clean.lengths.sum() < prompts.clean.ids.numel()
    for row, text in enumerate(prompts.texts):
        alone, own = either.to_tokens(text)[0], real(prompts.clean, row)
        assert torch.equal(own, alone)
        people = [word for word in text.split() if word in PEOPLE]
        subject = people[2]
        io = people[1] if people[0] == subject else people[0]
        assert prompts.orders[row] == ("ABBA" if people[0] == io else "BABA")
        assert named(either, [prompts.io[row], prompts.subject[row]]) == [io, subject]
        at = {role: int(column[row]) for role, column in prompts.positions.items()}
        assert named(either, own[[at["io"], at["s1"], at["s2"]]]) == [io, subject, subject]
        assert at["s1"] < at["s2"] < at["end"]
        assert at["end"] == len(alone) - 1
        other = real(prompts.corrupted, row)
        assert torch.equal(other, either.to_tokens(prompts.corrupted.texts[row])[0])
        changed = (other != own).nonzero()[:, 0].tolist()
        if corruption == "abc":
            assert changed == sorted([at["io"], at["s1"], at["s2"]])
            assert len({io, subject, *named(either, other[changed])}) == 5
        else:
            assert changed == [at["s2"]]
            assert other[at["s2"]] == prompts.io[row]
    assert set(prompts.orders) == {"ABBA", "BABA"}
    assert set(prompts.templates) == {0, 1}
    assert prompts.names == tuple(PEOPLE)


def test_groups_are_aligned_and_together_all_prompts(worded):
    prompts = ioi_prompts(worded, 60, templates=SHORT, names=PEOPLE, words=THINGS, padding_side="left")
    groups = prompts.aligned()
    assert sorted(text for group in groups for text in group.texts) == sorted(prompts.texts)
    assert len(groups) == 2 * (3 + 1)
    for group in groups:
        assert not group.clean.is_padded
        for column in group.positions.values():
            assert (column == column[0]).all()
        for row, text in enumerate(group.texts):
            assert torch.equal(group.clean.ids[row], worded.to_tokens(text)[0])
            assert torch.equal(group.corrupted.ids[row], worded.to_tokens(group.corrupted.texts[row])[0])
            assert group.clean.ids[row, group.positions["io"][row]] == group.io[row]


def test_prompts_of_one_length_with_names_elsewhere_are_not_aligned(worded):
    words = {"who": ["old", "very old"], "object": ["book", "old book"]}
    template = ["So the {who} {first} met {second} at the {object} and {again} told"]
    groups = ioi_prompts(worded, 60, templates=template, words=words, orders=["ABBA"]).aligned()
    lengths = [(group.clean.width, group.positions["io"].unique().tolist()) for group in groups]
    assert sorted(lengths) == [(13, [4]), (14, [4]), (14, [5]), (15, [5])]


def test_the_seed_alone_says_what_is_drawn(worded):
    random.seed(3)
    torch.manual_seed(3)
    states = random.getstate(), torch.get_rng_state()
    first, again, other = (ioi_prompts(worded, 20, seed=seed) for seed in (1, 1, 2))
    assert first.texts == again.texts
    assert torch.equal(first.corrupted.ids, again.corrupted.ids)
    assert first.texts != other.texts
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_one_order_alone(worded, order):
    prompts = ioi_prompts(worded, 10, orders=[order])
    assert set(prompts.orders) == {order}
    assert bool((prompts.positions["io"] < prompts.positions["s1"]).all()) == (order == "ABBA")


def test_every_default_template_name_and_word_fits(worded):
    prompts = ioi_prompts(worded, 400)
    assert set(prompts.templates) == set(range(len(TEMPLATES)))
    assert prompts.names == NAMES
    assert len(prompts.aligned()) == 2 * len(TEMPLATES)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gpt_bigcode", "llama", "gemma2", "mixtral", "bloom"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_prompt_is_measured_as_it_is_alone(variant, side):
    bridge = bridge_of(variant, word_tokenizer())
    prompts = ioi_prompts(bridge, 12, templates=SHORT, names=PEOPLE, words=THINGS, padding_side=side)
    found = evaluate_ioi(bridge, prompts, batch_size=5)
    for row, text in enumerate(prompts.texts):
        logits = bridge.hf_model(bridge.to_tokens(text)).logits[0, -1]
        io, subject = prompts.io[row], prompts.subject[row]
        close = {"rtol": 1e-3, "atol": 1e-3}  # padded and alone, in float32, logits up to 100
        torch.testing.assert_close(found.logit_differences[row], logits[io] - logits[subject], **close)
        torch.testing.assert_close(found.io_probs[row], logits.softmax(-1)[io], **close)
        torch.testing.assert_close(found.subject_probs[row], logits.softmax(-1)[subject], **close)
        assert found.io_ranks[row] == (logits.argsort(descending=True) == io).nonzero().item()
    whole = prompts.metric(bridge(prompts.clean), prompts.clean)
    torch.testing.assert_close(whole, found.logit_differences, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("knows", [True, False])
def test_a_model_that_always_says_one_of_the_names(worded, knows):
    prompts = ioi_prompts(worded, 8)
    rows, columns, _ = prompts.clean.places(-1)

    def say(logits, hook):
        logits.zero_()
        logits[rows, columns, prompts.io] = 5.0 if knows else 2.0
        logits[rows, columns, prompts.subject] = 2.0 if knows else 5.0

    with worded.hooks(fwd_hooks=[("hook_logits", say)]):
        found = evaluate_ioi(worded, prompts)
    sign = 1 if knows else -1
    assert (found.accuracy.mean, found.accuracy.error) == (float(knows), 0)
    assert found.top_accuracy.mean == float(knows)
    assert found.logit_difference.mean == 3 * sign
    five, two = torch.tensor([5.0, 2.0]).exp()
    expected = sign * (five - two) / (five + two + worded.cfg.d_vocab - 2)
    assert found.probability_difference.mean == pytest.approx(expected.item())
    assert found.probability_difference.error < 1e-7
    assert found.io_ranks.tolist() == [0 if knows else 1] * 8


def test_equal_logits_are_not_accurate(worded):
    with worded.hooks(fwd_hooks=[("hook_logits", lambda logits, hook: torch.zeros_like(logits))]):
        found = evaluate_ioi(worded, count=4)
    assert found.accuracy.mean == 0
    assert found.logit_difference.mean == 0


def test_half_precision_is_read_in_float32(worded):
    bridge = clearspan.boot(build("llama", vocab_size=worded.cfg.d_vocab).bfloat16(), tokenizer=worded.tokenizer)
    found = evaluate_ioi(bridge, count=4)
    assert found.logit_differences.dtype == found.io_probs.dtype == torch.float32


def test_means_have_standard_errors(worded):
    found = evaluate_ioi(worded, count=30, seed=4)
    values = found.logit_differences.double()
    assert found.logit_difference.mean == pytest.approx(values.mean().item())
    assert found.logit_difference.error == pytest.approx(values.std().item() / 30**0.5)
    assert found.accuracy.rows == 30
    alone = evaluate_ioi(worded, count=1)
    assert str(alone.logit_difference) == f"{alone.logit_differences.item():.3f}"
    assert "1 prompt, " in alone.title


def test_it_prints_and_plots(worded):
    found = evaluate_ioi(worded, ioi_prompts(worded, 12, templates=SHORT, names=PEOPLE, words=THINGS, seed=1))
    assert found.title == (
        f"indirect object identification: logit difference {found.logit_difference}, probability difference "
        f"{found.probability_difference}, accuracy {found.accuracy}, likeliest of all {found.top_accuracy}; 12 "
        "prompts, ± standard error"
    )
    table = found.to_dataframe()
    assert table["prompt"].tolist() == list(found.prompts.texts)
    means = table.groupby(["template", "order"])["logit difference"].mean()
    (heat,) = found.plot().data
    for row, template in enumerate(heat.y):
        for column, order in enumerate(heat.x):
            assert heat.z[row][column] == pytest.approx(means[int(template), order], abs=1e-3)


def test_the_embedded_model_takes_names_of_its_own(embedded):
    code = ["def f(self, {first}, {second}):\n    return {again} +"]
    prompts = ioi_prompts(embedded, 10, templates=code, names=["x", "y", "key", "Mary", "left", "right"])
    assert prompts.names == ("x", "y", "key", "left", "right")
    assert not prompts.clean.is_padded
    found = evaluate_ioi(embedded, prompts)
    assert found.top_accuracy.mean > 0
    assert found.to_dataframe()["prompt"][0].startswith("def f(self, ")


def test_too_few_single_tokens(embedded, worded):
    with pytest.raises(InvalidArgumentError) as error:
        ioi_prompts(embedded, names=["x", "Mary", "Bartholomew", "y"])
    assert str(error.value) == (
        "too few names are single tokens\n"
        "  expected: at least 5 different names that are one token after a space\n  got: 2 of 4: x, y\n"
        "  where: the tokenizer of tiny-bigcode\n  fix: ioi_prompts(bridge, names=[...]) with words of its vocabulary"
    )
    with pytest.raises(InvalidArgumentError, match=r"at least 2 different names .*\n  got: 0 of 52\n"):
        ioi_prompts(embedded, corruption="swapped")
    assert ioi_prompts(worded, 2, names=["Anna", "Ben"], corruption="swapped").names == ("Anna", "Ben")
    with pytest.raises(InvalidArgumentError, match="too few names"):  # words that the tokenizer does not know
        ioi_prompts(worded, names=["Anna", "Ben", "Clara", "David", "Xaver"])


def test_names_with_one_id_count_once(worded):
    names = ["Anna", "Anna", "Ben", "Anna Ben"]
    assert ioi_prompts(worded, 2, names=names, corruption="swapped").names == ("Anna", "Ben")


PEOPLE_ONCE = "{first}, {second} and {again}, once each and in this order"
SPACE = "a space before each person, as names are single tokens after a space"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("So {first} and {second} left", PEOPLE_ONCE),
        ("So {first} and {second}, {again} and {again}", PEOPLE_ONCE),
        ("So {again} saw {first} and {second}", PEOPLE_ONCE),
        ("{first} saw {second} and {again}", SPACE),
        ("So ({first} saw {second} and {again}", SPACE),
        ("So {first} saw {second} and {again} a {ship}", "no gaps but the people and place, object"),
        ("So {first} saw {second} and {again} to ", "no space at the end, where the answer brings its own"),
    ],
)
def test_templates_that_do_not_fit(worded, template, expected):
    with pytest.raises(InvalidArgumentError) as error:
        ioi_prompts(worded, templates=[TEMPLATES[0], template])
    assert str(error.value) == (f"the template does not fit the task\n  expected: {expected}\n  got: {template!r}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0}, "count=0\n  expected: a whole number, count >= 1"),
        ({"corruption": "noise"}, "unknown corruption 'noise'\n  expected: 'abc' or 'swapped'"),
        ({"orders": ["AABB"]}, "unknown orders ['AABB']\n  expected: ['ABBA'], ['BABA'] or both"),
        ({"orders": "ABBA"}, "unknown orders 'ABBA'\n  expected: ['ABBA'], ['BABA'] or both"),
        ({"templates": []}, "there is no template\n  expected: a list of sentences\n  got: []"),
        (
            {"templates": ["So {first"]},
            "cannot read the template 'So {first'\n  reason: expected '}' before end of string",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said(worded, given, message):
    with pytest.raises(InvalidArgumentError) as error:
        ioi_prompts(worded, **given)
    assert str(error.value) == message


def test_a_name_that_is_another_token_in_the_prompt_is_said(worded):
    with pytest.raises(InvalidArgumentError) as error:
        ioi_prompts(worded, 1, templates=["So {first} met {second}s and {again} told"], orders=["ABBA"])
    assert str(error.value).startswith(
        "the names are not single tokens where they stand in a prompt\n"
        "  expected: the indirect object once, the subject twice\n  got: 1 and 1 times\n  where: 'So "
    )
    template = "So {first} met {second} , {friend} and {again} told"
    with pytest.raises(InvalidArgumentError, match=r"got: (2 and 2|1 and 3) times"):
        ioi_prompts(
            worded, 1, templates=[template], names=["Anna", "Ben"], words={"friend": ["Ben"]}, corruption="swapped"
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_name(side):
    bridge = bridge_of("llama", word_tokenizer(pad_token="Anna"))
    prompts = ioi_prompts(bridge, 20, templates=SHORT, names=PEOPLE, words=THINGS, padding_side=side)
    assert "Anna" in prompts.names
    assert prompts.clean.is_padded
    for role in ("io", "s1"):
        for row, position in enumerate(prompts.positions[role].tolist()):
            assert position < prompts.clean.lengths[row]
            assert real(prompts.clean, row)[position] == (prompts.io if role == "io" else prompts.subject)[row]


@pytest.mark.parametrize("written", ["Ben told", "Ben"])
def test_corrupted_prompts_of_other_tokens_are_said(written):
    """A tokenizer to which "Ben met" is another word, or one less: the name changes more than its own token."""
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("Ben met", written)
    with pytest.raises(InvalidArgumentError) as error:
        ioi_prompts(bridge_of("llama", tokenizer), 20, templates=SHORT[1:], names=PEOPLE)
    assert str(error.value).startswith(
        "a corrupted prompt is not the prompt with other names, token by token\n"
        "  expected: names that change no token but their own\n  where: 'So "
    )


def test_without_a_tokenizer_it_raises(make_bridge):
    with pytest.raises(NoTokenizerError):
        evaluate_ioi(make_bridge())
    with pytest.raises(InvalidArgumentError, match="batch_size=0"):
        evaluate_ioi(make_bridge(), batch_size=0)
