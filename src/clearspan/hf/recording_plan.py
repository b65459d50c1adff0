"""Which modules give the raw tensors that a run keeps."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from clearspan.hf.keepers import Keepers, Names
from clearspan.points import Layout, Passed, Place, Side
from clearspan.tree import Ways


@dataclass(frozen=True)
class Ends:
    """What is kept of a call of the module at a path: its input, its outputs.

    Attributes:
        path: The module's path.
        call: Which call in a forward, or None where it is called once.
        entry: The input, or None.
        exits: The outputs.
        arguments: Further inputs.
    """

    path: str
    call: int | None
    entry: Place | None
    exits: tuple[Place, ...]
    arguments: tuple[Place, ...] = ()

    @property
    def are_plain(self) -> bool:
        """Whether the tensors are kept as they are, in each call of the module."""
        places = [place for place in (self.entry, *self.exits) if place is not None]
        return (
            self.call is None
            and len(self.exits) < 2
            and not self.arguments
            and all(place.layout is Layout.TOKENS and not place.is_overwritten and not place.item for place in places)
        )


@dataclass(frozen=True)
class Inside:
    """What is kept of the inside of the module at a path.

    Attributes:
        path: The module's path.
        call: Which call in a forward, or None where it is called once.
        places: What is kept, by where it is.
    """

    path: str
    call: int | None
    places: Mapping[Side | Passed, Place]

    @property
    def owner(self) -> str:
        """The module's path, and which call of it, as one string."""
        return next(iter(self.places.values())).owner

    @property
    def has_square(self) -> bool:
        """Whether scores or pattern are kept: they are computed, not referred to."""
        return not self.places.keys().isdisjoint((Side.SCORES, Side.PATTERN))


@dataclass(frozen=True)
class RecordingPlan:
    """Which modules give the raw tensors of a choice of points. One plan serves every run of that choice.

    It names modules by their paths: in each run they are those that are there.

    Attributes:
        places: The raw tensors.
        ends: Modules whose input or output is kept.
        insides: Modules whose inside is kept.
        ways: The ways to all these modules.
        keepers: What keeps the raw tensors that are kept as they are.
    """

    places: frozenset[Place]
    ends: tuple[Ends, ...]
    insides: tuple[Inside, ...]
    ways: Ways = field(compare=False)
    keepers: Keepers = field(default_factory=Keepers, compare=False, repr=False)

    @functools.cached_property
    def plain(self) -> Mapping[str, Ends]:
        """The ends whose tensors are kept as they are, by their modules' paths."""
        return {ends.path: ends for ends in self.ends if ends.are_plain}

    @functools.cached_property
    def plain_names(self) -> Mapping[str, Names]:
        """Under which these are kept."""
        return {
            path: (None if ends.entry is None else ends.entry.key, ends.exits[0].key if ends.exits else None)
            for path, ends in self.plain.items()
        }

    @functools.cached_property
    def others(self) -> Sequence[Ends]:
        """The other ends."""
        return [ends for ends in self.ends if not ends.are_plain]

    @classmethod
    def of(cls, places: Iterable[Place]) -> "RecordingPlan":
        """Returns the plan for these raw tensors."""
        places = frozenset(places)
        at: dict[tuple[str, int | None], list[Place]] = {}
        for place in sorted(places, key=lambda place: place.key):
            at.setdefault((place.module, place.call), []).append(place)
        ends, insides = [], []
        for (path, call), here in at.items():
            entries = [place for place in here if place.side is Side.INPUT]
            entry = next((place for place in entries if not place.argument), None)
            arguments = tuple(place for place in entries if place.argument)
            exits = tuple(place for place in here if place.side is Side.OUTPUT)
            if entry is not None or exits or arguments:
                ends.append(Ends(path, call, entry, exits, arguments))
            inside = {place.side: place for place in here if place.side.is_inside}
            if inside:
                insides.append(Inside(path, call, inside))
        return cls(places, tuple(ends), tuple(insides), Ways(dict.fromkeys(path for path, _ in at)))
