"""One intervention: a place in the model, and what is done there."""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, cast

import numpy as np
from torch import Tensor

from clearspan.checks import check_counts, check_flags, check_kind, wholes
from clearspan.errors import InvalidArgumentError
from clearspan.interventions.actions import Action, layer_of, parse_action
from clearspan.points import get_act_name

Places = tuple[int, ...] | None
"""Places on an axis, negative ones from its end; None for all."""


@dataclass(frozen=True)
class ByRow:
    """Positions that differ by row.

    Attributes:
        rows: The positions of each row.
    """

    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Span:
    """A stretch of positions, as `slice` has it: `Span(1)` is all but the first.

    Attributes:
        start: The first; negative from the last token (in generation, the prompt's).
        stop: The one before which it ends; None for the end, which in generation is open.
        step: The distance of one to the next.
    """

    start: int = 0
    stop: int | None = None
    step: int = 1

    def of(self, length: int, known: int) -> list[int]:
        """Returns its positions in a row.

        Args:
            length: Tokens of the row.
            known: Tokens from whose last one negative bounds count.
        """
        first = max(self.start + known, 0) if self.start < 0 else self.start
        end = length if self.stop is None else self.stop + known if self.stop < 0 else min(self.stop, length)
        return list(range(first, end, self.step))


Spots = tuple[int, ...] | ByRow | Span | None
"""Positions among a row's real tokens: some, some by row, a stretch, or all."""
Given = int | Sequence[int] | Sequence[Sequence[int]] | slice | Spots
"""The ways in which positions are given."""

PLACES = ("positions", "heads", "neurons", "key_positions", "columns")
"""The fields that choose places on an axis."""


