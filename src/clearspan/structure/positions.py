"""Whether a model numbers positions by itself: by the padding mask, or by counting token ids."""

import inspect
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clearspan.components import PosEmbedBridge
from clearspan.structure.inward import Inward
from clearspan.structure.trace import traced

if TYPE_CHECKING:
    from clearspan.hf.types import PreTrainedModel


def numbers_positions(model: "PreTrainedModel", inward: Inward) -> bool:
    """Returns whether a model makes positions without being told them; notes the padding id that it does not count."""
    embed = inward.parts.get("pos_embed")
    takes = "position_ids" in inspect.signature(type(model).forward).parameters
    if inward.table is None or not isinstance(embed, PosEmbedBridge):
        return not takes
    plain = _rows(model, inward.table.path, torch.arange(5, 12)[None])
    padding = model.config.get_text_config(decoder=True).pad_token_id
    if takes and padding is not None:
        ids = torch.arange(5, 12)[None].clone()
        ids[0, 3] = padding
        if not torch.equal(_rows(model, inward.table.path, ids), plain):
            embed.padding_id = padding
            return False
    mask = torch.ones(1, 7, dtype=torch.long)
    mask[0, :2] = 0
    by_mask = not torch.equal(_rows(model, inward.table.path, torch.arange(5, 12)[None], mask), plain)
    return by_mask or not takes


def _rows(model: "PreTrainedModel", path: str, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns what the position embedding gives for token ids."""
    trace = traced(model, lambda: model(input_ids=ids, attention_mask=mask, use_cache=False))
    left = trace.at(path)[0].left
    assert left is not None, "it gave vectors before"
    return left
