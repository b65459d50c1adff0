"""Where an adapter's sizes come from: the entries of the model's config that give what was measured, or numbers."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from clearspan.architectures import ArchitectureAdapter
from clearspan.architectures.adapter import FRAME_SIZES, SIZES, Size, Sizes, entries
from clearspan.components import GeneralizedComponent, LatentAttentionBridge, PerLayer
from clearspan.config import TransformerBridgeConfig
from clearspan.errors import AdapterError
from clearspan.hf.config_reads import entries_read
from clearspan.hf.loading import bridge_config, stored, text_config
from clearspan.structure.adapter import Structure
from clearspan.structure.entries import Entries
from clearspan.structure.expression import Call, Expression

if TYPE_CHECKING:
    from clearspan.hf.types import PreTrainedModel


def sizes_of(structure: Structure, model: "PreTrainedModel", cfg: TransformerBridgeConfig) -> dict[str, Size]:
    """Returns where sizes come from: entries of the config where these give what was measured, else the numbers."""
    config, found = text_config(model), dict[str, Size]()
    implied = {"d_head": cfg.d_model // max(cfg.n_heads, 1), "d_mlp": 4 * cfg.d_model, "n_key_value_heads": cfg.n_heads}
    said, read = _said(model), entries_read(model)
    if any(isinstance(part, LatentAttentionBridge) for part in walk(structure.parts["blocks"])):
        implied |= {field: structure.sizes.get(field) for field in ("d_head", "n_key_value_heads")}
    for field, names in SIZES.items():
        measured = structure.sizes.get(field, names)
        is_said = stored(config, names) is not None and said.get(field) == measured
        if implied.get(field) == measured and not is_said:
            # The code may ask for an entry that this config has not: it is named for configs that have it.
            found[field] = tuple(name for name in names if name in read) if stored(config, names) is None else ()
        elif isinstance(measured, tuple):
            name = stored(config, measured)
            found[field] = () if name is None else (name,)
        elif is_said:
            found[field] = (str(stored(config, names)),)
        else:
            name = Entries(cfg).named(field, measured) if field in ("d_mlp", "n_ctx") else None
            found[field] = measured if name is None else (name,)
    for field in FRAME_SIZES:
        measured = structure.sizes.get(field)
        if measured is not None and said.get(field) != measured:
            found[field] = measured
    return found


def _said(model: "PreTrainedModel") -> Mapping[str, object]:
    """Returns sizes as the config's usual entries say them; nothing where these are not all there."""
    try:
        return vars(bridge_config(model, ArchitectureAdapter))
    except AdapterError:
        return {}


def as_entries(sizes: Sizes) -> Expression:
    """Returns the call of `entries` that gives sizes; a mapping where some are numbers, or have no entry."""
    names = {field: name[0] if name else None for field, name in sizes.items() if isinstance(name, tuple)}
    if len(names) == len(sizes) and names["n_ctx"] is not None and names["eps"] is not None:
        order = ("n_ctx", "eps", "act_fn", "d_mlp", "d_head", "n_key_value_heads")
        return Call(entries, (), {field: names[field] for field in order if names[field] is not None})
    return {**sizes}


def walk(part: GeneralizedComponent) -> Iterator[GeneralizedComponent]:
    """Yields a template and the parts in it, of all layers."""
    yield part
    for inner in (*part.submodules.values(), *(part.templates if isinstance(part, PerLayer) else ())):
        yield from walk(inner)
