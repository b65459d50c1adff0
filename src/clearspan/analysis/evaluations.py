"""How well a model predicts: its loss on each position of texts, and on random tokens that are repeated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.corpus import Corpus, pieces
from clearspan.analysis.repeats import repeated_tokens
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, check_flags
from clearspan.effects import Effects
from clearspan.errors import InputError, InvalidArgumentError, NotFiniteError
from clearspan.inputs import Batch
from clearspan.modes import no_grad
from clearspan.progress import Progress, shown, told
from clearspan.results import Columns, counted
from clearspan.statistics import standard_error
from clearspan.sweep.metrics import NextTokenLoss, check_predicted


@dataclass(frozen=True)
class Estimate:
    """A mean over rows drawn independently.

    Attributes:
        mean: In the unit of the rows.
        error: Its standard error; NaN where there is one row.
        rows: How many.
    """

    mean: float
    error: float
    rows: int

    def __str__(self) -> str:
        return f"{self.mean:z.3f}" if self.rows == 1 else f"{self.mean:z.3f} ± {self.error:z.3f}"


def estimate(values: Float[Tensor, "row"]) -> Estimate:
    """Returns the mean of one number for each row, computed in float64.

    Example:
        >>> print(estimate(torch.tensor([1.0, 2.0, 3.0, 4.0])))
        2.500 ± 0.645
    """
    error = standard_error(values).item() if len(values) > 1 else float("nan")
    return Estimate(values.double().mean().item(), error, len(values))


# --- the loss as a metric --------------------------------------------------------------------------------------------


def next_token_loss(
    tokens: Int[Tensor, "row pos"] | Batch, mask: Int[Tensor, "row pos"] | None = None
) -> Callable[[Float[Tensor, "row pos d_vocab"]], Float[Tensor, "row"]]:
    """Returns a function of logits: each row's mean loss on its next tokens, in nats.

    It is `clearspan.sweep.NextTokenLoss` for the tokens of one run.

    Args:
        tokens: The token ids that the logits are of, or their batch.
        mask: 1 for real tokens, where token ids have padding.

    Raises:
        InputError: No token ids.
        InvalidArgumentError: A row has fewer than two real tokens, so nothing is predicted in it.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> tokens = bridge.to_tokens("import os")
        >>> logits, loss = bridge(tokens, return_type="both")
        >>> bool(next_token_loss(tokens)(logits)[0].isclose(loss))
        True
    """
    if not isinstance(tokens, Batch):
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
            raise InputError(
                "the loss is on token ids",
                expected="token ids [row, pos], or bridge.to_batch(input)",
                got=str(list(tokens.shape)) if isinstance(tokens, Tensor) else type(tokens).__name__,
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != tokens.shape):
            raise InputError("the mask is not that of the token ids", expected=f"a tensor {list(tokens.shape)}")
        tokens = Batch(tokens, None if mask is None else mask.long())
    check_predicted(tokens)
    return partial(NextTokenLoss(), batch=tokens)


# --- texts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class LossByPosition(Effects):
    """Losses in nats by position and row: the loss on the token at position `p`, which has `p` tokens before it.

    A BOS counts as a token. Rows that are shorter are NaN.
    """

    @property
    def counts(self) -> Int[Tensor, "position"]:
        """How many rows reach each position."""
        return (~self.of().isnan()).sum(-1)

    @property
    def compared(self) -> tuple[int, int]:
        """The positions that `in_context_learning_score` compares by default.

        The later is the last that half of the rows reach, and at most 500; the earlier is a tenth of it.
        """
        reached = int((self.counts * 2 >= self.of().shape[-1]).sum())
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
        first, last = (
            self.select(position=default if given is None else given).of()
            for given, default in zip((early, late), self.compared, strict=True)
        )
        difference = last - first
        return estimate(difference[~difference.isnan()])

    @property
    def rank(self) -> None:
        """Positions are printed in their order."""

    @property
    def title(self) -> str:
        """What was measured, and the score."""
        early, late = self.compared
        return (
            f"{super().title}; in-context learning score {self.in_context_learning_score()} "
            f"(position {late} minus position {early}, ± standard error)"
        )

    def columns(self) -> Columns:
        """Returns one row for each position, with the number of rows that reach it."""
        return {**super().columns(), "rows": self.counts.tolist()}


@no_grad
def loss_by_position(
    bridge: TransformerBridge,
    corpus: Corpus,
    *,
    length: int = 512,
    batch_size: int = 8,
    progress: bool | Progress = True,
) -> LossByPosition:
    """Returns the next-token loss on each position, and the in-context learning score.

    Args:
        bridge: The model.
        corpus: Any input, or any number of them. Longer ones are cut into pieces, each of which is read on its own.
        length: Tokens in a piece, at most; the model's context where that is less.
        batch_size: Pieces run at a time.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, total)`.

    Returns:
        Losses in nats by position and piece.

    Raises:
        InvalidArgumentError: No text, a size that is not positive, or no piece of two tokens.
        NoTokenizerError: Texts, and the bridge has no tokenizer.
        NotFiniteError: The model's losses are NaN.

    Example:
        >>> import inspect, clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> found = loss_by_position(bridge, [inspect.getsource(inspect.Signature)], length=201)
        >>> found.compared, found.in_context_learning_score().mean < 0
        ((20, 200), True)

    References:
        Olsson et al. (2022), "In-context Learning and Induction Heads", arXiv:2209.11895, section "In-context learning
        & phase change": loss by position, and the score.
    """
    check_counts(batch_size=batch_size)
    batch = pieces(bridge, corpus, length)
    is_predicted = batch.lengths > 1
    if not is_predicted.any():
        raise InvalidArgumentError("there is no next token to predict", expected="a text of two tokens or more")
    batch, parts = batch.select(is_predicted.nonzero()[:, 0]), []
    with shown(progress) as tell:
        for part in told(tell, "pieces", batch.split(batch_size)):
            losses = bridge(part, return_type="loss", loss_per_token=True)
            losses = losses.float().masked_fill(part.real[:, 1:] == 0, torch.nan)
            parts.append(torch.nn.functional.pad(losses, (0, batch.width - part.width), value=torch.nan).cpu())
    found = torch.cat(parts)
    if int((~found.isnan()).sum()) != int((batch.lengths - 1).sum()):
        raise NotFiniteError("the model's losses are not numbers (NaN)", where=f"weights in {bridge.cfg.dtype}")
    axes = {"position": tuple(range(1, batch.width))}
    return LossByPosition({"loss": found.T}, axes, what="each position", units={"loss": "nats"}, row="piece")


# --- repeated tokens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Repetition(Effects):
    """Losses in nats, and hits, on both copies of random blocks, without the first token of each copy.

    Its metrics are `"loss"`, the cross-entropy of each token, and `"accuracy"`, 1 where the likeliest token was the
    right one and otherwise 0. Places count from the block's second token.
    """

    @property
    def first_loss(self) -> float:
        """Mean loss on the first copy, in nats. Uniform guessing would have `log(d_vocab)`."""
        return self.of()[0].mean().item()

    @property
    def second_loss(self) -> float:
        """Mean loss on the second copy, in nats."""
        return self.of()[1].mean().item()

    @property
    def loss_difference(self) -> Estimate:
        """Mean loss on the first copy minus that on the second, in nats: what the repetition tells."""
        first, second = self.of().mean(1)
        return estimate(first - second)

    @property
    def accuracy(self) -> float:
        """Share of the second copy's tokens that were the likeliest, from 0 to 1."""
        return self.of("accuracy")[1].mean().item()

    @property
    def rank(self) -> None:
        """Places are printed in their order."""

    @property
    def title(self) -> str:
        """What was measured, and the means."""
        rows, first, second = counted(self.of().shape[-1], "row"), self.first_loss, self.second_loss
        return (
            f"loss on repeated random tokens: {first:z.2f} nats on the first copy, {second:z.2f} on the second; "
            f"accuracy {self.accuracy:.0%} on the second; mean over {rows}"
        )


@no_grad
def evaluate_repetition(
    bridge: TransformerBridge,
    *,
    rows: int = 16,
    period: int = 50,
    seed: int = 0,
    prepend_bos: bool | None = None,
    vocabulary: Sequence[int] | Int[Tensor, "token"] | None = None,
    batch_size: int = 16,
    progress: bool | Progress = True,
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
        vocabulary: Token ids to draw from; by default all but special ones.
        batch_size: Rows run at a time.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, total)`.

    Returns:
        Losses in nats and hits by copy, place and row.

    Raises:
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
    check_counts(batch_size=batch_size)
    if prepend_bos is not None:
        check_flags(prepend_bos=prepend_bos)
    text = repeated_tokens(bridge, rows=rows, period=period, seed=seed, prepend_bos=prepend_bos, vocabulary=vocabulary)
    losses, correct = [], []
    with shown(progress) as tell:
        for start in told(tell, "repeated texts", range(0, rows, batch_size)):
            part = text.rows(start, start + batch_size)
            logits = bridge(part.tokens)
            losses.append(part.losses(logits).cpu())
            correct.append(part.correct(logits).cpu())
    values = {"loss": torch.cat(losses).movedim(0, -1), "accuracy": torch.cat(correct).movedim(0, -1)}
    axes = {"copy": ("first", "second"), "place": tuple(range(1, text.period))}
    return Repetition(values, axes, units={"loss": "nats"})


def induction_loss(
    bridge: TransformerBridge,
    *,
    rows: int = 16,
    period: int = 50,
    seed: int = 0,
    prepend_bos: bool | None = None,
    vocabulary: Sequence[int] | Int[Tensor, "token"] | None = None,
    batch_size: int = 16,
    progress: bool | Progress = True,
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
        progress=progress,
    ).second_loss
