"""Metrics of draws: what each is of a run's logits. Positions count a row's real tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .rows import Rows

PerRow = int | tuple[int, ...]
"""One number for all rows, or one for each."""


def at_row(value: PerRow, row: int) -> int:
    """Returns what a number for all rows, or one of each, is for a row."""
    return value if isinstance(value, int) else value[row]


@dataclass(frozen=True)
class Metric:
    """A number for each row."""

    def of(self, logits: Tensor, rows: Rows, runs: Mapping[str, Tensor]) -> Tensor:
        """Returns the metric.

        Args:
            logits: `[row, column, d_vocab]`.
            rows: The run's input.
            runs: Logits of runs in the same columns, by name, among them `"base"`.
        """
        return torch.stack([self.row(logits[row], rows, row, runs) for row in range(len(logits))])

    def row(self, logits: Tensor, rows: Rows, row: int, runs: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class LogitDifference(Metric):
    correct: PerRow
    incorrect: PerRow | None = None
    position: PerRow = -1

    def row(self, logits: Tensor, rows: Rows, row: int, runs: Mapping[str, Tensor]) -> Tensor:
        at = logits[rows.column(row, at_row(self.position, row))]
        return at[at_row(self.correct, row)] - (0 if self.incorrect is None else at[at_row(self.incorrect, row)])


@dataclass(frozen=True)
class Probability(Metric):
    token: PerRow
    position: PerRow = -1
    is_log: bool = False

    def row(self, logits: Tensor, rows: Rows, row: int, runs: Mapping[str, Tensor]) -> Tensor:
        at = logits[rows.column(row, at_row(self.position, row))].log_softmax(-1)[at_row(self.token, row)]
        return at if self.is_log else at.exp()


@dataclass(frozen=True)
class KLDivergence(Metric):
    against: str = "base"
    position: PerRow | None = -1

    def row(self, logits: Tensor, rows: Rows, row: int, runs: Mapping[str, Tensor]) -> Tensor:
        position = self.position
        at = rows.columns[row] if position is None else [rows.column(row, at_row(position, row))]
        ours, theirs = (value[at].log_softmax(-1) for value in (logits, runs[self.against][row]))
        return (theirs.exp() * (theirs - ours)).sum(-1).mean()


@dataclass(frozen=True)
class NextTokenLoss(Metric):
    def row(self, logits: Tensor, rows: Rows, row: int, runs: Mapping[str, Tensor]) -> Tensor:
        """Each real token but the last predicts the next real one."""
        columns = rows.columns[row]
        log_probs, nexts = logits[columns[:-1]].log_softmax(-1), rows.ids[row, columns[1:]]
        return -log_probs.gather(-1, nexts[:, None]).mean()


@dataclass(frozen=True)
class Plain(Metric):
    """A function of all logits, which knows the mask itself: the mean over real tokens of some logits' squares.

    Attributes:
        token: Which logit counts with its sign too.
    """

    token: int

    def row(self, logits: Tensor, rows: Rows, row: int, runs: Mapping[str, Tensor]) -> Tensor:
        at = logits[rows.columns[row]]
        return (at[:, self.token] + 0.1 * at.pow(2).mean(-1)).mean()

    def function(self, mask: Tensor):
        """Returns it as a plain function of logits in the columns of a mask."""

        def total(logits: Tensor) -> Tensor:
            found = logits[..., self.token] + 0.1 * logits.pow(2).mean(-1)
            weights = mask.to(found)
            return (found.masked_fill(mask == 0, 0) * weights).sum(-1) / weights.sum(-1)

        return total
