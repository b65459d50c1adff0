"""Metrics that say which logits they read, so that no others are computed. Data, with a JSON form."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.checks import check_flags, check_kind, is_whole, wholes
from clearspan.errors import InvalidArgumentError, TokenRangeError, argument
from clearspan.inputs import Batch
from clearspan.model import check_bridge
from clearspan.points import nearest
from clearspan.transfers import numbers_on, on_device

PerRow = int | tuple[int, ...]
"""One number for all rows, or one for each."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A run with whose logits a metric compares.

    Attributes:
        logits: What the model returned.
        batch: The run's rows.
    """

    logits: Float[Tensor, "row pos d_vocab"]
    batch: Batch


@dataclass(frozen=True, eq=False)
class Context:
    """What a metric may need besides logits.

    Attributes:
        batch: The rows that the logits are of.
        references: Other runs, by name.
    """

    batch: Batch
    references: Mapping[str, Reference] = field(default_factory=dict)

    @classmethod
    def of(cls, logits: Float[Tensor, "row pos d_vocab"], batch: Batch | None = None) -> Self:
        """Returns the context of logits: of a batch, or of unpadded rows."""
        if batch is None:
            batch = Batch(None, embeds=logits.new_empty(*logits.shape[:2], 0, dtype=torch.float32))
        return cls(batch)


class LogitMetric(ABC):
    """One number for each row, from logits at some positions, of some tokens.

    Positions count among a row's real tokens. A metric can be called with the logits of a whole run, as any function
    can; where rows are padded it is given the batch too: `metric(bridge(batch), batch)`.
    """

    kind: ClassVar[str]
    """Its name in JSON."""

    @property
    def unit(self) -> str:
        """The unit of its numbers: `logits`, `nats`, or nothing for a probability."""
        return "nats"

    @property
    def tokens(self) -> tuple[int, ...] | None:
        """The tokens whose logits it reads, or None for all."""
        return None

    @property
    def reference(self) -> str | None:
        """The run whose logits it compares with, or None."""
        return None

    @abstractmethod
    def places(self, batch: Batch) -> Int[Tensor, "row place"] | None:
        """Returns the columns that it reads in each row of a run, or None for all."""

    @abstractmethod
    def of(self, logits: Float[Tensor, "*cell row place token"], context: Context) -> Float[Tensor, "*cell row"]:
        """Returns the metric of the logits at its places, of its tokens."""

    def __call__(self, logits: Float[Tensor, "row pos d_vocab"], batch: Batch | None = None) -> Float[Tensor, "row"]:
        """Returns the metric of all logits of a run.

        Args:
            logits: Of all positions.
            batch: The rows that they are of, where some are padded.
        """
        check_logits(logits)
        check_kind(Batch, type(None), batch=batch)
        return self.measure(logits, Context.of(logits, batch))

    def measure(self, logits: Float[Tensor, "row pos d_vocab"], context: Context) -> Float[Tensor, "row"]:
        """Returns the metric of all logits of a run, with what it needs besides."""
        check_vocabulary(self.tokens or (), logits.shape[-1])
        read = logits if self.tokens is None else logits[..., numbers_on(logits.device, self.tokens)]
        return self.of(at_places(read, self.places(context.batch)), context)

    def to_json(self) -> dict[str, Any]:
        """Returns the metric as plain data."""
        return {"kind": self.kind, **asdict(cast("Any", self))}


def check_logits(logits: object) -> None:
    """Raises InvalidArgumentError unless something is logits of a run."""
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not logits.numel() or not logits.is_floating_point():
        got = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else repr(logits)[:80]
        raise InvalidArgumentError("a metric is of the logits of a run", expected="logits [row, pos, d_vocab]", got=got)


def check_vocabulary(tokens: Sequence[int], size: int) -> None:
    """Raises TokenRangeError unless a metric's tokens are in a vocabulary."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < size:
        raise TokenRangeError(
            "a token of the metric is outside the vocabulary",
            expected=f"0 to {size - 1}",
            got=f"{min(tokens)} to {max(tokens)}",
        )


def at_places(
    logits: Float[Tensor, "*cell row pos token"], places: Int[Tensor, "row place"] | None
) -> Float[Tensor, "*cell row place token"]:
    """Returns logits at each row's own places."""
    if places is None:
        return logits
    index = on_device(places, logits.device)[..., None].expand(*logits.shape[:-3], *places.shape, logits.shape[-1])
    return logits.gather(-2, index)


