"""Norms of a run as linear maps.

Given the scale that a norm had in the run, it is linear but for its bias: what each part of its input is in its output
sums to the whole.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.bridge.cache_lookup import CacheLookup
from clearspan.components import NormalizationBridge
from clearspan.weights.processing import final_norm

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with a given scale, without its bias: `(value - mean(value)) / scale * weight`.

    It computes in the scale's dtype, which is float32 at least.

    Attributes:
        scale: What it divides by.
        weight: What it multiplies by, or None.
        centres: Whether it subtracts the mean, as a layer norm does and an RMS norm does not.
    """

    scale: Float[Tensor, "*batch_pos 1"]
    weight: Float[Tensor, "d_model"] | None
    centres: bool

    @classmethod
    def of(cls, cache: CacheLookup, norm: NormalizationBridge, scale: Tensor | None = None) -> "FrozenNorm":
        """Returns a norm with the scale that it had in a cache's run, or with another one."""
        has_weight = norm.module._parameters.get("weight") is not None
        weight = cache.weight(norm, norm.w) if has_weight else None
        scale = cache[f"{norm.path}.hook_scale"] if scale is None else scale
        exact = torch.promote_types(scale.dtype, torch.float32)
        return cls(scale.to(exact), weight, not norm.uses_rms_norm)

    def __call__(self, part: Float[Tensor, "*component_batch_pos d_model"]) -> Tensor:
        """Returns what a part of the norm's input is in its output."""
        wide = part.to(self.scale)
        centred = wide - wide.mean(-1, keepdim=True) if self.centres else wide
        normalized = centred / self.scale
        return (normalized if self.weight is None else normalized * self.weight.to(wide)).to(part)

    def pulled_back(self, direction: Float[Tensor, "*place d_model"]) -> Float[Tensor, "*place d_model"]:
        """Returns the direction in the norm's input for one in its output.

        `self(part) @ direction == part @ self.pulled_back(direction) / scale`, for which the norm's output need not be
        formed.
        """
        scaled = direction if self.weight is None else direction * self.weight.to(direction)
        return scaled - scaled.mean(-1, keepdim=True) if self.centres else scaled


def norm_at(bridge: "TransformerBridge", depth: int, *, mlp_input: bool) -> NormalizationBridge | None:
    """Returns the norm through which a layer (its MLP), or the unembedding, reads the residual stream, if any."""
    if depth == bridge.cfg.n_layers:
        return final_norm(bridge)
    block = bridge.blocks[depth]
    if block.norms_the_sum:
        return None
    shares_first = block.is_parallel and "ln2" not in block.submodules
    found = block.submodules.get("ln2" if mlp_input and not shares_first else "ln1")
    return found if isinstance(found, NormalizationBridge) else None


def through_norm(cache: CacheLookup, stack: Tensor, depth: int, *, mlp_input: bool) -> Tensor:
    """Returns what each component of a stack is in the output of the norm at a depth; where none is, the stack."""
    norm = norm_at(cache.bridge, depth, mlp_input=mlp_input)
    return stack if norm is None else FrozenNorm.of(cache, norm)(stack)
