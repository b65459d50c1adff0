"""The weights that a cache computes with, checked to be those of its run."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clearspan.components import GeneralizedComponent, NormalizationBridge, part_kind
from clearspan.errors import EditedEntryError, UnreadableWeightError
from clearspan.hf.adapters import Adapted, kind_of, sources
from clearspan.model import Model
from clearspan.tree import Ways

CHUNK = 1 << 22
"""Elements of a weight that are read at a time for its checksum."""


Source = Tensor | Adapted


@dataclass(frozen=True)
class WeightSlot:
    """Where a weight is.

    Attributes:
        part: The component.
        name: The parameter's name there.
    """

    part: GeneralizedComponent
    name: str

    @property
    def path(self) -> str:
        """The weight's name in the model."""
        return f"{self.part.path}.{self.name}"


@dataclass(frozen=True)
class WeightSlots:
    """Which components of a model have the weights, the ways to their modules, and these modules' paths."""

    parts: tuple[GeneralizedComponent, ...]
    ways: Ways
    paths: tuple[str, ...]

    def sources(self, hf_model: nn.Module) -> list[Source]:
        """Returns all that the weights are made of now."""
        modules, found = self.ways.modules(hf_model), list[Source | None]()
        for path in self.paths:  # some dozens, in every run with a cache
            module = modules[path]
            found += module._parameters.values() if kind_of(type(module)) is None else sources(module)
        return [source for source in found if source is not None]

    def slots(self) -> Iterator[WeightSlot]:
        """Yields where each weight is now."""
        for part in self.parts:
            yield from (WeightSlot(part, name) for name, own in part.acting._parameters.items() if own is not None)


def weight_slots(model: Model, *, of_streams: bool = False) -> WeightSlots:
    """Returns where the weights are that a cache computes with: of what writes to the residual stream, or reads it.

    Attention's own are sinks, where it has them: patterns are computed with these.

    Args:
        model: The model.
        of_streams: Whether they are those alone that residual streams are read by: of norms, and after the last block.
    """
    key = "weight_slots", of_streams
    if key in model.remembered:
        return model.remembered[key]
    parts: list[GeneralizedComponent] = []
    for block in model.blocks:
        parts += [part for part in block.submodules.values() if isinstance(part, NormalizationBridge)]
        for part in () if of_streams else (*(sublayer.part for sublayer in block.sublayers), *block.feeders):
            ways_out = [inner for key, inner in part.submodules.items() if key in ("o", "out")]
            is_attn = part_kind(part.path.rpartition(".")[2]) == "attn"
            parts += [*([part] if is_attn else []), *ways_out]
    parts += model.components[model.components.index(model.blocks[-1]) + 1 :]
    paths = tuple(part.module_path for part in parts)
    return model.remembered.setdefault(key, WeightSlots(tuple(parts), Ways(paths), paths))


class RunWeights:
    """Tells whether the weights that look-ups and stacks compute with are still those of the run.

    In the process of the run they are known by their parameters, by torch's count of edits, and by the settings of
    adapters. In a cache from a file they are known by checksums, compared when a weight is first used.

    Args:
        model: The model.
        checksums: Those of a file, by the weight's name; by default the weights are those that the model has now.
        of_streams: Whether no others are needed than those of `weight_slots(of_streams=True)`, until `note_others`.
    """

    def __init__(self, model: Model, checksums: Mapping[str, int] | None = None, *, of_streams: bool = False) -> None:
        self._model = model
        self._where = weight_slots(model, of_streams=of_streams)
        self._checksums = checksums
        # This is done in every run with a cache, so it does no more than it must.
        self._seen = self._where.sources(model.hf_model)
        self._versions = _versions(self._seen)
        self._unchecked: dict[int, list[WeightSlot]] = {}
        for slot in self._where.slots() if checksums else ():
            if checksums and slot.path in checksums:
                self._unchecked.setdefault(_key(slot.part.sources(slot.name)[0]), []).append(slot)

    @functools.cached_property
    def _known(self) -> dict[int, object]:
        """What made the run's weights, in which version, by ids that `_seen` keeps from being another's."""
        seen = zip(self._seen, self._versions, strict=True)
        return {_key(source): version for source, version in seen if self._checksums is None}

    def note_others(self) -> None:
        """Notes weights that were left out, as they are now: they are needed, for a value that is no entry's."""
        every = weight_slots(self._model)
        if self._where is not every:
            self._where = every
            others = [source for source in every.sources(self._model.hf_model) if _key(source) not in self._known]
            self._known.update(zip(map(_key, others), _versions(others), strict=True))
            self._seen += others

    def check(self, made_of: Iterable[Source], what: str) -> None:
        """Raises if something that weights are made of is not as it was in the run.

        Args:
            made_of: Live parameters, and modules with adapters as they are.
            what: What they are, for the error's text.
        """
        # One that is offloaded cannot be read either, which says more.
        if not self._are_current([source for source in made_of if isinstance(source, Adapted) or not source.is_meta]):
            raise EditedEntryError(
                f"{what} not those of the cache's run",
                reason="they were changed since, or the cache is from a file of another checkpoint's",
                fix="run_with_cache again, or compute it before changing the weights",
            )

    def _are_current(self, made_of: Sequence[Source]) -> bool:
        found = list(zip(map(_key, made_of), _versions(made_of), strict=True))
        for key, version in found:
            if self._checksums is not None and key in self._unchecked:
                slots = self._unchecked.pop(key)
                if all(checksum(slot.part.weight(slot.name)) == self._checksums[slot.path] for slot in slots):
                    self._known[key] = version
        return all(key in self._known and self._known[key] == version for key, version in found)

    def checksums(self) -> dict[str, int]:
        """Returns the checksums of the weights that are as they were in the run and can be read, by name."""
        self.note_others()
        found = {}
        for slot in self._where.slots():
            try:
                if self._are_current(slot.part.sources(slot.name)):
                    found[slot.path] = checksum(slot.part.weight(slot.name))
            except UnreadableWeightError:
                continue
        return found


def _key(source: Source) -> int:
    return id(source.module if isinstance(source, Adapted) else source)


def _versions(made_of: Sequence[Source]) -> list[object]:
    """Returns torch's counts of edits of tensors, and those of modules with adapters."""
    try:
        return [source.version if isinstance(source, Adapted) else source._version for source in made_of]
    except RuntimeError:  # tensors made under inference mode count none
        counting = (None if isinstance(source, Tensor) and source.is_inference() else source for source in made_of)
        return [None if source is None else _versions([source])[0] for source in counting]


def checksum(values: Tensor) -> int:
    """Returns the sum of the bits of values as float32, which does not depend on the order of addition.

    So it is the same on any device, and for values in half precision the same as for these values in float32.
    """
    flat = values.detach().reshape(-1)
    parts = (flat[start : start + CHUNK] for start in range(0, flat.numel(), CHUNK))
    return sum(int(part.float().view(torch.int32).sum(dtype=torch.int64)) for part in parts)
