"""The largest values of many features over a stream, kept while it passes, with the tokens around each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Seen:
    """What was read of one batch of pieces of texts.

    Attributes:
        values: Of each feature at each position; at padding they say nothing.
        tokens: Token ids, filled on the right.
        counted: Whether a position may be among the largest.
        lengths: Real tokens of each piece.
        texts: Number of each piece's text. Pieces of a text come one after the other.
        starts: Where in its text each piece starts.
    """

    values: Float[Tensor, "piece pos feature"]
    tokens: Int[Tensor, "piece pos"]
    counted: Bool[Tensor, "piece pos"]
    lengths: Int[Tensor, "piece"]
    texts: Sequence[int]
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
        return self.values, self.texts, self.positions, self.tokens, self.activations

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
        device: Where values come.
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
        length = seen.tokens.shape[1]
        return places // length, places % length

    def _candidates(self, seen: Seen, features: Int[Tensor, "feature"], pieces: Tensor, columns: Tensor) -> Top:
        """Returns the values at pieces and positions `[feature, candidate]`, and what is around them."""
        around = columns[..., None] + self._offsets
        inside = (around >= 0) & (around < seen.lengths[pieces][..., None])
        around = around.clamp(0, seen.tokens.shape[1] - 1)
        counted = seen.counted[pieces, columns]
        values = seen.values[pieces, columns, features[:, None]]
        return Top(
            values.where(counted, -torch.inf),
            torch.tensor(seen.texts, device=pieces.device)[pieces],
            seen.starts[pieces] + columns,
            seen.tokens[pieces[..., None], around].where(inside, -1),
            seen.values[pieces[..., None], around, features[:, None, None]].where(inside, torch.nan),
        )


def _by_text(
    ranked: Float[Tensor, "piece pos feature"], seen: Seen
) -> tuple[Int[Tensor, "feature text"], Int[Tensor, "feature text"]]:
    """Returns the piece and position of each text's largest value in the batch."""
    largest = ranked.max(1)
    pieces = []
    for text in dict.fromkeys(seen.texts):
        own = torch.tensor([piece for piece, of in enumerate(seen.texts) if of == text], device=ranked.device)
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
