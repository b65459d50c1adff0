"""The structure of a large model: that of a small model of its own class and config, with the large one's sizes."""

from dataclasses import replace
from typing import TYPE_CHECKING

from clearspan.components import GeneralizedComponent, PerLayer
from clearspan.errors import ClearspanError
from clearspan.hf.loading import bridge_config
from clearspan.hf.shrunk import shrunk
from clearspan.structure.adapter import FAULTS, Structure, derive
from clearspan.structure.finding import Finding
from clearspan.structure.source import adapter_of, source

if TYPE_CHECKING:
    from clearspan.hf.types import PreTrainedModel


def derive_from_small(model: "PreTrainedModel") -> Structure | None:
    """Returns a model's structure, found on a small random model of its class and config; the model itself is not run.

    Numbers are carried over by the entries of the config that say them. So what comes out is to be checked on the model
    itself: a size that no entry says is the small model's.

    Args:
        model: A Hugging Face model, which may be on the meta device.

    Returns:
        The structure, or None where no small model can be built, or where its structure is not found.
    """
    small = shrunk(model)
    if small is None:
        return None
    try:
        found = derive(small)
        return _enlarged(found, small, model)
    except (ClearspanError, *FAULTS):
        return None


def _enlarged(found: Structure, small: "PreTrainedModel", model: "PreTrainedModel") -> Structure:
    """Returns a small model's structure with a large model's sizes."""
    written = adapter_of(source(found, small))
    cfg = bridge_config(model, written)
    said = {"n_key_value_heads": cfg.n_heads, **{field: one for field, one in vars(cfg).items() if one is not None}}
    sizes = {field: size if isinstance(size, tuple) else said[field] for field, size in found.sizes.items()}
    parts = written(cfg).component_mapping
    layers = [_template(parts["blocks"], layer) for layer in range(cfg.n_layers)]
    count = sum(one.numel() for one in small.parameters())
    how = (
        f"on a random model of the same class with {count:,} parameters; sizes are those that the config's entries say"
    )
    findings = (*found.findings, Finding("derived", how))
    return replace(found, parts={**parts, "blocks": PerLayer(layers)}, sizes=sizes, findings=findings)


def _template(blocks: GeneralizedComponent, layer: int) -> GeneralizedComponent:
    """Returns the template of one layer, named as the list of all is."""
    whole = blocks.templates[layer] if isinstance(blocks, PerLayer) else blocks
    own = whole.at_layer(layer)
    own.name = whole.name
    return own
