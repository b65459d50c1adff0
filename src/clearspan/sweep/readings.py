"""Readings: which logits the metrics of a sweep need, and the metrics of those that a batch computed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.errors import InvalidArgumentError
from clearspan.sweep.metrics import Context, LogitMetric, Metric, at_places
from clearspan.transfers import numbers_on, on_cpu


@dataclass(frozen=True)
class Readings:
    """Metrics by name, and what they read of a run's logits.

    Attributes:
        metrics: The metrics.
        context: What they need besides logits.
        positions: The columns whose logits are computed, in order.
        tokens: The tokens whose logits are computed, in order, or None for all.
    """

    metrics: Mapping[str, Metric]
    context: Context
    positions: tuple[int, ...]
    tokens: tuple[int, ...] | None

    @classmethod
    def of(cls, metrics: Mapping[str, Metric], context: Context) -> "Readings":
        """Returns the readings of metrics: of functions of all logits, every position and token."""
        positions: set[int] = set()
        tokens: set[int] | None = set()
        for metric in metrics.values():
            places = metric.places(context.batch) if isinstance(metric, LogitMetric) else None
            positions |= set(range(context.batch.width)) if places is None else set(places.flatten().tolist())
            own = metric.tokens if isinstance(metric, LogitMetric) else None
            tokens = None if tokens is None or own is None else tokens | set(own)
        read = None if tokens is None else tuple(sorted(tokens))
        return cls(metrics, context, tuple(sorted(positions)), read)

    def describe(self, d_vocab: int) -> str:
        """Returns what is read, in words."""
        tokens = f"all {d_vocab} tokens" if self.tokens is None else f"{len(self.tokens)} tokens"
        at = ", ".join(map(str, self.positions)) if len(self.positions) < 5 else f"{len(self.positions)} positions"
        return f"{tokens} at {'position ' if len(self.positions) == 1 else ''}{at}"

    def measured(self, logits: Float[Tensor, "cell row position token"]) -> dict[str, Float[Tensor, "cell row"]]:
        """Returns each metric of the logits at the readings' positions and tokens, on the CPU.

        A metric that gives one number for all rows has one row.
        """
        found = {
            name: self._declared(metric, logits) if isinstance(metric, LogitMetric) else _called(metric, logits)
            for name, metric in self.metrics.items()
        }
        return dict(zip(found, on_cpu(map(_exact, found.values())), strict=True))

    def _declared(
        self, metric: LogitMetric, logits: Float[Tensor, "cell row position token"]
    ) -> Float[Tensor, "cell row"]:
        if metric.tokens is not None and metric.tokens != self.tokens:
            columns = metric.tokens if self.tokens is None else [self.tokens.index(token) for token in metric.tokens]
            logits = logits[..., numbers_on(logits.device, list(columns))]
        places = metric.places(self.context.batch)
        if places is not None:
            places = torch.searchsorted(torch.tensor(self.positions), places.contiguous())
        return metric.of(at_places(logits, places), self.context)


def _called(metric: Metric, logits: Float[Tensor, "cell row pos d_vocab"]) -> Float[Tensor, "cell row"]:
    """Returns a plain function of each cell's logits."""
    found = [_by_row(metric, cell) for cell in logits]
    return torch.stack(found if len({one.device for one in found}) == 1 else on_cpu(found))


def measured(metric: Metric, logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, "row"]:
    """Returns what a metric says of a run's logits, one number for each row, or one number in all, on the CPU.

    Raises:
        InvalidArgumentError: The metric returned something else.
    """
    return on_cpu([_by_row(metric, logits)])[0]


def _by_row(metric: Metric, logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, "row"]:
    found = metric(logits)
    if not isinstance(found, Tensor) or found.ndim > 1 or (found.ndim == 1 and len(found) != len(logits)):
        raise InvalidArgumentError(
            "the metric is not a number for each row",
            expected=f"a tensor [batch={len(logits)}], or of no axes",
            got=str(list(found.shape)) if isinstance(found, Tensor) else type(found).__name__,
        )
    return _exact(found).reshape(-1)


def _exact(values: Tensor) -> Tensor:
    """Returns measured numbers outside the graph, in float32 at least."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))
