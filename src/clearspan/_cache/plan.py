"""Plans of caches: what each name adds to a cache, known before the run."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from clearspan._cache.memory import bytes_as_text
from clearspan._cache.slices import PosSlice, plain, position_index
from clearspan.checks import device_of
from clearspan.hf.recording import Recording
from clearspan.hf.rehearsal import ShapesAlone
from clearspan.hf.storages import Copies, Relocation
from clearspan.index import PointIndex
from clearspan.points import Address, HookPoint, Side
from clearspan.results import Shown, Summary, layer_ranges
from clearspan.shapes import Axes
from clearspan.transfers import Outbound


@dataclass(frozen=True, eq=False)
class Terms:
    """How the values of one run are kept.

    Attributes:
        rows: Rows of the input.
        positions: Positions of the input.
        index: The positions to keep, or None for all.
        device: Where they are kept, or None for where they are made.
        may_defer: Whether the inside of attention may be computed later.
    """

    rows: int
    positions: int
    index: slice | Tensor | None
    device: torch.device | None
    may_defer: bool

    @classmethod
    def of(
        cls, shape: tuple[int, int], pos_slice: PosSlice, device: torch.device | str | None, *, may_defer: bool = True
    ) -> Self:
        """Returns the terms for an input's rows and positions.

        Raises:
            InvalidArgumentError: `pos_slice` names no position of the run.
        """
        (rows, positions), pos_slice = shape, plain(pos_slice)
        index = position_index(pos_slice, positions)
        where = None if device is None else device_of(device)
        return cls(rows, positions, index, where, may_defer and index is None)

    @property
    def kept_positions(self) -> int:
        """How many positions are kept."""
        match self.index:
            case None:
                return self.positions
            case slice():
                return len(range(*self.index.indices(self.positions)))
        return len(self.index)

    def recording(self, copies: Copies, outbound: Outbound | None = None) -> Recording:
        """Returns a recording that keeps on these terms.

        Args:
            copies: Those made in the run by picking positions and by moving; what shared a storage shares one again.
            outbound: As for `Relocation`.
        """
        relocation = None if self.device is None else Relocation(self.device, copies, outbound)
        indices: dict[torch.device, Tensor] = {}

        def keep(tensor: Tensor, pos_dim: int) -> Tensor:
            if self.index is not None:
                tensor = copies.of(tensor, lambda whole: self._picked(whole, pos_dim, indices, relocation), pos_dim)
            return tensor if relocation is None else relocation(tensor)

        has_transform = self.index is not None or relocation is not None
        return Recording(self.rows, keep if has_transform else None, self.may_defer, relocation, self.positions)

    def _picked(
        self, tensor: Tensor, pos_dim: int, indices: dict[torch.device, Tensor], relocation: Relocation | None
    ) -> Tensor:
        if isinstance(self.index, slice):
            picked = tensor[(slice(None),) * pos_dim + (self.index,)].clone()
        else:
            assert self.index is not None, "it is asked only where positions are picked"
            if tensor.device not in indices:  # bringing them there waits for the device
                indices[tensor.device] = self.index.to(tensor.device)
            picked = tensor.index_select(pos_dim, indices[tensor.device])
        return picked if relocation is None else relocation(picked)


@dataclass(frozen=True)
class PlannedEntry:
    """One name of a cache that is planned.

    Attributes:
        name: The point's name.
        axes: Axes of what a look-up gives.
        shape: Their sizes.
        nbytes: Bytes that the cache keeps for it; 0 where they are counted for another name.
        look_up_nbytes: Bytes that its look-up adds and the cache keeps: of scores and patterns, computed when they are
            looked up.
    """

    name: str
    axes: Axes
    shape: tuple[int, ...]
    nbytes: int
    look_up_nbytes: int

    @property
    def written_shape(self) -> str:
        """Axes and sizes as text."""
        sizes = (axis if axis == "1" else f"{axis} {size}" for axis, size in zip(self.axes, self.shape, strict=True))
        return f"[{', '.join(sizes)}]"


@dataclass(frozen=True, repr=False)
class CachePlan(Shown):
    """What a cache will keep. Printing it shows the bytes of each name, layers that have the same in one row.

    A cache keeps each tensor of the forward once. Its bytes are counted for one of the names that show it; the others
    are `shared`.

    Attributes:
        entries: The names, in the order of the cache.
        rows: Rows of the input.
        positions: Positions of the input.
    """

    entries: tuple[PlannedEntry, ...]
    rows: int
    positions: int

    @property
    def total_bytes(self) -> int:
        """Bytes of the cache after the run, `cache.nbytes`."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def look_up_bytes(self) -> int:
        """Bytes that look-ups add, if every score and pattern is looked up."""
        return sum(entry.look_up_nbytes for entry in self.entries)

    def largest(self, count: int = 3) -> list[tuple[str, int]]:
        """Returns the names that take the most bytes, those of all layers as one `blocks.{l}...`, largest first."""
        sizes: dict[str, int] = {}
        for entry in self.entries:
            template = Address.parse(entry.name).template
            sizes[template] = sizes.get(template, 0) + entry.nbytes
        return sorted(((name, size) for name, size in sizes.items() if size), key=lambda item: -item[1])[:count]

    def fits(self, free_bytes: int) -> bool:
        """Whether the cache fits into so many bytes, before any look-up."""
        return self.total_bytes <= free_bytes

    def _summary(self) -> Summary:
        rows: dict[tuple[str, str, bool], list[PlannedEntry]] = {}
        for entry in self.entries:
            template = Address.parse(entry.name).template
            rows.setdefault((template, entry.written_shape, entry.nbytes > 0), []).append(entry)
        columns = ["name", "layers", "axes", "kept", "look-ups"]
        cells = [[name, _layers(here), shape, *_sizes(here)] for (name, shape, _), here in rows.items()]
        later = ""
        if self.look_up_bytes:
            later = f", {bytes_as_text(self.look_up_bytes)} more by look-ups"
        else:
            columns, cells = columns[:-1], [row[:-1] for row in cells]
        sizes = f"batch {self.rows}, pos {self.positions}"
        first = f"CachePlan: {len(self.entries)} entries, {bytes_as_text(self.total_bytes)} kept{later}; {sizes}"
        return Summary(first, columns, cells)


