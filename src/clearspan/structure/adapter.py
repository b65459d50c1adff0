"""The adapter of a derived structure."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from clearspan.architectures import ArchitectureAdapter
from clearspan.components import BlockBridge, GeneralizedComponent, JointQKVAttentionBridge, PerLayer
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import GroupedQKVConversionRule
from clearspan.structure.block import block_template
from clearspan.structure.finding import Finding, Findings, MissingStructureError
from clearspan.structure.frame import find_blocks, find_inward, find_outward
from clearspan.structure.trace import traced

if TYPE_CHECKING:
    from clearspan.hf.types import PreTrainedModel


@dataclass
class Structure:
    """What was derived of a model."""

    parts: dict[str, GeneralizedComponent]
    values: dict[str, object]
    findings: list[Finding] = field(default_factory=list)


def derive(model: "PreTrainedModel") -> Structure:
    """Returns a model's structure, found in one traced forward of a few tokens."""
    ids = torch.randint(3, 90, (5, 7), generator=torch.Generator().manual_seed(0))
    trace = traced(model, lambda: model(input_ids=ids, use_cache=False))
    findings = Findings()
    blocks = find_blocks(model, trace)
    inward = find_inward(trace, blocks, ids, findings)
    outward = find_outward(trace, blocks, trace.output.logits, findings)
    layers = [
        block_template(trace, visit, blocks.path, findings, f"blocks.{layer}")
        for layer, visit in enumerate(blocks.visits)
    ]
    first = trace.attended[0]
    values: dict[str, object] = {
        "n_heads": first.query.shape[1],
        "d_head": first.query.shape[-1],
        "logit_scale": outward.scale,
        "output_logits_soft_cap": outward.cap,
    }
    parts = {**inward.parts, "blocks": LayeredBlock(blocks.path, layers), **outward.parts}
    return Structure(parts, values, findings.found)


class LayeredBlock(BlockBridge):
    """Blocks each of a template of its own."""

    def __init__(self, name: str, templates: list[BlockBridge]) -> None:
        super().__init__(name=name, submodules=templates[0].submodules)
        self.templates = templates

    def at_layer(self, layer: int) -> BlockBridge:
        """Returns the template of one layer."""
        return self.templates[layer].at_layer(layer)
