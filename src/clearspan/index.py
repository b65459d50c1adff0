"""The index of a model's hook points: by name and alias, by predicate, by the part of the forward they are in."""

import re
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from clearspan.architectures import ArchitectureAdapter
from clearspan.components import GeneralizedComponent
from clearspan.errors import AbsentPointError, InvalidArgumentError, PointNotReachedError, UnknownPointError
from clearspan.points import (
    Address,
    Derived,
    HookPoint,
    NamesFilter,
    Place,
    ReadOnly,
    entry_of,
    is_in_vocabulary,
    is_short_name,
    nearest,
)
from clearspan.points.names import check_name, check_predicate
from clearspan.results import Shown, Summary, counted, layer_ranges, shortened
from clearspan.shapes import Axes, with_sizes

TOKEN_AXES = ("batch", "pos")
"""Axes of points that hold token ids, or positions."""

Segment = tuple[int | None, int | None]
"""The first block run and the one before which the run stops; None for 'from the input' and 'to the logits'."""
Names = str | Sequence[str] | re.Pattern[str] | Callable[[str], bool]
"""A name, several, a compiled pattern that is searched for in names, or a predicate of names."""


class HookDict(dict[str, HookPoint]):
    """Names to hook points; a name that is not there raises as everywhere else, with the nearest ones."""

    def __init__(self, index: "PointIndex") -> None:
        super().__init__()
        self._index = weakref.ref(index)  # which has this

    def __missing__(self, name: str) -> HookPoint:
        index = self._index()
        if index is None:
            raise KeyError(name)
        return index.find(name)


