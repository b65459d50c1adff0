"""How well a model continues a repetition: its loss on random tokens, and on the same tokens again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.corpus import check_positive
from clearspan.analysis.heads.repeated_tokens import repeated_tokens
from clearspan.bridge import TransformerBridge
from clearspan.plots.charts import lines
from clearspan.results import Columns, Result

from .estimate import Estimate, estimate

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class Repetition(Result):
    """Losses in nats, and hits, on both copies of random blocks, without the first token of each copy, on the CPU.

    Attributes:
        losses: Cross-entropy of each token; `place` counts from the block's second token.
        correct: 1 where the likeliest token was the right one, otherwise 0.
    """

    losses: Float[Tensor, "row copy place"]
    correct: Float[Tensor, "row copy place"]

    @property
    def first_loss(self) -> float:
        """Mean loss on the first copy, in nats. Uniform guessing would have `log(d_vocab)`."""
        return self.losses[:, 0].mean().item()

    @property
    def second_loss(self) -> float:
        """Mean loss on the second copy, in nats."""
        return self.losses[:, 1].mean().item()

    @property
    def loss_difference(self) -> Estimate:
        """Mean loss on the first copy minus that on the second, in nats: what the repetition tells."""
        first, second = self.losses.mean(-1).unbind(1)
        return estimate(first - second)

    @property
    def accuracy(self) -> float:
        """Share of the second copy's tokens that were the likeliest, from 0 to 1."""
        return self.correct[:, 1].mean().item()

    @property
    def title(self) -> str:
        """What was measured, and the means."""
        return (
            f"loss on repeated random tokens: {self.first_loss:z.2f} nats on the first copy, {self.second_loss:z.2f} "
            f"on the second; accuracy {self.accuracy:.0%} on the second; mean over {len(self.losses)} rows"
        )

    def columns(self) -> Columns:
        """Returns one row for each place in the block, the mean over rows."""
        first, second = self.losses.mean(0).tolist()
        accuracy = self.correct[:, 1].mean(0).tolist()
        return {
            "place": range(1, len(first) + 1),
            "first copy, nats": first,
            "second copy, nats": second,
            "second copy, accuracy": accuracy,
        }

    def plot(self) -> "go.Figure":
        """Returns the loss on both copies by place in the block."""
        first, second = self.losses.mean(0).tolist()
        return lines(
            {"first copy": first, "second copy": second},
            x=list(range(1, len(first) + 1)),
            x_title="place in the block",
            value_title="loss, nats",
            title=self.title,
        )


@torch.no_grad()
def evaluate_repetition(
    bridge: TransformerBridge,
    *,
    rows: int = 16,
    period: int = 50,
    seed: int = 0,
    prepend_bos: bool | None = None,
    vocabulary: Sequence[int] | Int[Tensor, "token"] | None = None,
    batch_size: int = 16,
) -> Repetition:
    """Returns the loss on random tokens, and on the same tokens when they come again.

    The text is that of `repeated_tokens`. The fall from the first to the second copy is what the model learns from the
    context alone, which induction heads do.

    Args:
        bridge: The model.
        rows: Random texts.
        period: Length of a block; half of the context where that is less.
        seed: Of the random tokens.
        prepend_bos: Whether a BOS stands first; by default as for any text.
        vocabulary: Token ids to draw from; by default all but special ones, which takes a tokenizer.
        batch_size: Rows run at a time.

    Returns:
        Losses in nats and hits by row, copy and place.

    Raises:
        NoTokenizerError: The bridge has no tokenizer, and no vocabulary is given.
        InputError: `prepend_bos=True`, and there is no BOS.
        InvalidArgumentError: No rows, a period of less than two tokens, an empty vocabulary, or an empty batch.

    Example:
        >>> import clearspan
        >>> found = evaluate_repetition(clearspan.boot("tiny-bigcode"))
        >>> found.first_loss > 8, found.second_loss < 1, found.accuracy > 0.9
        (True, True, True)

    References:
        Olsson et al. (2022), "In-context Learning and Induction Heads", arXiv:2209.11895, section "Repeated sequences
        of random tokens". The first token of the second copy, which cannot be foreseen, is left out of both copies.
    """
    check_positive(batch_size=batch_size)
    text = repeated_tokens(bridge, rows=rows, period=period, seed=seed, prepend_bos=prepend_bos, vocabulary=vocabulary)
    losses, correct = [], []
    for start in range(0, rows, batch_size):
        part = text.rows(start, start + batch_size)
        logits = bridge(part.tokens)
        losses.append(part.losses(logits).cpu())
        correct.append(part.correct(logits).cpu())
    return Repetition(torch.cat(losses), torch.cat(correct))


def induction_loss(
    bridge: TransformerBridge,
    *,
    rows: int = 16,
    period: int = 50,
    seed: int = 0,
    prepend_bos: bool | None = None,
    vocabulary: Sequence[int] | Int[Tensor, "token"] | None = None,
    batch_size: int = 16,
) -> float:
    """Returns the mean loss, in nats, on the second copy of random tokens: `evaluate_repetition(...).second_loss`.

    Near 0 the model continues the repetition; at `log(d_vocab)` and above it does not. Arguments and errors are those
    of `evaluate_repetition`.

    Example:
        >>> import clearspan
        >>> induction_loss(clearspan.boot("tiny-bigcode"), rows=4) < 1
        True

    References:
        TransformerLens, `evals.induction_loss`. There ids are drawn from 100 to 19,999, BOS takes the place of the
        first copy's first token, and the second copy's first two tokens are left out; here it is the first alone.
    """
    return evaluate_repetition(
        bridge,
        rows=rows,
        period=period,
        seed=seed,
        prepend_bos=prepend_bos,
        vocabulary=vocabulary,
        batch_size=batch_size,
    ).second_loss
