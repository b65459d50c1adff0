"""The weights that a cache computes with, checked to be those of its run."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clearspan.components import GeneralizedComponent, NormalizationBridge
from clearspan.errors import EditedEntryError, UnreadableWeightError
from clearspan.model import Model
from clearspan.tree import Branch, branches, modules_at

CHUNK = 1 << 22
"""Elements of a weight that are read at a time for its checksum."""


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
    """Where the weights of a model are: their modules' paths and the ways to them, in the order of the slots."""

    slots: tuple[WeightSlot, ...]
    ways: tuple[Branch, ...]
    modules: tuple[str, ...]

    def parameters(self, hf_model: nn.Module) -> list[Tensor | None]:
        """Returns the parameter that each slot has now, or None."""
        at = modules_at(hf_model, self.ways)
        return [at[path]._parameters.get(slot.name) for path, slot in zip(self.modules, self.slots, strict=True)]


def weight_slots(model: Model) -> WeightSlots:
    """Returns where the weights are that a cache computes with: of what writes to the residual stream, or reads it.

    Attention's own are sinks, where it has them: patterns are computed with these.
    """
    if "weight_slots" in model.remembered:
        return model.remembered["weight_slots"]
    parts: list[GeneralizedComponent] = []
    for block in model.blocks:
        parts += [part for part in block.submodules.values() if isinstance(part, NormalizationBridge)]
        parts += [block.attn, block.attn.o, *(part for key, part in block.mlp.submodules.items() if key == "out")]
    parts += model.components[model.components.index(model.blocks[-1]) + 1 :]
    slots = tuple(WeightSlot(part, name) for part in parts for name in part.module._parameters)
    modules = tuple(slot.part.module_path for slot in slots)
    known = WeightSlots(slots, branches(modules), modules)
    return model.remembered.setdefault("weight_slots", known)


class RunWeights:
    """Tells whether the weights that look-ups and stacks compute with are still those of the run.

    In the process of the run they are known by their parameters, and by torch's count of edits. In a cache from a file
    they are known by checksums, compared when a weight is first used.

    Args:
        model: The model.
        checksums: Those of a file, by the weight's name; by default the weights are those that the model has now.
    """

    def __init__(self, model: Model, checksums: Mapping[str, int] | None = None) -> None:
        known = weight_slots(model)
        self._slots = known.slots
        self._checksums = checksums
        # This is done in every run with a cache, so it does no more than it must.
        self._seen = known.parameters(model.hf_model)
        self._versions = _versions(self._seen)

    @functools.cached_property
    def _known(self) -> dict[int, int | None]:
        """Counts of edits of the run's weights by the parameter's id, which `_seen` keeps from being another's."""
        seen = zip(self._seen, self._versions, strict=True)
        is_run = self._checksums is None
        return {id(parameter): version for parameter, version in seen if is_run and parameter is not None}

    @functools.cached_property
    def _unchecked(self) -> dict[int, WeightSlot]:
        """Where the weights are that were not compared with a file's yet, by the parameter's id."""
        slots = zip(self._seen, self._slots, strict=True)
        return {id(parameter): slot for parameter, slot in slots if self._checksums and slot.path in self._checksums}

    def check(self, parameters: Iterable[Tensor | None], what: str) -> None:
        """Raises if a parameter is not as it was in the run.

        Args:
            parameters: Live parameters.
            what: What they are, for the error's text.
        """
        for parameter in parameters:
            # One that is offloaded cannot be read either, which says more.
            if parameter is not None and not parameter.is_meta and not self._is_current(parameter):
                raise EditedEntryError(
                    f"{what} not those of the cache's run",
                    reason="they were changed since, or the cache is from a file of another checkpoint's",
                    fix="run_with_cache again, or compute it before changing the weights",
                )

    def _is_current(self, parameter: Tensor) -> bool:
        key, version = id(parameter), _versions([parameter])[0]
        if self._checksums is not None and key in self._unchecked:
            slot = self._unchecked[key]
            if checksum(slot.part.weight(slot.name)) == self._checksums[slot.path]:
                self._known[key] = version
            del self._unchecked[key]
        return key in self._known and self._known[key] == version

    def checksums(self) -> dict[str, int]:
        """Returns the checksums of the weights that are as they were in the run and can be read, by name."""
        found = {}
        for slot in self._slots:
            parameter = slot.part.module._parameters.get(slot.name)
            try:
                if parameter is not None and self._is_current(parameter):
                    found[slot.path] = checksum(slot.part.weight(slot.name))
            except UnreadableWeightError:
                continue
        return found


def _versions(parameters: Sequence[Tensor | None]) -> list[int | None]:
    """Returns torch's counts of edits."""
    try:
        return [None if parameter is None else parameter._version for parameter in parameters]
    except RuntimeError:  # tensors made under inference mode count none
        counting = (None if one is None or one.is_inference() else one for one in parameters)
        return [None if one is None else one._version for one in counting]


def checksum(values: Tensor) -> int:
    """Returns the sum of the bits of values as float32, which does not depend on the order of addition.

    So it is the same on any device, and for values in half precision the same as for these values in float32.
    """
    flat = values.detach().reshape(-1)
    parts = (flat[start : start + CHUNK] for start in range(0, flat.numel(), CHUNK))
    return sum(int(part.float().view(torch.int32).sum(dtype=torch.int64)) for part in parts)
