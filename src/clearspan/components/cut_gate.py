"""Gated MLPs whose gate is cut off before its activation function."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from clearspan.components.base import GeneralizedComponent
from clearspan.components.mlp import GatedMLPBridge
from clearspan.points import HookPoint, Side


@dataclass(eq=False, repr=False)
class CutGateMLPBridge(GatedMLPBridge):
    """A gated MLP that sets most of the gate to zero before its activation function (Gemma 3n): a further part `act`.

    `hook_pre` is the input of the activation function, after the cut; the map's output is `gate.hook_out`.
    """

    def required(self) -> Mapping[str, type[GeneralizedComponent]]:
        """Returns the three maps and the activation function."""
        return {**super().required(), "act": GeneralizedComponent}

    def points(self) -> Iterator[HookPoint]:
        """Yields the gate after the cut, the linear branch, and their product."""
        yield self.point("hook_pre", self.submodules["act"].place(Side.INPUT))
        yield from super().points()