class PointIndex:
    """Finds hook points.

    Args:
        points: All points by canonical name.
        components: Live components in the order of the forward, blocks one by one.
        adapter: The adapter, which says why a point of the vocabulary is absent.

    Attributes:
        by_name: Every name, aliases included, to its point.
    """

    def __init__(
        self,
        points: Mapping[str, HookPoint],
        components: Sequence[GeneralizedComponent],
        adapter: ArchitectureAdapter,
    ) -> None:
        self.by_name = HookDict(self)
        self.by_name.update({name: point for point in points.values() for name in (point.name, *point.aliases)})
        self._points = list(points.values())
        self._at: dict[Place, list[HookPoint]] = {}
        for point in self._points:
            self._at.setdefault(point.place, []).append(point)
        self._adapter = adapter
        self._absences = dict(
            reason for component in components for part in component.walk() for reason in part.absences()
        )
        self._absences |= adapter.refused
        n_layers = adapter.cfg.n_layers
        paths = [component.path for component in components]
        first = next(index for index, path in enumerate(paths) if path.startswith("blocks."))
        before = {"hook_embed", "hook_pos_embed", "hook_type_embed", *paths[:first]}
        self._stage = {point.name: _stage(point.name, before, n_layers) for point in self._points}

    def __iter__(self) -> Iterator[HookPoint]:
        return iter(self._points)

    def add(self, points: Iterable[HookPoint], host: HookPoint) -> None:
        """Adds points whose values are computed where `host` is, behind it."""
        behind = self._points.index(host) + 1
        for place, point in enumerate(points):
            self._points.insert(behind + place, point)
            self.by_name[point.name] = point
            self._at[point.place] = [point]
            self._stage[point.name] = self._stage[host.name]

    def remove(self, points: Iterable[HookPoint]) -> None:
        """Takes points out that `add` added."""
        for point in points:
            self._points.remove(point)
            del self.by_name[point.name], self._at[point.place], self._stage[point.name]

    def at(self, place: Place) -> list[HookPoint]:
        """Returns the points at a place, in the order in which they fire."""
        return self._at.get(place, [])

    def find(self, name: str) -> HookPoint:
        """Returns the point of a name or alias.

        Raises:
            AbsentPointError: The vocabulary has the name, this architecture does not.
            UnknownPointError: Nothing has the name.
        """
        check_name(name)
        if name in self.by_name:
            return self.by_name[name]
        reason = self.why_absent(name)
        close = nearest(name, self.by_name)
        if reason is not None:
            there = self.layers_with(name)
            raise AbsentPointError(
                f"{self._adapter.cfg.architecture} has no hook point {name!r}",
                expected=f"a layer that has it: {', '.join(map(str, there))}" if there else None,
                reason=reason,
                nearest=close,
            )
        layer = Address.parse(name).layer
        n_layers = self._adapter.cfg.n_layers
        if layer is not None and not 0 <= layer < n_layers:
            raise UnknownPointError(
                f"no hook point {name!r}", expected=f"a layer from 0 to {n_layers - 1}", got=f"layer {layer}"
            )
        fix = f"clearspan.get_act_name({name!r}, layer)" if is_short_name(name) else "bridge.hook_dict has every name"
        raise UnknownPointError(f"no hook point {name!r}", nearest=close, fix=fix)

    def layers_with(self, name: str) -> list[int]:
        """Returns the layers that have a point of this name, whichever layer the name is of; none outside blocks."""
        address = Address.parse(name)
        if address.layer is None:
            return []
        return [layer for layer in range(self._adapter.cfg.n_layers) if str(address.at(layer)) in self.by_name]

    def why_absent(self, name: str) -> str | None:
        """Returns why this model lacks a point of the vocabulary, or None where it has it or nothing does."""
        check_name(name)
        layer = Address.parse(name).layer
        if name in self.by_name or (layer is not None and not 0 <= layer < self._adapter.cfg.n_layers):
            return None
        if name in self._absences:
            return self._absences[name]
        return entry_of(name).absent if is_in_vocabulary(name) else None

    def select(self, names: NamesFilter, segment: Segment = (None, None)) -> list[HookPoint]:
        """Returns the points of a name, a list of names or a predicate, in the order of the forward.

        With None, all points in the segment. A predicate is asked about every name, aliases too.

        Raises:
            UnknownPointError: A name is unknown, or the predicate holds for none.
            PointNotReachedError: A point asked for by name is outside the segment.
        """
        if callable(names) or isinstance(names, re.Pattern):
            return [point for point, _ in self.matching(names, segment)]
        if names is None:
            return [point for point in self._points if self._is_within(point, segment)]
        wanted = _listed(names)
        asked = {self.find(name).name for name in wanted}
        points = [point for point in self._points if point.name in asked]
        self.check_reached(points, segment)
        return points

    def matching(
        self, names: Names, segment: Segment = (None, None), with_gradient: bool = False
    ) -> list[tuple[HookPoint, str]]:
        """Returns the points of a name or predicate, each with the name under which it was found.

        A predicate is asked about the points in the segment, and with `with_gradient` only about those that have one.
        """
        if isinstance(names, re.Pattern):
            holds: Callable[[str], object] = names.search
        elif callable(names):
            check_predicate(names)
            holds = names
        else:
            return [(self.find(name), name) for name in dict.fromkeys(_listed(names))]
        found: dict[str, tuple[HookPoint, str]] = {}
        is_part = segment != (None, None)
        for point in self._points:  # every name is asked about, in each run with a predicate
            if (is_part and not self._is_within(point, segment)) or (with_gradient and not _has_gradient(point)):
                continue
            holding = [name for name in (point.name, *point.aliases) if holds(name)]
            if holding:
                found[point.name] = point, holding[0]
        if not found:
            raise UnknownPointError(
                "the predicate holds for no hook point",
                where=f"{len(self.by_name)} names of {self._adapter.cfg.architecture}",
                fix="try it on the names in bridge.hook_dict",
            )
        return list(found.values())

    def layer_of(self, name: str) -> int:
        """Returns the layer that a point is in: -1 before the blocks, `n_layers` after them."""
        return self._stage[self.find(name).name]

    def check_reached(self, points: Iterable[HookPoint], segment: Segment) -> None:
        """Raises if one of the points is in a part of the forward that is not run."""
        for point in points:
            if not self._is_within(point, segment):
                start, stop = segment
                raise PointNotReachedError(
                    f"{point.name} is not reached in this run",
                    where=f"start_at_layer={start}, stop_at_layer={stop}",
                    reason="it is in a part of the model that is left out",
                    fix="take the hook off, or run that part",
                )

    def _is_within(self, point: HookPoint, segment: Segment) -> bool:
        start, stop = segment
        stage = self._stage[point.name]
        return (start is None or stage >= start) and (stop is None or stage < stop)


def _listed(names: object) -> list[str]:
    """Returns one name or several as a list.

    Raises:
        InvalidArgumentError: They are neither.
    """
    wanted = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else []
    if not wanted or not all(isinstance(name, str) for name in wanted):
        raise InvalidArgumentError(
            "cannot tell which hook points are meant",
            expected="a name, a list of names, a compiled pattern, or a predicate of names",
            got=repr(names),
        )
    return [name for name in wanted if isinstance(name, str)]


def _stage(name: str, before: Collection[str], n_layers: int) -> int:
    """Returns the layer that a point is in: -1 before the blocks, `n_layers` after them.

    Args:
        name: The point's name.
        before: Components, and points outside of any, that come before the blocks.
        n_layers: Blocks.
    """
    address = Address.parse(name)
    if address.layer is not None:
        return address.layer
    return -1 if (address.component.partition(".")[0] or address.leaf) in before else n_layers