def _layers(here: Sequence[PlannedEntry]) -> str:
    layers = (Address.parse(entry.name).layer for entry in here)
    return layer_ranges([layer for layer in layers if layer is not None])


def _sizes(here: Sequence[PlannedEntry]) -> tuple[str, str]:
    kept, added = sum(entry.nbytes for entry in here), sum(entry.look_up_nbytes for entry in here)
    return bytes_as_text(kept) if kept else "shared", bytes_as_text(added) if added else ""


def plan_of(recording: Recording, points: Iterable[HookPoint], terms: Terms) -> CachePlan:
    """Returns the plan of a cache from the recording of a rehearsal.

    Args:
        recording: What the rehearsal kept.
        points: The cache's points, in its order.
        terms: On what terms it was kept.
    """
    there = [point for point in points if recording.has(point)]
    seen: set[int] = set()
    # A tensor that a raw end shares with a name of the vocabulary counts for that name.
    named = sorted(there, key=lambda point: point.name.endswith(_RAW_ENDS))
    kept = {point.name: _new_bytes(seen, recording.storages_for(point)) for point in named}
    entries = []
    for point in there:
        axes, shape = _shape(point, terms)
        looked_up = 0
        if point.place.side in (Side.SCORES, Side.PATTERN):
            with ShapesAlone():
                recording.raw(point.place)
            looked_up = _new_bytes(seen, recording.storages_for(point))
        entries.append(PlannedEntry(point.name, axes, shape, kept[point.name], looked_up))
    return CachePlan(tuple(entries), terms.rows, terms.positions)


_RAW_ENDS = (".hook_in", ".hook_out")


def _shape(point: HookPoint, terms: Terms) -> tuple[Axes, tuple[int, ...]]:
    """Returns the axes of what a look-up gives, and their sizes."""
    picked = {"pos": terms.kept_positions, "q_pos": terms.kept_positions}
    sizes = {**point.sizes, "batch": terms.rows, "k_pos": terms.positions, "1": 1, **picked}
    return point.axes, tuple(sizes[axis] for axis in point.axes)


def _new_bytes(seen: set[int], found: dict[int, int]) -> int:
    new = {storage: size for storage, size in found.items() if storage not in seen}
    seen.update(new)
    return sum(new.values())


@dataclass(frozen=True)
class Bound:
    """How many numbers a cache keeps at most: as if nothing were shared, and all scores and patterns were kept.

    Attributes:
        per_position: For each position of each row.
        per_pair: For each pair of positions of each row.
    """

    per_position: int
    per_pair: int

    @classmethod
    def of(cls, points: Iterable[HookPoint], index: PointIndex) -> "Bound":
        """Returns the bound of some points, by what all points tell of the raw tensors' widths."""
        places = {point.place.key: point.place for point in points}
        squares = [index.at(place)[0] for place in places.values() if place.layout.is_square]
        linear = (place for place in places.values() if not place.layout.is_square)
        per_position = sum(_width(index.at(place)) for place in linear)
        if not squares:
            return cls(per_position, 0)
        # A call of attention keeps queries and keys, and values where it is computed at once. Layers share their masks,
        # at most two kinds.
        widest = max(point.sizes.get(axis, 0) for point in index for axis in _WIDTHS)
        calls = {point.place.owner: point.sizes["head"] for point in squares}
        per_pair = sum(point.sizes["head"] for point in squares) + 2
        return cls(per_position + 3 * widest * sum(calls.values()), per_pair)

    def numbers(self, terms: Terms) -> int:
        """Returns the bound for what is kept on some terms."""
        return terms.rows * terms.kept_positions * (self.per_position + self.per_pair * terms.positions)


_WIDTHS = ("d_head", "d_head_qk", "d_head_v")
"""The largest of these axes is at least as wide as a head's queries, keys and values."""


def _width(points: Iterable[HookPoint]) -> int:
    """Returns the width of the raw tensor that some points show; one of them shows all of it."""
    return max(math.prod(point.sizes.get(axis, 1) for axis in point.axes) for point in points)
