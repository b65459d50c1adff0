"""One intervention: a place in the model, and what is done there."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from clearspan.errors import InvalidArgumentError
from clearspan.interventions.actions import Action, parse_action
from clearspan.points import get_act_name

Places = tuple[int, ...] | None
"""Places on an axis, negative ones from its end; None for all."""

PLACES = ("positions", "heads", "neurons", "key_positions")
"""The fields that choose places on an axis."""


@dataclass(frozen=True)
class Intervention:
    """What is done to the value at one hook point, or to a part of it. It is data: frozen, hashable, with a JSON form.

    Attributes:
        point: A short name (`"z"`, `"resid_pre"`), with the layer beside it, or a hook point's full name.
        action: What becomes of the value.
        layer: The layer, for a short name; negative from the end.
        positions: Which positions (of the query, for scores and patterns).
        heads: Which heads; for keys and values, which key/value heads.
        neurons: Which neurons of an MLP, or coordinates of a last axis of the residual stream.
        key_positions: Which positions attended to, for scores and patterns.

    A single number stands for a tuple of one.

    Example:
        >>> from clearspan.interventions import Zero
        >>> ablate = Intervention("z", Zero(), layer=3, heads=2)
        >>> ablate.heads, ablate.name(n_layers=5)
        ((2,), 'blocks.3.attn.hook_z')
        >>> Intervention.from_json(ablate.to_json()) == ablate
        True
    """

    point: str
    action: Action
    layer: int | None = None
    positions: Places | int = None
    heads: Places | int = None
    neurons: Places | int = None
    key_positions: Places | int = None

    def __post_init__(self) -> None:
        for name in PLACES:
            object.__setattr__(self, name, _as_places(name, getattr(self, name)))
        if not isinstance(self.action, Action):
            raise InvalidArgumentError(
                "an intervention has an action",
                expected="such as clearspan.interventions.Zero()",
                got=repr(self.action),
            )

    def name(self, n_layers: int) -> str:
        """Returns the full name of its hook point in a model of so many layers."""
        layer = self.layer
        if layer is not None and not -n_layers <= layer < n_layers:
            raise InvalidArgumentError(
                f"there is no layer {layer}", expected=f"-{n_layers} to {n_layers - 1}", where=f"point {self.point!r}"
            )
        return get_act_name(self.point, None if layer is None else layer % n_layers)

    def at(self, **places: int | tuple[int, ...] | None) -> Self:
        """Returns the same elsewhere: with another layer, other positions, heads, neurons or key positions."""
        return replace(self, **places)

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data; fields that say nothing are left out."""
        plain = {name: list(value) for name in PLACES if (value := getattr(self, name)) is not None}
        layer = {} if self.layer is None else {"layer": self.layer}
        return {"point": self.point, **layer, **plain, "action": self.action.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Returns the intervention of its JSON form.

        Raises:
            InvalidArgumentError: A field that no intervention has, or an unknown action.
        """
        known = {field.name for field in fields(cls)}
        if not {"point", "action"} <= data.keys() <= known:
            raise InvalidArgumentError(
                "this is no intervention",
                expected=f"point, action, and any of {', '.join(sorted(known - {'point', 'action'}))}",
                got=", ".join(sorted(data)),
            )
        places = {name: tuple(data[name]) for name in PLACES if data.get(name) is not None}
        return cls(data["point"], parse_action(data["action"]), data.get("layer"), **places)


def _as_places(name: str, value: object) -> Places:
    match value:
        case None:
            return None
        case bool():
            pass
        case int():
            return (value,)
        case tuple() | list() | range() if value and all(type(place) is int for place in value):
            return tuple(value)
    raise InvalidArgumentError(f"{name}={value!r} chooses no places", expected="a whole number, several, or None")
