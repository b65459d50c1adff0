"""The weights that a cache computes with, checked to be those of its run."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clearspan.components import GeneralizedComponent, NormalizationBridge
from clearspan.errors import EditedEntryError, UnreadableWeightError

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge

CHUNK = 1 << 22
"""Elements of a weight that are read at a time for its checksum."""


class RunWeights:
    """Tells whether the weights that look-ups and stacks compute with are still those of the run.

    In the process of the run they are known by their parameters, and by torch's count of edits. In a cache from a file
    they are known by checksums, each of which is compared when its weight is first used.

    Args:
        bridge: The model.
        checksums: Those of a file, by the weight's name; by default the weights are those that the model has now.
    """

    def __init__(self, bridge: "TransformerBridge", checksums: Mapping[str, int] | None = None) -> None:
        # Parameters are held, so that none that takes another's place can have its id.
        self._known: dict[int, tuple[Tensor, int]] = {}
        self._unchecked: dict[int, tuple[GeneralizedComponent, str, int]] = {}
        for part, name, parameter in _computing(bridge):
            if checksums is None:
                self._known[id(parameter)] = parameter, _version(parameter)
            elif f"{part.path}.{name}" in checksums:
                self._unchecked[id(parameter)] = part, name, checksums[f"{part.path}.{name}"]

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
        key = id(parameter)
        if key in self._unchecked:
            part, name, expected = self._unchecked.pop(key)
            if checksum(part.weight(name)) == expected:
                self._known[key] = parameter, _version(parameter)
        return key in self._known and self._known[key][1] == _version(parameter)

    def checksums(self, bridge: "TransformerBridge") -> dict[str, int]:
        """Returns the checksums of the weights that are as they were in the run and can be read, by name."""
        found = {}
        for part, name, parameter in _computing(bridge):
            try:
                if self._is_current(parameter):
                    found[f"{part.path}.{name}"] = checksum(part.weight(name))
            except UnreadableWeightError:
                continue
        return found


def _computing(bridge: "TransformerBridge") -> Iterator[tuple[GeneralizedComponent, str, Tensor]]:
    """Yields the weights that a cache computes with: of what writes to the residual stream, and of what reads it.

    Attention's own are sinks, where it has them: patterns are computed with these.
    """
    for part in _parts(bridge):
        for name, parameter in part.module._parameters.items():
            if parameter is not None:
                yield part, name, parameter


def _parts(bridge: "TransformerBridge") -> Iterator[GeneralizedComponent]:
    for block in bridge.blocks:
        yield from (part for part in block.submodules.values() if isinstance(part, NormalizationBridge))
        yield block.attn
        yield block.attn.o
        if "out" in block.mlp.submodules:
            yield block.mlp.submodules["out"]
    yield from bridge.components[bridge.components.index(bridge.blocks[-1]) + 1 :]


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


def checksum(values: Tensor) -> int:
    """Returns the sum of the bits of values as float32, which does not depend on the order of addition.

    So it is the same on any device, and for values in half precision the same as for these values in float32.
    """
    flat = values.detach().reshape(-1)
    parts = (flat[start : start + CHUNK] for start in range(0, flat.numel(), CHUNK))
    return sum(int(part.float().view(torch.int32).sum(dtype=torch.int64)) for part in parts)
