"""The adapter of a derived structure."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from clearspan.architectures import ArchitectureAdapter
from clearspan.architectures.adapter import AdapterSource, Sizes
from clearspan.components import BlockBridge, GeneralizedComponent, PerLayer, UnembeddingBridge
from clearspan.config import TransformerBridgeConfig
from clearspan.structure.block import block_template
from clearspan.structure.finding import Finding, Findings
from clearspan.structure.frame import find_blocks, find_inward, find_outward
from clearspan.structure.trace import traced

if TYPE_CHECKING:
    from clearspan.hf.types import PreTrainedModel


@dataclass(frozen=True)
class Structure:
    """What was derived of a model: called with its sizes, it makes the model's adapter.

    Attributes:
        architecture: Class name of the model.
        parts: Component templates by canonical name, in the order of the forward.
        sizes: The sizes that were measured.
        numbers_positions: Whether the model numbers positions by the padding mask or the ids.
        findings: What was found, and how it is known.
    """

    architecture: str
    parts: Mapping[str, GeneralizedComponent]
    sizes: Sizes
    numbers_positions: bool = False
    findings: tuple[Finding, ...] = field(default=(), repr=False)

    def __call__(self, cfg: TransformerBridgeConfig) -> ArchitectureAdapter:
        """Returns an adapter for these sizes."""
        return DerivedAdapter(cfg, self)

    def __repr__(self) -> str:
        return f"the structure derived of {self.architecture}"


class DerivedAdapter(ArchitectureAdapter):
    """The adapter of a derived structure.

    Args:
        cfg: The model's sizes.
        structure: The structure.
    """

    def __init__(self, cfg: TransformerBridgeConfig, structure: Structure) -> None:
        self._structure = structure
        self.makes_positions_from_mask = structure.numbers_positions
        super().__init__(cfg)

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the structure's parts."""
        return copy.deepcopy(dict(self._structure.parts))

    @property
    def source(self) -> AdapterSource:
        """The structure."""
        return self._structure


ROWS, POSITIONS = 5, 7
"""Of the traced forward: primes, which are unlikely to be a model's sizes."""


def derive(model: "PreTrainedModel") -> Structure:
    """Returns a model's structure, found in one traced forward of a few tokens.

    Raises:
        MissingStructureError: Something that an adapter needs was not found.
    """
    d_vocab = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(3, min(d_vocab, 1000), (ROWS, POSITIONS), generator=torch.Generator().manual_seed(0))
    trace = traced(model, lambda: model(input_ids=ids, use_cache=False))
    findings = Findings()
    blocks = find_blocks(model, trace)
    inward = find_inward(trace, blocks, ids, findings)
    outward = find_outward(trace, blocks, trace.output.logits, findings)
    layers = [
        block_template(trace, visit, blocks.path, findings, f"blocks.{layer}")
        for layer, visit in enumerate(blocks.visits)
    ]
    unembed = outward.parts["unembed"]
    assert isinstance(unembed, UnembeddingBridge), "found as one"
    unembed.scale, unembed.softcap = outward.scale, outward.cap
    parts = {**inward.parts, "blocks": PerLayer(layers), **outward.parts}
    return Structure(type(model).__name__, parts, _sizes(trace, layers), inward.numbers_positions, tuple(findings.found))


def _sizes(trace, layers) -> Sizes:
    if not trace.attended:
        return {}
    first = trace.attended[0]
    return {"n_heads": first.query.shape[1], "d_head": first.query.shape[-1]}
