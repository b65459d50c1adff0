"""Norms: their scale and normalised value, computed from the input."""

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.components.base import Binding, GeneralizedComponent
from clearspan.components.weights import Weight, write_through
from clearspan.points import Derivation, Derived, HookPoint, Place, Side


@dataclass(eq=False, repr=False)
class NormalizationBridge(GeneralizedComponent):
    """A layer norm or RMS norm.

    Attributes:
        uses_rms_norm: Whether it is an RMS norm, which does not centre; by default as the config says.
        weight_offset: What the model adds to the weight before it multiplies (1 in Gemma).
        axes: Axes of its input and output; it norms over the last.
    """

    _: KW_ONLY
    uses_rms_norm: bool | None = None
    weight_offset: float = 0.0
    axes: str = "batch pos d_model"

    of_heads: Mapping[str, int] = field(init=False, default_factory=dict)
    """Sizes of the heads of the attention that a live norm is in."""
    hook_scale: HookPoint = field(init=False)
    hook_normalized: HookPoint = field(init=False)
    _shown = ("affine", "eps", "normalize", "scale", "uses_rms_norm")

    def __post_init__(self) -> None:
        self.input_axes = self.output_axes = self.axes

    def bind(self, binding: Binding, path: str, parent: str = "") -> Self:
        """Returns the live norm."""
        live = super().bind(binding, path, parent)
        live.uses_rms_norm = binding.cfg.uses_rms_norm if self.uses_rms_norm is None else self.uses_rms_norm
        return live

    @Weight
    def w(self) -> Float[Tensor, "d_model"]:
        """What the norm multiplies by, `[d_model]`: live, or with an offset a copy that writes through."""
        weight = self.weight("weight")
        if not self.weight_offset:
            return weight
        return write_through(weight + self.weight_offset, weight, lambda shown: shown - self.weight_offset)

    @Weight
    def b(self) -> Float[Tensor, "d_model"]:
        """The bias `[d_model]`, the live parameter."""
        return self.weight("bias")

    @property
    def is_linear_at_scale(self) -> bool:
        """Whether the output is linear in the input once the scale is given."""
        return True

    @property
    def eps(self) -> float:
        """What the module adds to the variance."""
        own = self.setting("eps", "variance_epsilon")
        return self._fixed.eps if own is None else own

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, including the norm's own width."""
        width = dict.fromkeys(("width", "d_head"), self.shape("weight")[0]) if self.has("weight") else {}
        return {**super().sizes(), **self.of_heads, **width}

    def points(self) -> Iterator[HookPoint]:
        """Yields the scale and the normalised value."""
        source = self.place(Side.INPUT)
        parts = NormParts(self)
        scale_axes = " ".join([*self.input_axes.split()[:-1], "1"])
        yield self.point("hook_scale", source, Derived(parts, "scale"), dimensions=scale_axes)
        yield self.point("hook_normalized", source, Derived(parts, "normalized"), dimensions=self.input_axes)

    def scale(self, value: Tensor) -> Tensor:
        """Returns the norm's denominator `[..., 1]` in the input's dtype, computed in float32 at least.

        Layer norm: `sqrt(mean((value - mean(value))^2) + eps)`; RMS norm: `sqrt(mean(value^2) + eps)`.
        """
        exact = self._centred(value)
        return (exact.square().mean(-1, keepdim=True) + self.eps).sqrt().to(value.dtype)

    def normalize(self, value: Tensor, scale: Tensor | None = None) -> Tensor:
        """Returns the (centred) input divided by the scale, before weight and bias, in the input's dtype."""
        scale = self.scale(value.to(_exact(value))) if scale is None else scale
        return (self._centred(value) / scale).to(value.dtype)

    def affine(self, normalized: Tensor) -> Tensor:
        """Returns the norm's output for a normalised value."""
        scaled = normalized * self.w if self.has("weight") else normalized
        bias = self.bias_or_none()
        return scaled if bias is None else scaled + bias

    def _centred(self, value: Tensor) -> Tensor:
        exact = value.to(_exact(value))
        return exact if self.uses_rms_norm else exact - exact.mean(-1, keepdim=True)


def _exact(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


class NormParts(Derivation):
    """A norm's scale and normalised value; a write acts on the norm's output."""

    def __init__(self, norm: NormalizationBridge) -> None:
        self.norm = weakref.proxy(norm)  # which has the points that have this
        self.targets: tuple[Place, ...] = (norm.place(Side.OUTPUT),)

    def read(self, part: str, source: Tensor, edits: Mapping[str, Tensor]) -> Tensor:
        """Returns the scale, or the value normalised by the scale (as edited)."""
        match part:
            case "scale":
                return self.norm.scale(source)
            case _:
                return self.norm.normalize(source, edits.get("scale"))

    def weights_to_write(self) -> tuple[Tensor, ...]:
        """Returns the norm's weight and bias."""
        return tuple(parameter for parameter in self.norm.acting._parameters.values() if parameter is not None)

    def write(self, target: Place, raw: Tensor, source: Tensor, edits: Mapping[str, Tensor], entered: Tensor) -> Tensor:
        """Returns the norm's output for the edited scale or normalised value."""
        normalized = edits.get("normalized")
        if normalized is None:
            normalized = self.norm.normalize(source, edits["scale"])
        return self.norm.affine(normalized).to(raw.dtype)
