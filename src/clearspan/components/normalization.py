"""Norms: their scale and normalised value, computed from the input."""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.components.base import GeneralizedComponent
from clearspan.points import Derivation, Derived, HookPoint, Place, Side


class NormalizationBridge(GeneralizedComponent):
    """A layer norm or RMS norm, as the config's `uses_rms_norm` says."""

    hook_scale: HookPoint
    hook_normalized: HookPoint

    @property
    def w(self) -> Float[Tensor, "d_model"]:
        """The weight `[d_model]`, the live parameter."""
        return self.weight("weight")

    @property
    def b(self) -> Float[Tensor, "d_model"]:
        """The bias `[d_model]`, the live parameter."""
        return self.weight("bias")

    def points(self) -> Iterator[HookPoint]:
        """Yields the input, the scale and the normalised value."""
        source = self.place(Side.INPUT)
        parts = NormParts(self)
        yield self.point("hook_in", self.input_axes, source)
        yield self.point("hook_scale", "batch pos 1", source, Derived(parts, "scale"))
        yield self.point("hook_normalized", "batch pos d_model", source, Derived(parts, "normalized"))

    def scale(self, value: Tensor) -> Tensor:
        """Returns the norm's denominator `[..., 1]` in the input's dtype, computed in float32 at least.

        Layer norm: `sqrt(mean((value - mean(value))^2) + eps)`; RMS norm: `sqrt(mean(value^2) + eps)`.
        """
        exact = self._centred(value)
        return (exact.square().mean(-1, keepdim=True) + self.cfg.eps).sqrt().to(value.dtype)

    def normalize(self, value: Tensor, scale: Tensor | None = None) -> Tensor:
        """Returns the (centred) input divided by the scale, before weight and bias, in the input's dtype."""
        scale = self.scale(value.to(_exact(value))) if scale is None else scale
        return (self._centred(value) / scale).to(value.dtype)

    def affine(self, normalized: Tensor) -> Tensor:
        """Returns the norm's output for a normalised value."""
        bias = self.bias_or_none()
        return normalized * self.w if bias is None else normalized * self.w + bias

    def _centred(self, value: Tensor) -> Tensor:
        exact = value.to(_exact(value))
        return exact if self.cfg.uses_rms_norm else exact - exact.mean(-1, keepdim=True)


def _exact(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


class NormParts(Derivation):
    """A norm's scale and normalised value; a write acts on the norm's output."""

    def __init__(self, norm: NormalizationBridge) -> None:
        self.norm = norm
        self.target: Place = norm.place(Side.OUTPUT)

    def read(self, part: str, source: Tensor, edits: Mapping[str, Tensor]) -> Tensor:
        """Returns the scale, or the value normalised by the scale (as edited)."""
        match part:
            case "scale":
                return self.norm.scale(source)
            case _:
                return self.norm.normalize(source, edits.get("scale"))

    def write(self, output: Tensor, source: Tensor, edits: Mapping[str, Tensor], entered: Tensor) -> Tensor:
        """Returns the norm's output for the edited scale or normalised value."""
        normalized = edits.get("normalized")
        if normalized is None:
            normalized = self.norm.normalize(source, edits["scale"])
        return self.norm.affine(normalized).to(output.dtype)
