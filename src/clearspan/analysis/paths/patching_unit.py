"""Units of attribution patching: the parts of a layer's value at a hook point that are patched one at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.analysis.attribution.readout import exact
from clearspan.bridge import TransformerBridge
from clearspan.cache import ActivationCache
from clearspan.errors import InvalidArgumentError
from clearspan.points import Address, get_act_name
from clearspan.shapes import Axes

_UNIT_AXES = {
    "pos": "position",
    "q_pos": "position",
    "k_pos": "key_position",
    "head": "head",
    "kv_head": "head",
    "d_mlp": "neuron",
    "expert": "neuron",
}
"""Axes of values whose places are units, by the name that grids of a sweep have for them."""
POSITIONS = ("position", "key_position")

Gradients = Mapping[str, Tensor]
"""Gradients of the metric by the hook point's name."""


@dataclass(frozen=True)
class PatchingUnit:
    """What is patched: one place of the unit axes of the value at one hook point of a layer.

    Attributes:
        name: The hook point's short name.
        layers: In which layers.
        axes: The point's axes.
        sizes: Sizes of the axes that the model fixes.
        by_position: Whether each position is a unit, or all positions together.
    """

    name: str
    layers: tuple[int, ...]
    axes: Axes
    sizes: Mapping[str, int]
    by_position: bool

    @classmethod
    def of(cls, bridge: TransformerBridge, name: str, layers: Sequence[int] | None, by_position: bool) -> Self:
        """Returns the unit of a short name.

        Raises:
            UnknownPointError, AbsentPointError: There is no such point.
            InvalidArgumentError: The point is in no layer, or a layer does not exist.
        """
        n_layers = bridge.cfg.n_layers
        if Address.parse(get_act_name(name, 0)).layer is None:
            raise InvalidArgumentError(f"the point {name!r} is in no layer", fix="unit='resid_pre' for what enters one")
        if layers is None:
            layers = [layer for layer in range(n_layers) if get_act_name(name, layer) in bridge.hook_dict] or [0]
        if not layers or not all(0 <= layer < n_layers for layer in layers):
            raise InvalidArgumentError(f"layers={list(layers)}", expected=f"layers from 0 to {n_layers - 1}")
        chosen = tuple(dict.fromkeys(layers))
        points = [bridge.hook_dict[get_act_name(name, layer)] for layer in chosen]
        return cls(name, chosen, points[0].axes, points[0].sizes, by_position)

    def point(self, layer: int) -> str:
        """Returns the hook point's full name in a layer."""
        return get_act_name(self.name, layer)

    @property
    def points(self) -> list[str]:
        """The hook points of all layers."""
        return [self.point(layer) for layer in self.layers]

    @property
    def unit_axes(self) -> list[str]:
        """The axes of units within a layer, in the order of the point's."""
        found = [_UNIT_AXES[axis] for axis in self.axes if axis in _UNIT_AXES]
        return [axis for axis in found if self.by_position or axis not in POSITIONS]

    @property
    def summed(self) -> list[int]:
        """The point's axes that are within one unit, whose changes are added up."""
        kept = self.unit_axes
        return [place for place, axis in enumerate(self.axes) if place and _UNIT_AXES.get(axis) not in kept]

    def labels(self, length: int) -> dict[str, tuple[int, ...]]:
        """Returns the places on each axis of the scores, for inputs of so many positions."""
        sizes = dict.fromkeys(POSITIONS, length)
        sizes |= {_UNIT_AXES[axis]: size for axis, size in self.sizes.items() if axis in _UNIT_AXES}
        return {"layer": self.layers, **{axis: tuple(range(sizes[axis])) for axis in self.unit_axes}}


LayerEffect = Callable[[Tensor], Float[Tensor, "row *unit"]]
"""From the gradient at a hook point to the effect of each unit of a layer."""


@dataclass(frozen=True)
class Effects:
    """Effects of all units, as functions of gradients.

    Attributes:
        points: The hook point of each layer whose gradient is needed.
        functions: What the effects are, given it.
    """

    points: Sequence[str]
    functions: Sequence[LayerEffect]

    def __call__(self, gradients: Gradients) -> Float[Tensor, "row layer *unit"]:
        """Returns the effects, on the CPU."""
        pairs = zip(self.points, self.functions, strict=True)
        return torch.stack([effect(exact(gradients[name])).cpu() for name, effect in pairs], dim=1)


def first_order(unit: PatchingUnit, base: ActivationCache, source: ActivationCache) -> Effects:
    """Returns effects to the first order: `(source - base) . gradient` over what is within a unit."""

    def effect(point: str) -> LayerEffect:
        ours, theirs = exact(base[point]), exact(source[point])
        change = torch.where(theirs == ours, 0, theirs - ours)  # masked scores are -inf in both
        return lambda gradient: (change * gradient).sum(unit.summed) if unit.summed else change * gradient

    return Effects(unit.points, [effect(point) for point in unit.points])
