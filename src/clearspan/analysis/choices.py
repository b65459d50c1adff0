"""Questions with several answers to choose from: which one a model holds to be the likeliest."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.evaluations import Estimate, estimate
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, wholes
from clearspan.errors import InvalidArgumentError
from clearspan.model import check_bridge
from clearspan.modes import no_grad
from clearspan.plots import HeatMap
from clearspan.progress import Progress, shown, told
from clearspan.results import Columns, Result, counted
from clearspan.sweep.answers import answered


@dataclass(frozen=True, eq=False, repr=False)
class ChoiceEvaluation(Result):
    """How likely a model holds each answer of each question to be, on the CPU.

    Attributes:
        log_probs: `log p(answer | prompt)` in nats, all tokens of an answer together; NaN where a question has fewer.
        token_counts: Tokens of each answer; 0 where a question has fewer.
        right: Number of the right answer of each question, from 0.
        choices: The answers.
    """

    log_probs: Float[Tensor, "question choice"]
    token_counts: Int[Tensor, "question choice"]
    right: Int[Tensor, "question"]
    choices: tuple[tuple[str, ...], ...]

    @property
    def predicted(self) -> Int[Tensor, "question"]:
        """Number of each question's likeliest answer."""
        return self.log_probs.nan_to_num(-torch.inf).argmax(-1)

    @property
    def accuracy(self) -> Estimate:
        """Share of questions whose right answer is the likeliest."""
        return estimate((self.predicted == self.right).double())

    @property
    def accuracy_by_token(self) -> Estimate:
        """The same by the mean over an answer's tokens, where longer answers are not at a disadvantage."""
        means = (self.log_probs / self.token_counts).nan_to_num(-torch.inf)
        return estimate((means.argmax(-1) == self.right).double())

    @property
    def chance(self) -> float:
        """Share of questions that a random choice would get right."""
        return (1 / (self.token_counts > 0).sum(-1).double()).mean().item()

    @property
    def title(self) -> str:
        """The accuracy, with its standard error, and that of chance."""
        return (
            f"accuracy {self.accuracy} on {counted(len(self.right), 'question')}, {self.accuracy_by_token} by the mean "
            f"over tokens; chance {self.chance:z.3f}"
        )

    def columns(self) -> Columns:
        """Returns one row for each question."""
        rows = torch.arange(len(self.right))
        return {
            "question": rows.tolist(),
            "predicts": [few[one] for few, one in zip(self.choices, self.predicted.tolist(), strict=True)],
            "right": [few[one] for few, one in zip(self.choices, self.right.tolist(), strict=True)],
            "log p(right)": self.log_probs[rows, self.right].tolist(),
            "log p(likeliest)": self.log_probs[rows, self.predicted].tolist(),
        }

    def chart(self) -> HeatMap:
        """Returns a grid: questions down, answers by number, and what each is likelier by than the question's mean."""
        relative = self.log_probs - self.log_probs.nanmean(-1, keepdim=True)
        return HeatMap(
            relative,
            [str(number) for number in range(self.log_probs.shape[1])],
            [str(number) for number in range(len(self.right))],
            "answer",
            "question",
            "nats above the question's mean",
            self.title,
        )


@no_grad
def evaluate_choices(
    bridge: TransformerBridge,
    prompts: Sequence[str],
    choices: Sequence[str] | Sequence[Sequence[str]],
    answers: Sequence[int],
    *,
    batch_size: int = 16,
    progress: bool | Progress = True,
) -> ChoiceEvaluation:
    r"""Returns how often the right one of several answers is the likeliest continuation of a prompt.

    Prompts and answers are texts that you form, such as from columns of `read_dataset`. Answers are encoded apart from
    their prompts, and start with a space where one stands between them.

    Args:
        bridge: The model. Hooks that are on it count.
        prompts: One for each question.
        choices: Answers to choose from: the same for all questions (`[" A", " B", " C", " D"]`), or some for each.
        answers: Number of the right answer of each question, from 0.
        batch_size: Prompts with an answer run at a time.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, total)`.

    Raises:
        InvalidArgumentError: No prompts, not as many answers, fewer than two to choose from, or a number of none.
        InputError: An answer without tokens, or unknown to the tokenizer.
        NoTokenizerError: The bridge has no tokenizer.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> prompts = ["def f(self):\n    return", "import os\nimport"]
        >>> found = evaluate_choices(bridge, prompts, [" sys", " self"], [1, 0])
        >>> found.accuracy.mean, found.chance
        (1.0, 0.5)

    References:
        Hendrycks et al. (2021), "Measuring Massive Multitask Language Understanding", arXiv:2009.03300, has letters as
        answers. TransformerLens's `mmlu_eval` compares the letters' log-probabilities after one prompt of its own.
    """
    check_bridge(bridge)
    check_counts(batch_size=batch_size)
    _ = bridge.text.tokenizer  # raises without one: answers are texts
    texts, right = _texts("prompts", prompts), wholes(answers)
    given = list(choices) if isinstance(choices, list | tuple) else []
    are_shared = all(isinstance(one, str) for one in given)
    several = [_texts("choices", given)] * len(texts) if are_shared else [_texts("choices", few) for few in given]
    if len(several) != len(texts) or not all(len(few) > 1 for few in several):
        raise InvalidArgumentError(
            "choices are the same for all prompts, or some for each, of two or more",
            expected=f"{len(texts)} times several texts",
            got=f"{len(given)}: {given!r}"[:80],
        )
    counts = [len(few) for few in several]
    if (
        right is None
        or len(right) != len(counts)
        or not all(0 <= one < count for one, count in zip(right, counts, strict=True))
    ):
        raise InvalidArgumentError(
            "answers are numbers of the right choices, from 0",
            expected=f"{len(texts)} numbers, each less than its choices",
            got=repr(answers)[:80],
        )
    pairs = [(row, column) for row, few in enumerate(several) for column in range(len(few))]
    log_probs = torch.full((len(texts), max(map(len, several))), torch.nan, dtype=torch.float64)
    token_counts = torch.zeros(log_probs.shape, dtype=torch.long)
    with shown(progress) as tell:
        for start in told(tell, "answers", range(0, len(pairs), batch_size)):
            part = pairs[start : start + batch_size]
            asked = [texts[row] for row, _ in part]
            batch, metric = answered(bridge, asked, [several[row][column] for row, column in part])
            rows, columns = torch.tensor(part).T
            log_probs[rows, columns] = metric(bridge(batch), batch).double().cpu()
            token_counts[rows, columns] = torch.tensor([len(answer) for answer in metric.answers])
    return ChoiceEvaluation(log_probs, token_counts, torch.tensor(right), tuple(map(tuple, several)))


def _texts(name: str, given: object) -> list[str]:
    if not isinstance(given, list | tuple) or not given or not all(isinstance(one, str) for one in given):
        raise InvalidArgumentError(f"{name}={given!r}"[:80], expected="texts")
    return list(given)