@dataclass(frozen=True)
class Intervention:
    """What is done to the value at one hook point, or to a part of it. It is data: frozen, hashable, with a JSON form.

    Positions count among a row's real tokens, negative ones from its last. In generation they are positions of the
    whole sequence: each is written in the step that makes it, negative ones count from the prompt's last token, and
    all positions (None) include the new tokens.

    Attributes:
        point: A short name (`"z"`, `"resid_pre"`), with the layer next to it, or a hook point's full name.
        action: What becomes of the value.
        layer: The layer, for a short name; negative from the end.
        positions: Which positions (of the query, for scores and patterns): one, several, a list for each row, or a
            slice.
        heads: Which heads; for keys and values, which key/value heads.
        neurons: Which neurons of an MLP, or coordinates of a last axis of the residual stream.
        key_positions: Which positions attended to, for scores and patterns.
        columns: Columns of the tensors in place of positions, padding included.
        every_step: In generation, whether each new token is written too.

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
    positions: Given = None
    heads: Places | int | Sequence[int] = None
    neurons: Places | int | Sequence[int] = None
    key_positions: Given = None
    columns: Places = None
    every_step: bool = False

    def __post_init__(self) -> None:
        self._take(vars(self))

    def _take(self, given: Mapping[str, Any]) -> None:
        """Keeps fields as they are given, checked."""
        for name, value in given.items():
            object.__setattr__(self, name, _checked(name, value))
        if self.columns is not None and self.positions is not None:
            raise InvalidArgumentError("columns take the place of positions", got="both")

    @property
    def spots(self) -> Spots:
        """The positions as they are kept."""
        return cast("Spots", self.positions)

    @property
    def key_spots(self) -> Spots:
        """The key positions as they are kept."""
        return cast("Spots", self.key_positions)

    def name(self, n_layers: int) -> str:
        """Returns the full name of its hook point in a model of so many layers."""
        check_counts(n_layers=n_layers)
        layer = self.layer
        if layer is not None and not -n_layers <= layer < n_layers:
            raise InvalidArgumentError(
                f"there is no layer {layer}", expected=f"-{n_layers} to {n_layers - 1}", where=f"point {self.point!r}"
            )
        return _full_name(self.point, None if layer is None else layer % n_layers)

    def at(self, **places: Any) -> Self:
        """Returns the same elsewhere: with another layer, other positions, heads, neurons or key positions."""
        if not places.keys() <= vars(self).keys():
            return replace(self, **places)  # raises, naming the field
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        new._take(places)
        return new

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data; fields that say nothing are left out."""
        plain = {name: _plain(value) for name in PLACES if (value := getattr(self, name)) is not None}
        layer = {} if self.layer is None else {"layer": self.layer}
        every_step = {"every_step": True} if self.every_step else {}
        return {"point": self.point, **layer, **plain, **every_step, "action": self.action.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Returns the intervention of its JSON form.

        Raises:
            InvalidArgumentError: A field that no intervention has, or an unknown action.
        """
        check_kind(Mapping, data=data)
        known = {field.name for field in fields(cls)}
        if not {"point", "action"} <= data.keys() <= known:
            raise InvalidArgumentError(
                "this is no intervention",
                expected=f"point, action, and any of {', '.join(sorted(known - {'point', 'action'}))}",
                got=", ".join(sorted(data)),
            )
        places = {name: _from_plain(data[name]) for name in PLACES if data.get(name) is not None}
        action, every_step = parse_action(data["action"]), data.get("every_step", False)
        return cls(data["point"], action, data.get("layer"), **places, every_step=every_step)


_full_name = functools.cache(get_act_name)


def interventions_of(given: object) -> tuple[Intervention, ...]:
    """Returns one intervention or several as a tuple.

    Raises:
        InvalidArgumentError: Something else is given.
    """
    if type(given) is tuple and not given:  # in nearly every run
        return ()
    several = (given,) if isinstance(given, Intervention) else given
    found = tuple(several) if isinstance(several, Iterable) else (several,)
    for one in found:
        if not isinstance(one, Intervention):
            raise InvalidArgumentError(
                "this is no intervention", expected="clearspan.Intervention(point, action, ...)", got=repr(one)[:80]
            )
    return cast("tuple[Intervention, ...]", found)


def at_each(template: Intervention, places: Mapping[str, Sequence[Any]]) -> list[Intervention]:
    """Returns an intervention at each place of a product of fields, the last running fastest; places are checked once.

    Args:
        template: Has the other fields.
        places: The values of each field.
    """
    fields = {name: [_checked(name, one) for one in there] for name, there in places.items()}
    products = itertools.product(*fields.values())
    first = template.at(**dict(zip(fields, next(products), strict=True)))  # raises where fields do not go together
    found = [first]
    for at in products:
        new = object.__new__(type(template))
        vars(new).update(vars(first))
        vars(new).update(zip(fields, at, strict=True))
        found.append(new)
    return found


def _checked(field: str, value: Any) -> Any:
    """Returns a field of an intervention as it is kept."""
    match field:
        case "layer":
            return layer_of(value)
        case "positions" | "key_positions":
            return _as_spots(field, value)
        case "heads" | "neurons" | "columns":
            return _as_places(field, value)
        case "every_step":
            check_flags(every_step=value)
        case "point" if not isinstance(value, str):
            raise InvalidArgumentError("a hook point is given by its name", got=repr(value))
        case "action" if not isinstance(value, Action):
            raise InvalidArgumentError(
                "an intervention has an action", expected="such as clearspan.interventions.Zero()", got=repr(value)
            )
    return value


def _as_places(name: str, value: object) -> Places:
    if value is None:
        return None
    places = wholes(value)
    if not places:
        raise InvalidArgumentError(f"{name}={value!r} chooses no places", expected="a whole number, several, or None")
    return places


def _as_spots(name: str, value: object) -> Spots:
    match value:
        case ByRow() | Span():
            return value
        case slice(start=start, stop=stop, step=step):
            if step is not None and step < 1:
                raise InvalidArgumentError(f"{name}={value!r} goes backwards", expected="a step of 1 or more")
            return Span(start or 0, stop, 1 if step is None else step)
        case Tensor() | np.ndarray():
            return _as_spots(name, value.tolist())
        case tuple() | list() if value and all(isinstance(row, tuple | list | range) for row in value):
            return ByRow(tuple(_as_places(name, row) or () for row in value))
    return _as_places(name, value)


def _plain(value: object) -> object:
    match value:
        case ByRow(rows):
            return [list(row) for row in rows]
        case Span(start, stop, step):
            return {"start": start, "stop": stop, "step": step}
        case tuple():
            return list(value)
    raise AssertionError("places are one of these")


def _from_plain(value: Any) -> Any:
    return Span(**value) if isinstance(value, Mapping) else value