@dataclass(frozen=True)
class LogitDifference(LogitMetric):
    r"""The logit of one token less that of another, at one position of each row; or the logit alone.

    Attributes:
        correct: The token's id.
        incorrect: The other's, or None.
        position: Where.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> metric = LogitDifference.between(bridge, " os", " sys")
        >>> bool(metric(bridge("import os\nimport")) > 0)
        True
    """

    correct: PerRow
    incorrect: PerRow | None = None
    position: PerRow = -1

    kind: ClassVar[str] = "logit_difference"

    def __post_init__(self) -> None:
        _keep_per_row(self, "correct", "position", *([] if self.incorrect is None else ["incorrect"]))

    @property
    def unit(self) -> str:
        """Logits."""
        return "logits"

    @classmethod
    def between(
        cls,
        bridge: TransformerBridge,
        correct: str | Sequence[str],
        incorrect: str | Sequence[str] | None = None,
        position: PerRow = -1,
    ) -> Self:
        """Returns the metric for tokens given as text, one for all rows or one for each.

        Raises:
            InputError: A text that is not a single token: the difference of two logits is that of two tokens.
                `sweep.answered` measures answers of several.
        """
        check_bridge(bridge)
        other = None if incorrect is None else _ids(bridge, incorrect, "incorrect")
        return cls(_ids(bridge, correct, "correct"), other, position)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Both tokens, of all rows."""
        both = (*_each(self.correct), *(() if self.incorrect is None else _each(self.incorrect)))
        return tuple(sorted(set(both)))

    def places(self, batch: Batch) -> Int[Tensor, "row 1"]:
        """Returns the one column of each row."""
        return one_place(self.position, batch)

    def of(self, logits: Float[Tensor, "*cell row 1 token"], context: Context) -> Float[Tensor, "*cell row"]:
        """Returns the difference."""
        found = self._logit(logits, self.correct)
        return found if self.incorrect is None else found - self._logit(logits, self.incorrect)

    def _logit(self, logits: Tensor, tokens: PerRow) -> Tensor:
        columns = numbers_on(logits.device, [self.tokens.index(token) for token in _each(tokens)])
        at_place = logits[..., 0, :]
        columns = columns.expand(_checked(tokens, at_place.shape[-2], "tokens"))
        return at_place.gather(-1, columns.expand(at_place.shape[:-1])[..., None])[..., 0]


@dataclass(frozen=True)
class Probability(LogitMetric):
    """The probability of a token at one position of each row.

    Attributes:
        token: Its id.
        position: Where.
        is_log: Whether it is the logarithm, in nats.
    """

    token: PerRow
    position: PerRow = -1
    is_log: bool = False

    kind: ClassVar[str] = "probability"

    def __post_init__(self) -> None:
        _keep_per_row(self, "token", "position")
        check_flags(is_log=self.is_log)

    @property
    def unit(self) -> str:
        """Nats for the logarithm."""
        return "nats" if self.is_log else ""

    def places(self, batch: Batch) -> Int[Tensor, "row 1"]:
        """Returns the one column of each row."""
        return one_place(self.position, batch)

    def of(self, logits: Float[Tensor, "*cell row 1 d_vocab"], context: Context) -> Float[Tensor, "*cell row"]:
        """Returns the probability, or its logarithm."""
        log_probs = log_softmax(logits[..., 0, :])
        check_vocabulary(_each(self.token), log_probs.shape[-1])
        ids = numbers_on(logits.device, _each(self.token))
        ids = ids.expand(_checked(self.token, log_probs.shape[-2], "tokens"))
        found = log_probs.gather(-1, ids.expand(log_probs.shape[:-1])[..., None])[..., 0]
        return found if self.is_log else found.exp()


@dataclass(frozen=True)
class KLDivergence(LogitMetric):
    """KL(reference || run) in nats, at one position of each row, or its mean over all real positions.

    Attributes:
        against: Name of the run that is the reference: a source, or `"base"`, the run that is changed.
        position: Where, or None for all positions.
    """

    against: str = "base"
    position: PerRow | None = -1

    kind: ClassVar[str] = "kl_divergence"

    def __post_init__(self) -> None:
        check_kind(str, against=self.against)
        _keep_per_row(self, *([] if self.position is None else ["position"]))

    @property
    def reference(self) -> str:
        """The reference's name."""
        return self.against

    def places(self, batch: Batch) -> Int[Tensor, "row 1"] | None:
        """Returns the one column of each row, or None."""
        return None if self.position is None else one_place(self.position, batch)

    def of(self, logits: Float[Tensor, "*cell row place d_vocab"], context: Context) -> Float[Tensor, "*cell row"]:
        """Returns the divergence."""
        if self.against not in context.references:
            raise InvalidArgumentError(
                f"KLDivergence compares with the run {self.against!r}, whose logits are not there",
                got=", ".join(map(repr, context.references)) or "no runs",
                fix="give it to the sweep as a source, as tokens or text",
            )
        other, batch = context.references[self.against], context.batch
        places = _same_places(batch, other.batch) if self.position is None else self.places(other.batch)
        reference = log_softmax(at_places(other.logits.to(logits.device), places))
        found = (reference.exp() * (reference - log_softmax(logits))).sum(-1)
        if self.position is not None or batch.mask is None:
            return found.mean(-1)
        real = batch.mask.to(found)
        return (found * real).sum(-1) / real.sum(-1)


