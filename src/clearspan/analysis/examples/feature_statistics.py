"""What the values of features are like over a stream, kept while it passes."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.errors import InvalidArgumentError


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """The values of features over positions, on the CPU.

    Attributes:
        positions: How many were seen.
        mean: Over positions.
        active: Share of positions at which the feature is above 0.
        sample: Values at positions drawn uniformly, where they were asked for; in no order.
    """

    positions: int
    mean: Float[Tensor, "feature"]
    active: Float[Tensor, "feature"]
    sample: Float[Tensor, "place feature"]

    def quantile(self, share: float) -> Float[Tensor, "feature"]:
        """Returns the value below which a share of the sample lies, by feature.

        Raises:
            InvalidArgumentError: There is no sample, or no such share.
        """
        if not len(self.sample) or not 0 <= share <= 1:
            raise InvalidArgumentError(
                f"there is no quantile {share}",
                expected="0 to 1, of a sample",
                got=f"{share}, of a sample of {len(self.sample)} positions",
                fix="max_activating_examples(..., sample=10_000)",
            )
        return self.sample.quantile(share, dim=0)


class RunningStatistics:
    """Takes in values while they come; memory does not grow with the stream.

    Args:
        features: How many.
        sample: Positions to draw uniformly, at most.
        seed: Of the draw. Torch's own seed is neither read nor changed.
    """

    def __init__(self, features: int, *, sample: int, seed: int) -> None:
        self._positions = 0
        self._sum = torch.zeros(features, dtype=torch.double)
        self._above = torch.zeros(features, dtype=torch.long)
        self._kept = torch.empty(0, features)
        self._lots = torch.empty(0)
        self._size = sample
        self._generator = torch.Generator().manual_seed(seed)

    def update(self, values: Float[Tensor, "place feature"]) -> None:
        """Takes in the values at some positions."""
        self._positions += len(values)
        self._sum += values.sum(0).cpu().double()
        self._above += (values > 0).sum(0).cpu()
        if self._size:
            self._draw(values)

    def _draw(self, values: Float[Tensor, "place feature"]) -> None:
        """Each position draws a lot, and the largest lots stay: a uniform sample, however long the stream."""
        lots = torch.rand(len(values), generator=self._generator, dtype=torch.double)
        least = self._lots[-1] if len(self._lots) == self._size else -1
        enter = lots > least
        lots = torch.cat([self._lots, lots[enter]]).sort(descending=True)
        kept = torch.cat([self._kept, values[enter.to(values.device)].cpu()])
        self._lots, self._kept = lots.values[: self._size], kept[lots.indices[: self._size]]

    def result(self) -> FeatureStatistics:
        """Returns what was found so far. Means over no positions are NaN."""
        mean, active = (total / self._positions for total in (self._sum, self._above))
        return FeatureStatistics(self._positions, mean.float(), active.float(), self._kept)
