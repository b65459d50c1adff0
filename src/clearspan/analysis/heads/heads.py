"""Scores that say what kind of attention a head pays, measured on repeated random tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.plots.charts import heatmap
from clearspan.results import Columns, Result, melted

from .repeated_tokens import repeated_tokens

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Head:
    """One head and its score."""

    layer: int
    head: int
    score: float

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(Result):
    """Two scores of every head, in units of attention from 0 to 1, on the CPU.

    Attributes:
        induction: Attention to the token after the first occurrence of the present one.
        previous_token: Attention to the token before the present one.
    """

    induction: Float[Tensor, "layer head"]
    previous_token: Float[Tensor, "layer head"]

    ranked_by: ClassVar[str | None] = "induction"

    @property
    def title(self) -> str:
        """What the scores are."""
        return "induction and previous-token score of each head, in attention from 0 to 1"

    def columns(self) -> Columns:
        """Returns one row for each head."""
        layers, heads = map(range, self.induction.shape)
        columns = melted(self.induction, "induction", layer=layers, head=heads)
        return {**columns, "previous token": self.previous_token.flatten().tolist()}

    def plot(self, score: Literal["induction", "previous_token"] = "induction") -> "go.Figure":
        """Returns a heat map of one of the scores: layers down, heads from left to right."""
        values, name = {
            "induction": (self.induction, "induction score"),
            "previous_token": (self.previous_token, "previous-token score"),
        }[score]
        return head_heatmap(values, name=name, title=f"{name} of each head, in attention from 0 to 1", bound=1.0)


def head_heatmap(
    values: Float[Tensor, "layer head"], *, name: str, title: str, sequential: bool = True, bound: float | None = None
) -> "go.Figure":
    """Returns a heat map of one value a head: layers down, heads from left to right.

    Args:
        values: By layer and head.
        name: What a value is, with its unit.
        title: Above the chart.
        sequential: Whether colours run from 0 up, and not from both sides of 0.
        bound: The value at which the colours end; by default the largest.
    """
    layers, heads = (list(map(str, range(size))) for size in values.shape)
    return heatmap(
        values,
        x=heads,
        y=layers,
        x_title="head",
        y_title="layer",
        name=name,
        title=title,
        sequential=sequential,
        bound=bound,
    )


def strongest(scores: Float[Tensor, "layer head"], k: int = 5) -> list[Head]:
    """Returns the `k` heads with the highest score, highest first.

    Example:
        >>> [str(head) for head in strongest(torch.tensor([[0.1, 0.9], [0.4, 0.2]]), k=2)]
        ['L0H1', 'L1H0']
    """
    top = scores.flatten().topk(min(k, scores.numel()))
    n_heads = scores.shape[1]
    return [Head(i // n_heads, i % n_heads, s) for s, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]


@torch.no_grad()
def head_scores(bridge: TransformerBridge, *, rows: int = 4, period: int = 50, seed: int = 0) -> HeadScores:
    """Returns each head's induction and previous-token score.

    The text is BOS (where the tokenizer has one), then a block of `period` random tokens, twice. There nothing but
    the repetition can be predicted.

    - Induction: mean attention from a token of the second block to the token *after* its first occurrence.
    - Previous token: mean attention from each token of the two blocks to the one before it.

    Args:
        bridge: A model with a tokenizer.
        rows: Random texts, over which the scores are averaged.
        period: Length of a block; half of the context where that is less.
        seed: Of the random tokens, which are uniform over the vocabulary without special tokens.

    Returns:
        Scores by layer and head, in attention from 0 to 1.

    Raises:
        NoTokenizerError: The bridge has no tokenizer.
        InvalidArgumentError: No rows, or a period of less than two tokens.

    Example:
        >>> import clearspan
        >>> scores = head_scores(clearspan.boot("tiny-bigcode"))
        >>> strongest(scores.induction, k=1)[0].layer
        4

    References:
        Olsson et al. (2022), "In-context Learning and Induction Heads", arXiv:2209.11895: prefix matching, section
        "Model analysis table". There the repeated block is 25 tokens long and stands four times.
    """
    text = repeated_tokens(bridge, rows=rows, period=period, seed=seed)
    period, start = text.period, text.start
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(bridge.cfg.n_layers)]
    _, cache = bridge.run_with_cache(text.tokens, names_filter=names)
    induction, previous = [], []
    for name in names:
        pattern = cache[name].float()
        # The diagonal at offset k - q: `period - 1` tokens back for induction, one for the previous token.
        after_first = pattern.diagonal(1 - period, dim1=-2, dim2=-1)[..., -period:]
        before = pattern.diagonal(-1, dim1=-2, dim2=-1)[..., max(start - 1, 0) :]
        induction.append(after_first.mean((0, -1)))
        previous.append(before.mean((0, -1)))
    return HeadScores(torch.stack(induction).cpu(), torch.stack(previous).cpu())