@dataclass(frozen=True)
class NextTokenLoss(LogitMetric):
    """Each row's mean loss on its next tokens in nats: each real token but the last predicts the next real one."""

    kind: ClassVar[str] = "next_token_loss"

    def places(self, batch: Batch) -> Int[Tensor, "row place"]:
        """Returns the columns of all real tokens of a row but the last; shorter rows repeat their last one."""
        check_predicted(batch)
        return _padded_out([real[:-1] for real in batch.real_columns])

    def of(self, logits: Float[Tensor, "*cell row place d_vocab"], context: Context) -> Float[Tensor, "*cell row"]:
        """Returns the loss."""
        batch = context.batch
        if batch.tokens is None:
            raise InvalidArgumentError(
                "NextTokenLoss needs the tokens that the logits are of", fix="metric(logits, bridge.to_batch(input))"
            )
        nexts = _padded_out([real[1:] for real in batch.real_columns])
        ids = batch.ids.to(logits.device).gather(1, on_device(nexts, logits.device))
        found = -log_softmax(logits).gather(-1, ids.expand(logits.shape[:-1])[..., None])[..., 0]
        counts = on_device(batch.lengths - 1, logits.device)
        is_real = torch.arange(ids.shape[1], device=logits.device) < counts[:, None]
        return torch.where(is_real, found, 0).sum(-1) / counts


@dataclass(frozen=True)
class AnswerLogProbability(LogitMetric):
    r"""The log-probability of an answer of any number of tokens, in nats: `sum over i of log p(a_i | prompt, a_<i)`.

    The rows that run, those of a sweep's sources included, are prompts with their answers behind them; `sweep.answered`
    makes both. A row's last token is the answer's, so that position -1 is no longer the prompt's.

    Attributes:
        answers: Token ids of each row's answer, or of one for all rows.

    Example:
        >>> import clearspan
        >>> from clearspan.sweep import answered
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> batch, metric = answered(bridge, ["import os", "import re"], ["\nimport sys", "\nimport time"])
        >>> metric(bridge(batch), batch).shape
        torch.Size([2])
    """

    answers: tuple[tuple[int, ...], ...]

    kind: ClassVar[str] = "answer_log_probability"

    def __post_init__(self) -> None:
        given = self.answers
        kept = tuple(wholes(one) or () for one in given) if isinstance(given, list | tuple) else ()
        if not kept or not all(kept):
            raise InvalidArgumentError(
                f"answers={given!r}"[:80], expected="a tuple of token ids for each row, or for all", where=self.kind
            )
        object.__setattr__(self, "answers", kept)

    def places(self, batch: Batch) -> Int[Tensor, "row place"]:
        """Returns the columns before each of a row's answer tokens; shorter answers repeat their last one.

        Raises:
            InvalidArgumentError: A row does not end with its answer behind a prompt.
        """
        found = []
        for row, (real, answer) in enumerate(zip(batch.real_columns, self._by_row(batch), strict=True)):
            there = None if batch.tokens is None else batch.tokens[row, list(real[-len(answer) :])].tolist()
            if len(real) <= len(answer) or there not in (None, list(answer)):
                raise InvalidArgumentError(
                    f"row {row} is not a prompt with its answer behind it",
                    expected=f"one token or more, then {list(answer)}",
                    got=f"{len(real)} tokens" if there is None else f"{len(real)} tokens, the last of them {there}",
                    fix="batch, metric = clearspan.sweep.answered(bridge, prompts, answers)",
                )
            found.append(real[-len(answer) - 1 : -1])
        return _padded_out(found)

    def of(self, logits: Float[Tensor, "*cell row place d_vocab"], context: Context) -> Float[Tensor, "*cell row"]:
        """Returns the sum over the answer's tokens."""
        answers = self._by_row(context.batch)
        check_vocabulary([token for answer in answers for token in answer], logits.shape[-1])
        ids = on_device(_padded_out(answers), logits.device)
        found = log_softmax(logits).gather(-1, ids.expand(logits.shape[:-1])[..., None])[..., 0]
        counts = numbers_on(logits.device, [len(answer) for answer in answers])
        is_real = torch.arange(ids.shape[1], device=logits.device) < counts[:, None]
        return torch.where(is_real, found, 0).sum(-1)

    def _by_row(self, batch: Batch) -> tuple[tuple[int, ...], ...]:
        """Returns each row's answer."""
        if len(self.answers) not in (1, batch.rows):
            raise InvalidArgumentError(
                "the metric's answers are not one for each row",
                expected=f"1 or {batch.rows}",
                got=f"{len(self.answers)}",
            )
        return self.answers * (batch.rows if len(self.answers) == 1 else 1)


