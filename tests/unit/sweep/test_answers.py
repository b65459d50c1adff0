"""Answers of several tokens: their log-probability by one run is that of the plain model, token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.zoo import build

import clearspan
from clearspan import Sweep, grid
from clearspan.analysis import direct_logit_attribution, lens_readings
from clearspan.circuits import attribution_patch
from clearspan.errors import InputError, InvalidArgumentError, NoTokenizerError
from clearspan.interventions import Patch, Zero
from clearspan.patching import activation_patching
from clearspan.sweep import AnswerLogProbability, LogitDifference, answered
from clearspan.sweep.metrics import parse_metric

IDS = st.integers(0, 96)
ANSWER = st.lists(IDS, min_size=1, max_size=4)
ROWS = st.lists(st.tuples(st.lists(IDS, min_size=1, max_size=5), ANSWER), min_size=1, max_size=4)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def plain(request):
    return clearspan.boot(build(request.param))


@torch.no_grad()
def by_hand(model, prompt, answer):
    """The log-probability of an answer, one token at a time, by the Hugging Face model alone."""
    total, ids = 0.0, list(prompt)
    for token in answer:
        total += model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
        ids.append(token)
    return total


@settings(max_examples=20)
@given(rows=ROWS, side=st.sampled_from(["left", "right"]))
@torch.no_grad()
def test_the_metric_is_the_sum_that_the_plain_model_gives(plain, rows, side):
    prompts, answers = zip(*rows, strict=True)
    batch, metric = answered(plain, list(prompts), list(answers), padding_side=side)
    expected = [by_hand(plain.hf_model, *row) for row in rows]
    assert metric(plain(batch), batch).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    swept = Sweep(plain, batch, grid("z", Zero(), layer=[0], head=[0]), metric).run(progress=False)
    assert swept.base["answer_log_probability"].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_cell_of_a_sweep_is_a_run_with_its_intervention(plain, side):
    batch, metric = answered(plain, [[5, 9, 30], [7]], [[4, 8, 8], [11]], padding_side=side)
    cells = grid("resid_pre", Patch("other"), layer=range(3), position=[0, -1])
    source, _ = answered(plain, [[6, 1, 2], [3]], [[4, 8, 8], [11]], padding_side="right")
    found = Sweep(plain, batch, cells, metric, sources={"other": source}).run(progress=False)
    for number, cell in enumerate(cells.cells):
        logits = plain(batch, interventions=cell, sources={"other": source})
        torch.testing.assert_close(
            found.of().flatten(0, -2)[number].float(), metric(logits, batch), rtol=1e-4, atol=1e-4
        )


def test_text_is_encoded_apart_and_without_a_bos(embedded):
    batch, metric = answered(embedded, ["import os", "def area(self):"], ["\nimport sys", " pass"])
    ids = [embedded.to_tokens(one, prepend_bos=False)[0].tolist() for one in ("\nimport sys", " pass")]
    assert metric.answers == tuple(map(tuple, ids))
    for row, (prompt, answer) in enumerate(zip(("import os", "def area(self):"), ids, strict=True)):
        real = batch.tokens[row, list(batch.real_columns[row])].tolist()
        assert real == [*embedded.to_tokens(prompt)[0].tolist(), *answer]
    same, one = answered(embedded, ["import os", "def area(self):"], " pass")
    assert one.answers == (tuple(ids[1]),)
    assert one(embedded(same), same).shape == (2,)


def test_answers_are_measured_in_patching_and_by_gradients(embedded):
    (clean, metric), (corrupted, _) = (answered(embedded, one, "\nimport sys") for one in ("import os", "import re"))
    patched = activation_patching(embedded, clean, corrupted, metric, progress=False)
    assert patched.units == {"answer_log_probability": "nats"}
    scores = attribution_patch(embedded, clean, corrupted, metric, layers=[0])
    assert all(values.isfinite().all() for values in scores.values.values())


def test_it_comes_back_from_json():
    metric = AnswerLogProbability(((5, 9), (3,)))
    assert parse_metric(metric.to_json()) == metric
    assert parse_metric({"kind": "answer_log_probability", "answers": [[5, 9], [3]]}) == metric


def test_rows_that_do_not_end_with_their_answer_raise(plain):
    batch, metric = answered(plain, [[5, 9]], [[4, 8]])
    with pytest.raises(InvalidArgumentError) as error:
        metric(plain([[5, 9, 8, 4]]), plain.to_batch([[5, 9, 8, 4]]))
    assert str(error.value).splitlines() == [
        "row 0 is not a prompt with its answer behind it",
        "  expected: one token or more, then [4, 8]",
        "  got: 4 tokens, the last of them [8, 4]",
        "  fix: batch, metric = clearspan.sweep.answered(bridge, prompts, answers)",
    ]
    with pytest.raises(InvalidArgumentError, match="row 0 is not a prompt"):
        metric(plain([[4, 8]]), plain.to_batch([[4, 8]]))
    with pytest.raises(InvalidArgumentError, match="answers are not one for each row"):
        AnswerLogProbability(((1,), (2,)))(plain(batch), batch)
    for wrong in ((), ((),), 5, "answer", ((0.5,),)):
        with pytest.raises(InvalidArgumentError, match="a tuple of token ids for each row"):
            AnswerLogProbability(wrong)


def test_what_is_no_answer_raises(plain, embedded):
    with pytest.raises(NoTokenizerError):
        answered(plain, [[5, 9]], " text")
    for wrong in ([], [[]], 97, -1, [[5, 97]], None, 0.5, [None]):
        with pytest.raises(InvalidArgumentError):
            answered(plain, [[5, 9]], wrong)
    with pytest.raises(InvalidArgumentError, match="answers are one for all rows, or one for each"):
        answered(plain, [[5, 9]], [1, 2])
    with pytest.raises(InputError, match="this needs token ids"):
        answered(plain, torch.zeros(1, 2, 48), 5)
    with pytest.raises(InputError, match="an empty string has no tokens"):
        answered(embedded, "import os", "")


ONE_TOKEN = {
    "correct": lambda bridge, text: LogitDifference.between(bridge, text),
    "incorrect": lambda bridge, text: LogitDifference.between(bridge, " os", [text]),
    "answer_tokens": lambda bridge, text: direct_logit_attribution(bridge, "import", text),
    "incorrect_tokens": lambda bridge, text: direct_logit_attribution(bridge, "import", " os", [text]),
    "targets": lambda bridge, text: lens_readings(bridge, "import", targets=text),
    "tokens": lambda bridge, text: bridge.run_with_cache("import")[1].logit_attrs(torch.zeros(1, 1, 2, 256), text),
}


@pytest.mark.parametrize("name", ONE_TOKEN)
def test_where_one_token_is_needed_an_answer_of_several_names_them_and_the_fix(embedded, name):
    ids = embedded.to_tokens("\nimport sys", prepend_bos=False)[0].tolist()
    with pytest.raises(InputError) as error:
        ONE_TOKEN[name](embedded, "\nimport sys")
    assert str(error.value).splitlines()[:4] == [
        "'\\nimport sys' is not a single token",
        "  expected: one token",
        f"  got: {len(ids)}: {embedded.to_str_tokens(ids)}, ids {ids}",
        f"  fix: {ids[0]} for its first token alone; clearspan.sweep.answered(bridge, prompts, answers) for the "
        "log-probability of all its tokens",
    ]
    assert str(error.value).splitlines()[4:] == ([] if name == "tokens" else [f"  argument: {name}"])
