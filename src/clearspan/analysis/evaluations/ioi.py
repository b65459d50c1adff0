"""How well a model identifies the indirect object of a sentence: the name that has been there once, and not twice."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.corpus import check_positive
from clearspan.analysis.places import padding_of
from clearspan.bridge import TransformerBridge
from clearspan.plots.charts import heatmap
from clearspan.results import Columns, Result

from .estimate import Estimate, estimate
from .ioi_generation import ioi_prompts
from .ioi_prompts import IOIPrompts

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class IOIEvaluation(Result):
    """What a model says after each prompt, on the CPU.

    Attributes:
        logit_differences: The indirect object's logit minus the subject's.
        io_probs: Probability of the indirect object's name, among all tokens.
        subject_probs: Probability of the subject's name.
        io_ranks: How many tokens are likelier than the indirect object's name: 0 where it is the prediction.
        prompts: What was asked.
    """

    logit_differences: Float[Tensor, "prompt"]
    io_probs: Float[Tensor, "prompt"]
    subject_probs: Float[Tensor, "prompt"]
    io_ranks: Int[Tensor, "prompt"]
    prompts: IOIPrompts

    @property
    def logit_difference(self) -> Estimate:
        """Mean logit difference between indirect object and subject."""
        return estimate(self.logit_differences)

    @property
    def probability_difference(self) -> Estimate:
        """Mean probability of the indirect object minus that of the subject, from -1 to 1."""
        return estimate(self.io_probs - self.subject_probs)

    @property
    def accuracy(self) -> Estimate:
        """Share of prompts in which the indirect object's logit is higher than the subject's."""
        return estimate((self.logit_differences > 0).float())

    @property
    def top_accuracy(self) -> Estimate:
        """Share of prompts in which the indirect object's name is the likeliest of all tokens."""
        return estimate((self.io_ranks == 0).float())

    @property
    def title(self) -> str:
        """The means, with their standard errors."""
        count = len(self.prompts)
        return (
            f"indirect object identification: logit difference {self.logit_difference}, probability difference "
            f"{self.probability_difference}, accuracy {self.accuracy}, likeliest of all {self.top_accuracy}; "
            f"{count} prompt{'s' * (count > 1)}, ± standard error"
        )

    def columns(self) -> Columns:
        """Returns one row for each prompt."""
        return {
            "prompt": [text.replace("\n", "⏎") for text in self.prompts.texts],
            "order": self.prompts.orders,
            "template": self.prompts.templates,
            "logit difference": self.logit_differences.tolist(),
            "p(indirect object)": self.io_probs.tolist(),
            "p(subject)": self.subject_probs.tolist(),
            "rank": self.io_ranks.tolist(),
        }

    def plot(self) -> "go.Figure":
        """Returns the mean logit difference by template and order: a model may know one order and not the other."""
        orders, templates = sorted(set(self.prompts.orders)), sorted(set(self.prompts.templates))
        sums, counts = torch.zeros(2, len(templates), len(orders), dtype=torch.double)
        each = zip(self.prompts.templates, self.prompts.orders, self.logit_differences.double(), strict=True)
        for template, order, value in each:
            at = templates.index(template), orders.index(order)
            sums[at] += value
            counts[at] += 1
        return heatmap(
            sums / counts,
            x=orders,
            y=list(map(str, templates)),
            x_title="order",
            y_title="template",
            name="logit difference",
            title="mean logit difference between indirect object and subject",
        )


@torch.no_grad()
def evaluate_ioi(
    bridge: TransformerBridge,
    prompts: IOIPrompts | None = None,
    *,
    count: int = 100,
    seed: int = 0,
    batch_size: int = 32,
) -> IOIEvaluation:
    r"""Returns how much likelier a model holds the indirect object's name to be than the subject's.

    Args:
        bridge: The model. Hooks that are on it count.
        prompts: From `ioi_prompts`, for templates and names of one's own; by default `ioi_prompts(bridge, count)`.
        count: How many prompts, where none are given.
        seed: Of these.
        batch_size: Prompts run at a time.

    Returns:
        Logit differences, probabilities and ranks by prompt; their means with standard errors.

    Raises:
        NoTokenizerError, InvalidArgumentError: As `ioi_prompts`, where none are given; or an empty batch.

    Example:
        The embedded model, which was trained on code, has not learned to name the other of two arguments:

        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> code = ["def f(self, {first}, {second}):\n    return {again} +"]
        >>> found = evaluate_ioi(bridge, ioi_prompts(bridge, templates=code, names=["x", "y", "a", "b", "key"]))
        >>> found.accuracy.mean < 0.8
        True

    References:
        Wang et al. (2022), "Interpretability in the Wild", arXiv:2211.00593, section 2: logit difference and the
        probability of the indirect object. TransformerLens's `ioi_eval` reports the logit difference and this accuracy.
    """
    check_positive(batch_size=batch_size)
    prompts = ioi_prompts(bridge, count, seed=seed) if prompts is None else prompts
    found = []
    for start in range(0, len(prompts), batch_size):
        part = prompts.rows(start, start + batch_size)
        last = part.at_end(bridge(part.tokens, attention_mask=padding_of(part.mask)))
        pair = torch.stack([part.io, part.subject], dim=1).to(last.device)
        io, subject = last.gather(1, pair).unbind(1)
        io_probs, subject_probs = last.softmax(-1).gather(1, pair).unbind(1)
        found.append((io - subject, io_probs, subject_probs, (last > io[:, None]).sum(1)))
    differences, io_probs, subject_probs, ranks = (torch.cat(column).cpu() for column in zip(*found, strict=True))
    return IOIEvaluation(differences, io_probs, subject_probs, ranks, prompts)
