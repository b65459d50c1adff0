"""The loss on each position of a text: how much a model learns from its context."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.corpus import Corpus, check_positive, padded, pieces
from clearspan.analysis.places import padding_of
from clearspan.analysis.reporting.predictions import NotFiniteError
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.plots.charts import lines
from clearspan.results import Columns, Result

from .estimate import Estimate, estimate

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class LossByPosition(Result):
    """Losses in nats by row and position, on the CPU.

    Attributes:
        losses: `losses[:, p - 1]` is the loss on the token at position `p`, before which there are `p` tokens, a BOS
            included; NaN where a row is shorter.
    """

    losses: Float[Tensor, "row pos-1"]

    @property
    def counts(self) -> Int[Tensor, "pos-1"]:
        """How many rows reach each position."""
        return (~self.losses.isnan()).sum(0)

    @property
    def mean(self) -> Float[Tensor, "pos-1"]:
        """Mean loss on each position, over the rows that reach it."""
        return self.losses.nanmean(0)

    @property
    def places(self) -> tuple[int, int]:
        """The positions that `in_context_learning_score` compares by default.

        The later is the last that half of the rows reach, and at most 500; the earlier is a tenth of it.
        """
        reached = int((self.counts * 2 >= len(self.losses)).sum())
        late = min(500, reached)
        return max(1, late // 10), late

    def in_context_learning_score(self, early: int | None = None, late: int | None = None) -> Estimate:
        """Returns the loss on a late position minus that on an early one, in nats: below 0 where context helps.

        Args:
            early: The early position.
            late: The late position. Rows that do not reach it are left out.

        Returns:
            The mean over rows, and its standard error.

        Raises:
            InvalidArgumentError: No row has one of the positions.

        References:
            Olsson et al. (2022), arXiv:2209.11895: positions 50 and 500.
        """
        chosen = [
            default if given is None else given for given, default in zip((early, late), self.places, strict=True)
        ]
        most = self.losses.shape[1]
        for place in chosen:
            if not 1 <= place <= most:
                raise InvalidArgumentError(f"no row has a loss on position {place}", expected=f"1 to {most}")
        first, last = (self.losses[:, place - 1] for place in chosen)
        difference = last - first
        return estimate(difference[~difference.isnan()])

    @property
    def title(self) -> str:
        """What was measured, and the score."""
        early, late = self.places
        score, count = self.in_context_learning_score(), len(self.losses)
        return (
            f"loss by position in nats, mean over {count} row{'s' * (count > 1)}; in-context learning score {score} "
            f"(position {late} minus position {early}, ± standard error)"
        )

    def columns(self) -> Columns:
        """Returns one row for each position."""
        count = self.losses.shape[1]
        return {"position": range(1, count + 1), "loss": self.mean.tolist(), "rows": self.counts.tolist()}

    def plot(self) -> "go.Figure":
        """Returns the mean loss by position."""
        positions = list(range(1, self.losses.shape[1] + 1))
        return lines(
            {"loss": self.mean.tolist()}, x=positions, x_title="position", value_title="loss, nats", title=self.title
        )


@torch.no_grad()
def loss_by_position(
    bridge: TransformerBridge, corpus: Corpus, *, length: int = 512, batch_size: int = 8
) -> LossByPosition:
    """Returns the next-token loss on each position, and the in-context learning score.

    Args:
        bridge: The model.
        corpus: Texts, or token ids `[text, pos]` without padding, such as `repeated_tokens(bridge).tokens`. Longer ones
            are cut into pieces, each of which is read on its own.
        length: Tokens in a piece, at most; the model's context where that is less.
        batch_size: Pieces run at a time.

    Returns:
        Losses in nats by piece and position.

    Raises:
        InvalidArgumentError: No text, a size that is not positive, or no piece of two tokens.
        NoTokenizerError: Texts, and the bridge has no tokenizer.
        NotFiniteError: The model's losses are NaN.

    Example:
        >>> import inspect, clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> found = loss_by_position(bridge, [inspect.getsource(inspect.Signature)], length=201)
        >>> found.places, found.in_context_learning_score().mean < 0
        ((20, 200), True)

    References:
        Olsson et al. (2022), "In-context Learning and Induction Heads", arXiv:2209.11895, section "In-context learning
        & phase change": loss by position, and the score.
    """
    check_positive(batch_size=batch_size)
    rows = [piece for piece in pieces(bridge, corpus, length) if len(piece) > 1]
    if not rows:
        raise InvalidArgumentError("there is no next token to predict", expected="a text of two tokens or more")
    losses = torch.full((len(rows), max(map(len, rows)) - 1), torch.nan)
    for start in range(0, len(rows), batch_size):
        tokens, mask = padded(rows[start : start + batch_size])
        found = bridge(tokens, attention_mask=padding_of(mask), return_type="loss", loss_per_token=True).cpu()
        is_real = mask[:, 1:].bool()
        losses[start : start + len(tokens), : tokens.shape[1] - 1][is_real] = found[is_real].float()
        if found[is_real].isnan().any():
            raise NotFiniteError("the model's losses are not numbers (NaN)", where=f"weights in {bridge.cfg.dtype}")
    return LossByPosition(losses)
