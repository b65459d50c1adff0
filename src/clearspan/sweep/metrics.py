"""Metrics that say which logits they read, so that no others are computed. Data, with a JSON form."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.errors import InvalidArgumentError
from clearspan.points import nearest

if TYPE_CHECKING:
    from clearspan.bridge import TransformerBridge

PerRow = int | tuple[int, ...]
"""One number for all rows, or one for each."""


@dataclass(frozen=True, eq=False)
class Context:
    """What a metric may need besides logits.

    Attributes:
        tokens: The tokens that the logits are of.
        mask: Their padding mask, or None where nothing is padded.
        references: Logits of other runs, by name.
    """

    tokens: Int[Tensor, "row pos"] | None = None
    mask: Int[Tensor, "row pos"] | None = None
    references: Mapping[str, Float[Tensor, "row pos d_vocab"]] = field(default_factory=dict)


class LogitMetric(ABC):
    """One number for each row, from logits at some positions, of some tokens.

    A metric can be called with the logits of a whole run, as any function can.
    """

    kind: ClassVar[str]
    """Its name in JSON."""

    @property
    def tokens(self) -> tuple[int, ...] | None:
        """The tokens whose logits it reads, or None for all."""
        return None

    @property
    def reference(self) -> str | None:
        """The run whose logits it compares with, or None."""
        return None

    @abstractmethod
    def places(self, rows: int, length: int) -> Int[Tensor, "row place"] | None:
        """Returns the positions that it reads in each row of a run, from 0, or None for all."""

    @abstractmethod
    def of(self, logits: Float[Tensor, "*cell row place token"], context: Context) -> Float[Tensor, "*cell row"]:
        """Returns the metric of the logits at its places, of its tokens."""

    def __call__(self, logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, "row"]:
        """Returns the metric of all logits of a run."""
        return self.measure(logits, Context())

    def measure(self, logits: Float[Tensor, "row pos d_vocab"], context: Context) -> Float[Tensor, "row"]:
        """Returns the metric of all logits of a run, with what it needs besides."""
        rows, length = logits.shape[:2]
        read = logits if self.tokens is None else logits[..., list(self.tokens)]
        return self.of(at_places(read, self.places(rows, length)), context)

    def to_json(self) -> dict[str, Any]:
        """Returns the metric as plain data."""
        return {"kind": self.kind, **asdict(cast("Any", self))}


def at_places(
    logits: Float[Tensor, "*cell row pos token"], places: Int[Tensor, "row place"] | None
) -> Float[Tensor, "*cell row place token"]:
    """Returns logits at each row's own places."""
    if places is None:
        return logits
    index = places.to(logits.device)[..., None].expand(*logits.shape[:-3], *places.shape, logits.shape[-1])
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

    @classmethod
    def between(
        cls,
        bridge: "TransformerBridge",
        correct: str | Sequence[str],
        incorrect: str | Sequence[str] | None = None,
        position: PerRow = -1,
    ) -> Self:
        """Returns the metric for tokens given as text, one for all rows or one for each."""
        other = None if incorrect is None else _ids(bridge, incorrect)
        return cls(_ids(bridge, correct), other, position)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Both tokens, of all rows."""
        both = (*_each(self.correct), *(() if self.incorrect is None else _each(self.incorrect)))
        return tuple(sorted(set(both)))

    def places(self, rows: int, length: int) -> Int[Tensor, "row 1"]:
        """Returns the one position of each row."""
        return one_place(self.position, rows, length)

    def of(self, logits: Float[Tensor, "*cell row 1 token"], context: Context) -> Float[Tensor, "*cell row"]:
        """Returns the difference."""
        found = self._logit(logits, self.correct)
        return found if self.incorrect is None else found - self._logit(logits, self.incorrect)

    def _logit(self, logits: Tensor, tokens: PerRow) -> Tensor:
        columns = torch.tensor([self.tokens.index(token) for token in _each(tokens)], device=logits.device)
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

    def places(self, rows: int, length: int) -> Int[Tensor, "row 1"]:
        """Returns the one position of each row."""
        return one_place(self.position, rows, length)

    def of(self, logits: Float[Tensor, "*cell row 1 d_vocab"], context: Context) -> Float[Tensor, "*cell row"]:
        """Returns the probability, or its logarithm."""
        log_probs = log_softmax(logits[..., 0, :])
        ids = torch.tensor(_each(self.token), device=logits.device)
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

    @property
    def reference(self) -> str:
        """The reference's name."""
        return self.against

    def places(self, rows: int, length: int) -> Int[Tensor, "row 1"] | None:
        """Returns the one position of each row, or None."""
        return None if self.position is None else one_place(self.position, rows, length)

    def of(self, logits: Float[Tensor, "*cell row place d_vocab"], context: Context) -> Float[Tensor, "*cell row"]:
        """Returns the divergence."""
        if self.against not in context.references:
            raise InvalidArgumentError(
                f"KLDivergence compares with the run {self.against!r}, whose logits are not there",
                got=", ".join(map(repr, context.references)) or "no runs",
                fix="give it to the sweep as a source, as tokens or text",
            )
        whole = context.references[self.against].to(logits.device)
        reference = log_softmax(at_places(whole, self.places(*whole.shape[:2])))
        found = (reference.exp() * (reference - log_softmax(logits))).sum(-1)
        if self.position is not None or context.mask is None:
            return found.mean(-1)
        real = context.mask.to(found)
        return (found * real).sum(-1) / real.sum(-1)


