"""A vector as a sum of few directions of a large set, each with a positive weight: chosen one after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.words import Words
from clearspan.plots import Chart, chart_of
from clearspan.results import Columns, Result, counted

_ROUNDING = 1e-9
"""Of a float64 number beside the largest one: what is less is taken for zero."""


@dataclass(frozen=True, eq=False, repr=False)
class TokenDecomposition(Result):
    """A residual stream as a sum of few tokens' directions with positive weights, and what is left; on the CPU.

    Attributes:
        ids: The tokens, largest weight first.
        weights: Of directions of norm 1, in units of the stream.
        left: The stream less the sum.
        share: Of the stream's squared norm, how much the sum takes away: `1 - |left|² / |stream|²`.
        words: Texts of tokens.
    """

    ids: Int[Tensor, "token"]
    weights: Float[Tensor, "token"]
    left: Float[Tensor, "d_model"]
    share: float
    words: Words

    ranked_by: ClassVar[str | None] = "weight"

    @property
    def title(self) -> str:
        """How many directions it is, and what they account for."""
        return f"the stream as {counted(len(self.ids), 'direction')} of tokens, {self.share:.0%} of its squared norm"

    def columns(self) -> Columns:
        """Returns one row for each token."""
        return {"token": [self.words[token] for token in self.ids.tolist()], "weight": self.weights.tolist()}

    def chart(self) -> Chart:
        """Returns the weights as bars."""
        columns = self.columns()
        return chart_of(self.weights, {"token": tuple(map(str, columns["token"]))}, unit="weight", title=self.title)


def pursued(
    target: Float[Tensor, "d"],
    k: int,
    cosines: Callable[[Float[Tensor, "d"]], Float[Tensor, "atom"]],
    atoms: Callable[[list[int]], Float[Tensor, "n d"]],
) -> tuple[list[int], Float[Tensor, "n"], Float[Tensor, "d"]]:
    """Returns up to `k` directions that make up a vector with positive weights, these weights, and what is left.

    In each step the direction joins that lies nearest to what is left, and the weights of all are fitted anew
    (non-negative orthogonal matching pursuit). It ends early where none points the way that is left. Directions whose
    weight becomes 0 are left out.

    Args:
        target: The vector, in float64 on the CPU.
        k: Directions at the most.
        cosines: Returns, for a vector, its product with every direction of norm 1.
        atoms: Returns directions of norm 1 by number.
    """
    chosen: list[int] = []
    weights, left = target.new_zeros(0), target
    for _ in range(k):
        along = cosines(left).clone()
        along[chosen] = -torch.inf
        best = int(along.argmax())
        if along[best] <= 1e-5 * target.norm():
            break
        chosen.append(best)
        columns = atoms(chosen).to(target).T
        weights = nonnegative(columns, target)
        left = target - columns @ weights
    kept = [index for index in weights.argsort(descending=True).tolist() if weights[index] > 0]
    return [chosen[index] for index in kept], weights[kept], left


def nonnegative(columns: Float[Tensor, "d n"], target: Float[Tensor, "d"]) -> Float[Tensor, "n"]:
    """Returns the weights of at least 0 for which the sum of columns is nearest to a vector.

    References:
        Lawson and Hanson (1974), "Solving Least Squares Problems", chapter 23: the active-set method.
    """
    count = columns.shape[1]
    weights, is_free = target.new_zeros(count), torch.zeros(count, dtype=torch.bool)
    least = _ROUNDING * float(target.norm())
    for _ in range(3 * count):
        slope = (columns.T @ (target - columns @ weights)).masked_fill(is_free, -torch.inf)
        if slope.max() <= least:
            break
        is_free[slope.argmax()] = True
        while True:
            best = torch.zeros_like(weights)
            best[is_free] = torch.linalg.lstsq(columns[:, is_free], target[:, None]).solution[:, 0]
            falling = is_free & (best <= 0)
            if not falling.any():
                weights = best
                break
            # As far as the first weight that becomes 0, which is held there.
            step = (weights[falling] / (weights[falling] - best[falling])).min()
            weights = (weights + step * (best - weights)).masked_fill(~is_free, 0)
            is_free &= ~(falling & (weights <= least))
            weights = weights.masked_fill(~is_free, 0)
    return weights
