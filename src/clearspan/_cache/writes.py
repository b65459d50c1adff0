"""What parts of the model add to the residual stream: a sublayer's output, or the part of it that one head makes.

Two things lie between a sublayer's output and the stream: in some models a norm, and a multiplier. A part of the output
goes through them as a linear map if the norm keeps the scale of its run (`WayOut`). What is added once a part has
changed is computed with the norm of what then enters it (`Mix`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan._cache.lookup import CacheLookup
from clearspan._cache.readings import frozen
from clearspan._forward.readout import FrozenNorm, exact
from clearspan.components import NormalizationBridge, Sublayer
from clearspan.components.factors import scale_, scaled


def by_head(
    values: Float[Tensor, "*batch_pos head d"],
    weights: Float[Tensor, "head d m"],
    out: Float[Tensor, "head *batch_pos m"] | None = None,
) -> Float[Tensor, "head *batch_pos m"]:
    """Returns each head's values times its weight. `z` and `W_O` give what heads add to attention's output.

    Args:
        values: The values.
        weights: The weights.
        out: Where the result goes; its dtype is that of the product.
    """
    if out is None:
        return torch.einsum("...hd,hdm->h...m", values, weights.to(values))
    rows = values.to(out).flatten(0, -3).transpose(0, 1)
    torch.bmm(rows, weights.to(out), out=out.flatten(1, -2))
    return out


@dataclass(frozen=True)
class WayOut:
    """The way of a part of a sublayer's output to the residual stream, with the norm's scale as it was in a run.

    Attributes:
        norm: The norm on the sublayer's output, or None.
        multiplier: The residual multiplier, a number or `[d_model]`.
    """

    norm: FrozenNorm | None
    multiplier: float | Tensor

    @classmethod
    def of(cls, cache: CacheLookup, sublayer: Sublayer) -> Self:
        """Returns the way out of a sublayer in a cache's run."""
        norm = sublayer.norm_after
        return cls(None if norm is None else frozen(cache, norm), sublayer.multiplier)

    def __call__(self, part: Float[Tensor, "*component_batch_pos d_model"]) -> Tensor:
        """Returns what a part of the sublayer's output adds to the stream."""
        return scaled(part if self.norm is None else self.norm(part), self.multiplier)

    def onto(
        self,
        acts: Float[Tensor, "neuron *batch_pos"],
        rows: Float[Tensor, "neuron d_model"],
        directions: Float[Tensor, "d_model direction"],
    ) -> Float[Tensor, "neuron *batch_pos direction"]:
        """Returns what neurons add to directions of the stream, without forming anything `[..., d_model]`."""
        towards = scaled(directions.to(rows).T, self.multiplier)
        if self.norm is not None:
            towards = self.norm.pulled_back(towards)
        found = torch.einsum("n...,nk->n...k", acts, rows @ towards.T)
        return found if self.norm is None else (found / self.norm.scale).to(found)


@dataclass(frozen=True, eq=False)
class Mix:
    """What a sublayer adds to the residual stream when a part of its output changes, and the rest is as in a run.

    The norm on the output is computed anew, on the mix of what changed and what did not. So changes of several parts
    are summed before they go through it.

    Attributes:
        norm: The norm on the sublayer's output, or None.
        multiplier: The residual multiplier, a number or `[d_model]`.
        entering: What entered the norm in the run, in float32 at least.
        frozen: The norm with the scale of the run.
    """

    norm: NormalizationBridge | None
    multiplier: float | Tensor
    entering: Tensor
    frozen: FrozenNorm | None

    @classmethod
    def of(cls, cache: CacheLookup, sublayer: Sublayer) -> Self:
        """Returns the mix of a sublayer in a run whose cache has `entering_point`, if that is one."""
        norm = sublayer.norm_after
        if norm is None:
            return cls(None, sublayer.multiplier, torch.empty(0), None)
        entering = exact(cache[f"{norm.path}.hook_in"])
        return cls(norm, sublayer.multiplier, entering, frozen(cache, norm, norm.scale(entering)))

    @staticmethod
    def entering_point(sublayer: Sublayer) -> str | None:
        """Returns the hook point that `of` looks up, or None where no norm is on the output."""
        return None if sublayer.norm_after is None else f"{sublayer.norm_after.path}.hook_in"

    @cached_property
    def _added(self) -> Float[Tensor, "row pos d_model"]:
        assert self.frozen is not None, "there is a norm"
        return self.frozen(self.entering)

    def change_(self, change: Float[Tensor, "*part row pos d_model"]) -> Float[Tensor, "*part row pos d_model"]:
        """Makes changes of the output into those of what the sublayer adds, exactly, in place."""
        if self.norm is not None and self.frozen is not None:
            change += self.entering
            scale = self.norm.scale(change)
            if self.frozen.centres:
                change -= change.mean(-1, keepdim=True)
            change /= scale
            self._weigh_(change).sub_(self._added)
        return scale_(change, self.multiplier)

    def first_order_(self, change: Float[Tensor, "*part row pos d_model"]) -> Float[Tensor, "*part row pos d_model"]:
        """Makes changes of the output into those of what the sublayer adds, to the first order, in place."""
        if self.norm is not None and self.frozen is not None:
            self.frozen.slope(self.entering).apply_(change)
            self._weigh_(change)
        return scale_(change, self.multiplier)

    def _weigh_(self, change: Tensor) -> Tensor:
        weight = None if self.frozen is None else self.frozen.weight
        return change if weight is None else change.mul_(weight.detach().to(change))
