"""Questions with answers to choose from: log-probabilities are those of one forward for each answer."""

import pytest
import torch

import clearspan
from clearspan.analysis import evaluate_choices, read_dataset
from clearspan.errors import InputError, InvalidArgumentError

PROMPTS = ["def area(self):\n    return", "for i in", "import os\nimport"]
CHOICES = [[" self.width", " range(3)"], [" range(3)", " self", "\n"], [" sys", " self, key"]]


@pytest.fixture(scope="module")
def bridge():
    return clearspan.boot("tiny-bigcode")


@torch.no_grad()
def test_log_probabilities_are_those_of_one_forward_for_each_answer(bridge):
    found = evaluate_choices(bridge, PROMPTS, CHOICES, [0, 0, 1], batch_size=3)
    for row, (prompt, few) in enumerate(zip(PROMPTS, CHOICES, strict=True)):
        asked = bridge.to_tokens(prompt)
        for column, choice in enumerate(few):
            answer = bridge.to_tokens(choice, prepend_bos=False)
            log_probs = bridge(torch.cat([asked, answer], 1))[0].log_softmax(-1)
            steps = range(asked.shape[1] - 1, asked.shape[1] + answer.shape[1] - 1)
            expected = sum(log_probs[step, token] for step, token in zip(steps, answer[0], strict=True))
            torch.testing.assert_close(found.log_probs[row, column].float(), expected, rtol=1e-4, atol=1e-4)
            assert found.token_counts[row, column] == answer.shape[1]
    assert found.log_probs.isnan().tolist() == [[False, False, True], [False, False, False], [False, False, True]]
    assert found.predicted[0] == 0
    assert found.accuracy.mean == (found.predicted == torch.tensor([0, 0, 1])).double().mean()
    assert found.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)


def test_the_mean_over_tokens_is_another_accuracy(bridge):
    right = evaluate_choices(bridge, ["x ="], [["\n", " self.width * self.height"]], [1])
    assert right.log_probs[0, 0] > right.log_probs[0, 1]
    assert (right.accuracy.mean, right.accuracy_by_token.mean) == (0.0, 1.0)


def test_it_takes_columns_of_a_data_set(bridge):
    rows = [{"text": prompt, "choices": few, "answer": 0} for prompt, few in zip(PROMPTS, CHOICES, strict=True)]
    data = read_dataset(rows)
    found = evaluate_choices(bridge, data["text"], data["choices"], data["answer"])
    assert found.to_dataframe()["right"].tolist() == [few[0] for few in CHOICES]
    assert found.plot().data[0].y == ("0", "1", "2")
    assert str(found).startswith("accuracy ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, r"prompts=\[\]"),
        ({"prompts": "x"}, "prompts='x'"),
        ({"choices": [" a"]}, "of two or more"),
        ({"choices": [[" a", " b"]] * 2}, r"choices are the same.*\n  expected: 3 times several texts\n  got: 2"),
        ({"choices": [[" a", 3]] * 3}, "choices="),
        ({"answers": [0, 1]}, r"answers are numbers of the right choices, from 0\n  expected: 3 numbers"),
        ({"answers": [0, 0, 2]}, "each less than its choices"),
        ({"answers": ["A", "B", "A"]}, "answers are numbers"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)  # fmt: skip
def test_wrong_arguments(bridge, settings, message):
    given = {"prompts": PROMPTS, "choices": [" a", " b"], "answers": [0, 1, 0], **settings}
    with pytest.raises(InvalidArgumentError, match=message):
        evaluate_choices(bridge, **given)


def test_an_empty_answer_is_named(bridge):
    with pytest.raises(InputError, match=r"no tokens|empty"):
        evaluate_choices(bridge, ["x"], ["", " a"], [0])