@dataclass(frozen=True)
class NextTokenLoss(LogitMetric):
    """Each row's mean loss on its next tokens in nats, over predictions whose position and next token are both real."""

    kind: ClassVar[str] = "next_token_loss"

    def places(self, rows: int, length: int) -> Int[Tensor, "row place"]:
        """Returns all positions but the last."""
        return torch.arange(length - 1).expand(rows, -1)

    def of(self, logits: Float[Tensor, "*cell row place d_vocab"], context: Context) -> Float[Tensor, "*cell row"]:
        """Returns the loss."""
        if context.tokens is None:
            raise InvalidArgumentError(
                "NextTokenLoss needs the tokens that the logits are of",
                fix="clearspan.analysis.next_token_loss(tokens, mask) as a metric of logits alone",
            )
        nexts = context.tokens[:, 1:].to(logits.device)
        found = -log_softmax(logits).gather(-1, nexts.expand(logits.shape[:-1])[..., None])[..., 0]
        if context.mask is None:
            return found.mean(-1)
        counts = (context.mask[:, :-1].bool() & context.mask[:, 1:].bool()).to(found)
        return (found * counts).sum(-1) / counts.sum(-1)


Metric = LogitMetric | Callable[[Float[Tensor, "row pos d_vocab"]], Float[Tensor, "*row"]]
"""A metric that says what it reads, or any function of all logits that gives a number for each row, or one for all."""

KINDS: Mapping[str, type[LogitMetric]] = {
    kind.kind: kind for kind in (LogitDifference, Probability, KLDivergence, NextTokenLoss)
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
    return KINDS[kind](**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def one_place(position: PerRow, rows: int, length: int) -> Int[Tensor, "row 1"]:
    """Returns one position for each row, from 0."""
    for place in _each(position):
        if not -length <= place < length:
            raise InvalidArgumentError(
                f"the metric's position {place} is not in the run", expected=f"-{length} to {length - 1}"
            )
    places = torch.tensor(_each(position)) % length
    return places.expand(_checked(position, rows, "positions"))[:, None]


def log_softmax(logits: Tensor) -> Tensor:
    """Returns log-probabilities in nats, in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _each(value: PerRow) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _checked(value: PerRow, rows: int, what: str) -> int:
    if len(_each(value)) not in (1, rows):
        raise InvalidArgumentError(
            f"the metric's {what} are not one for each row", expected=f"1 or {rows}", got=str(len(_each(value)))
        )
    return rows


def _ids(bridge: "TransformerBridge", text: str | Sequence[str]) -> PerRow:
    if isinstance(text, str):
        return bridge.to_single_token(text)
    return tuple(bridge.to_single_token(token) for token in text)