def check_predicted(batch: Batch) -> None:
    """Raises if a row has no next token that is predicted.

    Raises:
        InvalidArgumentError: A row has fewer than two real tokens.
    """
    if int(batch.lengths.min()) < 2:
        row = int(batch.lengths.argmin())
        raise InvalidArgumentError(
            "there is no next token to predict",
            expected="two real tokens or more in each row",
            got=f"row {row} has fewer",
        )


def _padded_out(columns: Sequence[Sequence[int]]) -> Int[Tensor, "row place"]:
    """Returns lists as rows of one length, each filled by its last number."""
    longest = max(map(len, columns))
    return torch.tensor([[*own, *[own[-1]] * (longest - len(own))] for own in columns])


def _same_places(batch: Batch, other: Batch) -> Int[Tensor, "row pos"] | None:
    """Returns the columns of another batch that hold the positions of this one's columns, or None for the same ones.

    Raises:
        InvalidArgumentError: The rows differ in real length.
    """
    if batch.real_columns == other.real_columns:
        return None
    if not torch.equal(batch.lengths, other.lengths):
        raise InvalidArgumentError(
            "a divergence over all positions compares rows of the same lengths",
            expected=str(batch.lengths.tolist()),
            got=str(other.lengths.tolist()),
        )
    places = torch.zeros(batch.rows, batch.width, dtype=torch.long)
    for row, (own, there) in enumerate(zip(batch.real_columns, other.real_columns, strict=True)):
        places[row, list(own)] = torch.tensor(there)
    return places


Metric = LogitMetric | Callable[[Float[Tensor, "row pos d_vocab"]], Float[Tensor, "*row"]]
"""A metric that says what it reads, or any function of all logits that gives a number for each row, or one for all."""

KINDS: Mapping[str, type[LogitMetric]] = {
    kind.kind: kind for kind in (LogitDifference, Probability, KLDivergence, NextTokenLoss, AnswerLogProbability)
}
"""Metrics by their name in JSON."""


def parse_metric(data: Mapping[str, Any]) -> LogitMetric:
    """Returns the metric of its JSON form.

    Raises:
        InvalidArgumentError: An unknown kind.
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise InvalidArgumentError(
            f"unknown metric {kind!r}", expected=", ".join(KINDS), nearest=nearest(str(kind), KINDS)
        )
    return KINDS[kind](**{name: _as_tuples(value) for name, value in fields.items()})


def _as_tuples(value: Any) -> Any:
    """Returns lists, and lists in them, as tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def one_place(position: PerRow, batch: Batch) -> Int[Tensor, "row 1"]:
    """Returns the column of one position of each row.

    Raises:
        InvalidArgumentError: A row does not have it, or there is not one position for each row.
    """
    each = _each(position)
    _checked(position, batch.rows, "positions")
    by_row = each if len(each) == batch.rows else each * batch.rows
    return torch.tensor([[batch.column_of(row, one, "position of the metric")] for row, one in enumerate(by_row)])


def log_softmax(logits: Tensor) -> Tensor:
    """Returns log-probabilities in nats, in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _keep_per_row(metric: LogitMetric, *names: str) -> None:
    """Has fields of a metric be plain numbers, or tuples of them."""
    for name in names:
        given = getattr(metric, name)
        found = wholes(given)
        if not found:
            raise InvalidArgumentError(
                f"{name}={given!r}"[:80], expected="a whole number, or one for each row", where=metric.kind
            )
        object.__setattr__(metric, name, found[0] if is_whole(given) else found)


def _each(value: PerRow) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _checked(value: PerRow, rows: int, what: str) -> int:
    if len(_each(value)) not in (1, rows):
        raise InvalidArgumentError(
            f"the metric's {what} are not one for each row", expected=f"1 or {rows}", got=str(len(_each(value)))
        )
    return rows


def _ids(bridge: TransformerBridge, text: str | Sequence[str], name: str) -> PerRow:
    with argument(name):
        if isinstance(text, str):
            return bridge.to_single_token(text)
        check_kind(Sequence, text=text)
        return tuple(bridge.to_single_token(token) for token in text)