@dataclass(frozen=True)
class PointRow:
    """One hook point.

    Attributes:
        name: Its canonical name.
        axes: Its axes.
        sizes: The sizes that the model fixes, axis by axis; None where the input does.
        tap: How it is reached.
        value: What it shows.
        write: What a write changes.
        aliases: Other names of it.
    """

    name: str
    axes: Axes
    sizes: tuple[int | None, ...]
    tap: str
    value: str
    write: str
    aliases: tuple[str, ...]

    @classmethod
    def of(cls, point: HookPoint) -> "PointRow":
        """Returns the row of a point."""
        entry = entry_of(point.name)
        how = "computed from the " if isinstance(point.access, Derived) else ""
        sizes = tuple(point.sizes.get(axis) for axis in point.axes)
        return cls(point.name, point.axes, sizes, f"{how}{point.place}", entry.value, entry.write, point.aliases)

    @property
    def shape(self) -> str:
        """Axes and sizes as text."""
        return with_sizes(self.axes, dict(zip(self.axes, self.sizes, strict=True)))


class PointTable(Shown, Sequence[PointRow]):
    """Rows of hook points, in the order of the forward. Printing it shows names, axes with sizes, and places.

    As a last line, many rows are shown with the same point of all layers in one.
    """

    def __init__(self, rows: Iterable[PointRow]) -> None:
        self._rows = tuple(rows)

    @classmethod
    def of(cls, points: Iterable[HookPoint]) -> "PointTable":
        """Returns the table of some points."""
        return cls(map(PointRow.of, points))

    @overload
    def __getitem__(self, index: int) -> PointRow: ...

    @overload
    def __getitem__(self, index: slice) -> "PointTable": ...

    def __getitem__(self, index: int | slice) -> "PointRow | PointTable":
        """Returns a row, or a table of some."""
        return self._rows[index] if isinstance(index, int) else PointTable(self._rows[index])

    def __len__(self) -> int:
        return len(self._rows)

    def layers(self) -> dict[str, list[int]]:
        """Returns the layers that have each point of a block, by its name with `{l}` in place of the layer.

        Example:
            >>> import clearspan
            >>> clearspan.boot("tiny-bigcode").points().layers()["blocks.{l}.attn.hook_q"]
            [0, 1, 2, 3, 4]
        """
        found: dict[str, list[int]] = {}
        for row in self._rows:
            for name in (row.name, *row.aliases):
                address = Address.parse(name)
                if address.layer is not None:
                    found.setdefault(address.template, []).append(address.layer)
        return found

    def __str__(self) -> str:
        names = max((len(row.name) for row in self._rows), default=0)
        shapes = max((len(row.shape) for row in self._rows), default=0)
        return "\n".join(f"{row.name:{names}}  {row.shape:{shapes}}  {row.tap}" for row in self._rows)

    def __repr__(self) -> str:
        fits_as_it_is = shortened(str(self), "") == str(self)
        return str(self) if fits_as_it_is else shortened(self._folded(["axes"]).text(), "print(...)")

    def _summary(self) -> Summary:
        return self._folded(["axes", "value"])

    def _folded(self, columns: Sequence[str]) -> Summary:
        heading = f"{counted(len(self), 'hook point')}, layers that have the same in one row"
        named = ((row.name, [row.shape, row.value][: len(columns)]) for row in self._rows)
        return _by_template(heading, named, columns)


class HookPoints(Shown, Mapping[str, HookPoint]):
    """Every name, aliases included, to its hook point; it cannot be written to."""

    def __init__(self, by_name: HookDict) -> None:
        self._by_name = by_name

    def __getitem__(self, name: str) -> HookPoint:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def _summary(self) -> Summary:
        heading = f"{counted(len(self), 'name')} of hook points, layers that have the same in one row"
        named = (
            (name, [with_sizes(point.axes, point.sizes), "" if point.name == name else point.name.rpartition(".")[2]])
            for name, point in self._by_name.items()
        )
        return _by_template(heading, named, ["axes", "another name of"])


def _by_template(heading: str, named: Iterable[tuple[str, list[str]]], columns: Sequence[str]) -> Summary:
    """Returns a table of names with some texts each; layers whose texts are the same are one row."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for name, texts in named:
        address = Address.parse(name)
        layers = rows.setdefault((address.template, *texts), [])
        layers.extend([] if address.layer is None else [address.layer])
    cells = [[template, layer_ranges(layers), *texts] for (template, *texts), layers in rows.items()]
    return Summary(heading, ["name", "layers", *columns], cells)


def _has_gradient(point: HookPoint) -> bool:
    """Returns whether a point can have a gradient: whole numbers cannot, nor what the model does not compute with."""
    is_whole = point.axes == TOKEN_AXES or point.name.endswith("hook_expert_indices")
    return not is_whole and not isinstance(point.access, ReadOnly)
