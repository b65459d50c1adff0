"""What a derived structure does not show: sublayers of which only the ends are known, blocks with the stream alone."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from clearspan.components import GeneralizedComponent, OpaqueBridge, PerLayer, StreamBlockBridge
from clearspan.structure.finding import Finding

_LAYER = re.compile(r"\.\d+(?=\.|$|\s)")


@dataclass(frozen=True)
class Unshown:
    """A part whose inside is not shown, in some layers.

    Attributes:
        part: `mlp`, `mixer` or another sublayer, or `the block`.
        layers: The layers.
        reason: Why; a layer's number in a path is written N.
    """

    part: str
    layers: tuple[int, ...]
    reason: str

    def __str__(self) -> str:
        return f"the inside of {self.part} in {_said(self.layers)}: {self.reason}"


def unshown(parts: Mapping[str, GeneralizedComponent], findings: Sequence[Finding]) -> list[Unshown]:
    """Returns what is not shown, layers with the same reason together.

    Args:
        parts: Component templates by canonical name.
        findings: What was found, among it why a part's inside was not.
    """
    layers: dict[tuple[str, str], list[int]] = {}
    for layer, part, reason in _each(parts["blocks"], findings):
        layers.setdefault((part, _LAYER.sub(".N", reason)), []).append(layer)
    return [Unshown(part, tuple(found), reason) for (part, reason), found in layers.items()]


def _each(blocks: GeneralizedComponent, findings: Sequence[Finding]) -> Iterator[tuple[int, str, str]]:
    """Yields layer, part and reason of each part that is not shown."""
    assert isinstance(blocks, PerLayer), "each layer has a template of its own"
    for layer, block in enumerate(blocks.templates):
        if isinstance(block, StreamBlockBridge):
            yield layer, "the block", block.reason
        for name, part in block.submodules.items():
            if isinstance(part, OpaqueBridge):
                reasons = [one.how for one in findings if one.what == f"blocks.{layer}.{name}"]
                yield layer, name, "; ".join(dict.fromkeys(reasons)) or "no component describes it"


def _said(layers: Sequence[int]) -> str:
    """Returns numbers of layers in words, those in a row together."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    said = ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return f"layer {said}" if len(layers) == 1 else f"layers {said}"
