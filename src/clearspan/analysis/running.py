"""What is kept of features while a stream of texts passes: the largest values with their tokens, means, a sample."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Batch


@dataclass(frozen=True, eq=False)
class Seen:
    """What was read of one batch of pieces of texts.

    Attributes:
        values: Of each feature at each position; meaningless at padding.
        batch: The pieces, filled on the right, on the device of the values.
        counted: Whether a position may be among the largest.
        texts: Number of each piece's text. Pieces of a text come one after the other.
        starts: Where in its text each piece starts.
    """

    values: Float[Tensor, "piece pos feature"]
    batch: Batch
    counted: Bool[Tensor, "piece pos"]
    texts: Int[Tensor, "piece"]
    starts: Int[Tensor, "piece"]


@dataclass(frozen=True, eq=False)
class Top:
    """The largest values of each feature, largest first; of equal ones, the one that came first is first.

    Attributes:
        values: -inf where there are fewer than `k`.
        texts: Number of the text; -1 likewise.
        positions: Position in the text.
        tokens: Token ids around it; -1 where the piece has no token.
        activations: The feature's values there, NaN likewise.
    """

    values: Float[Tensor, "feature k"]
    texts: Int[Tensor, "feature k"]
    positions: Int[Tensor, "feature k"]
    tokens: Int[Tensor, "feature k window"]
    activations: Float[Tensor, "feature k window"]

    def parts(self) -> tuple[Tensor, ...]:
        """Returns all of it in order of the fields."""
        return tuple(getattr(self, one.name) for one in fields(self))

    def cpu(self) -> "Top":
        """Returns it on the CPU."""
        return Top(*(part.cpu() for part in self.parts()))


class RunningTop:
    """Keeps the largest values of each feature; memory does not grow with the stream.

    Args:
        features: How many.
        k: How many values to keep of each.
        before: Tokens to keep before each.
        after: Tokens to keep after it.
        one_per_text: Whether a text has its largest value alone.
        device: Of the values.
    """

    def __init__(
        self, features: int, k: int, *, before: int, after: int, one_per_text: bool, device: torch.device
    ) -> None:
        self._offsets = torch.arange(-before, after + 1, device=device)
        self._one_per_text = one_per_text
        whole = (features, k, len(self._offsets))
        self.top = Top(
            torch.full(whole[:2], -torch.inf, device=device),
            torch.full(whole[:2], -1, device=device),
            torch.full(whole[:2], -1, device=device),
            torch.full(whole, -1, device=device),
            torch.full(whole, torch.nan, device=device),
        )

    def update(self, seen: Seen) -> None:
        """Takes in one batch."""
        ranked = seen.values.masked_fill(~seen.counted[..., None], -torch.inf)
        rising = (ranked.amax((0, 1)) > self.top.values[:, -1]).nonzero()[:, 0]
        if not len(rising):
            return
        ranked = ranked[..., rising]
        found = self._candidates(seen, rising, *(_by_text if self._one_per_text else self._by_position)(ranked, seen))
        kept = Top(*(part[rising] for part in self.top.parts()))
        if self._one_per_text:
            _drop_smaller_of_same_text(kept, found)
        merged = [torch.cat([old, new], dim=1) for old, new in zip(kept.parts(), found.parts(), strict=True)]
        merged[1].masked_fill_(merged[0] == -torch.inf, -1)
        order = merged[0].sort(dim=1, descending=True, stable=True).indices[:, : kept.values.shape[1]]
        row = torch.arange(len(rising), device=order.device)[:, None]
        for whole, part in zip(self.top.parts(), merged, strict=True):
            whole[rising] = part[row, order]

    def _by_position(
        self, ranked: Float[Tensor, "piece pos feature"], seen: Seen
    ) -> tuple[Int[Tensor, "feature c"], Int[Tensor, "feature c"]]:
        """Returns pieces and positions of the largest values of the batch, largest first."""
        flat = ranked.flatten(0, 1).T
        places = flat.sort(dim=1, descending=True, stable=True).indices[:, : self.top.values.shape[1]]
        return places // seen.batch.width, places % seen.batch.width

    def _candidates(self, seen: Seen, features: Int[Tensor, "feature"], pieces: Tensor, columns: Tensor) -> Top:
        """Returns the values at pieces and positions `[feature, candidate]`, and what is around them."""
        around = columns[..., None] + self._offsets
        lengths = seen.batch.lengths.to(around.device)
        inside = (around >= 0) & (around < lengths[pieces][..., None])
        around = around.clamp(0, seen.batch.width - 1)
        values = seen.values[pieces, columns, features[:, None]]
        return Top(
            values.where(seen.counted[pieces, columns], -torch.inf),
            seen.texts[pieces],
            seen.starts[pieces] + columns,
            seen.batch.ids[pieces[..., None], around].where(inside, -1),
            seen.values[pieces[..., None], around, features[:, None, None]].where(inside, torch.nan),
        )


def _by_text(
    ranked: Float[Tensor, "piece pos feature"], seen: Seen
) -> tuple[Int[Tensor, "feature text"], Int[Tensor, "feature text"]]:
    """Returns the piece and position of each text's largest value in the batch."""
    largest = ranked.max(1)
    pieces = []
    for text in seen.texts.unique_consecutive():
        own = (seen.texts == text).nonzero()[:, 0]
        pieces.append(own[largest.values[own].argmax(0)])
    chosen = torch.stack(pieces)
    return chosen.T, largest.indices.gather(0, chosen).T


def _drop_smaller_of_same_text(kept: Top, found: Top) -> None:
    """Puts -inf in place of one of two values of the same text. Only a batch's first text can have one already."""
    is_same = kept.texts == found.texts[:, :1]
    old = kept.values.masked_fill(~is_same, -torch.inf).amax(1, keepdim=True)
    is_larger = found.values[:, :1] > old
    kept.values.masked_fill_(is_same & is_larger, -torch.inf)
    found.values[:, :1].masked_fill_(is_same.any(1, keepdim=True) & ~is_larger, -torch.inf)


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
        if not len(self.sample) or not isinstance(share, int | float) or not 0 <= share <= 1:
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
