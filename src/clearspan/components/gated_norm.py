"""Norms whose output a gate multiplies that is made of it (A.X K2)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clearspan.components.base import GeneralizedComponent
from clearspan.components.normalization import NormalizationBridge, NormParts
from clearspan.points import Derived, HookPoint, Side


class InnerNormBridge(NormalizationBridge):
    """The norm in a gated norm. It has its ends alone: its scale and normalised value are points of the gated norm."""

    def points(self) -> Iterator[HookPoint]:
        """Yields nothing."""
        return iter(())


@dataclass(eq=False, repr=False)
class GatedNormBridge(NormalizationBridge):
    """A norm, and a gate on its output: `hook_out` is `y * sigmoid(gate(y))` for `y = norm(x)`.

    Its parts are `norm` and `gate`, a module of linear maps. `hook_scale`, `hook_normalized` and the weights are the
    norm's; a write to these points reaches the gate too. `norm.hook_out` is what the gate reads and multiplies,
    `gate.hook_out` the gate before its sigmoid.
    """

    norm: InnerNormBridge = field(init=False)

    def required(self) -> Mapping[str, type[GeneralizedComponent]]:
        """Returns the norm and the gate."""
        return {"norm": InnerNormBridge, "gate": GeneralizedComponent}

    @property
    def is_linear_at_scale(self) -> bool:
        """Whether the output is linear in the input once the scale is given: not so, for the gate."""
        return False

    def points(self) -> Iterator[HookPoint]:
        """Yields the norm's scale and its normalised value."""
        parts = NormParts(self)
        parts.targets = (self.norm.place(Side.OUTPUT),)
        for point in super().points():
            assert isinstance(point.access, Derived), "a norm's own points are computed from its input"
            point.access = Derived(parts, point.access.part)
            yield point

    def gated(self, normed: Tensor, gate: Tensor) -> Tensor:
        """Returns the output for the norm's own and the gate before its sigmoid."""
        return normed * torch.sigmoid(gate)

    # --- the norm's weights ------------------------------------------------------------------------------------------

    @property
    def eps(self) -> float:
        """What the norm adds to the variance."""
        return self.norm.eps

    def has(self, name: str) -> bool:
        """Whether the norm has such a parameter."""
        return self.norm.has(name)

    def parameter(self, name: str) -> Tensor:
        """Returns a live parameter of the norm."""
        return self.norm.parameter(name)

    def checked_parameter(self, name: str) -> Tensor:
        """Returns a live parameter of the norm, if adapters make one weight of it."""
        return self.norm.checked_parameter(name)

    def weight(self, name: str) -> Tensor:
        """Returns a live parameter of the norm."""
        return self.norm.weight(name)

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a parameter of the norm."""
        return self.norm.shape(name)
