"""Whether a model numbers positions by itself: by the padding mask, or by counting token ids."""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from clearspan.architectures.adapter import SIZES
from clearspan.components import PosEmbedBridge
from clearspan.hf.keywords import takes_position_ids
from clearspan.hf.torch_hooks import after
from clearspan.structure.frame import Blocks
from clearspan.structure.inward import Inward
from clearspan.structure.tokens import n_tokens
from clearspan.structure.trace import Trace, traced

if TYPE_CHECKING:
    from clearspan.hf.types import PreTrainedModel


def numbers_positions(model: "PreTrainedModel", inward: Inward) -> bool:
    """Returns whether a model makes positions without being told them; notes the padding id that it does not count."""
    embed = inward.parts.get("pos_embed")
    takes = takes_position_ids(model)
    if inward.table is None or not isinstance(embed, PosEmbedBridge):
        return not takes
    tokens = torch.arange(5, 12)[None] % n_tokens(model)  # few have less than 12
    plain = _rows(model, inward.table.path, tokens)
    padding = vars(model.config.get_text_config(decoder=True)).get("pad_token_id")
    if takes and padding is not None:
        ids = tokens.clone()
        ids[0, 3] = padding
        if not torch.equal(_rows(model, inward.table.path, ids), plain):
            embed.padding_id = padding
            return False
    mask = torch.ones(1, 7, dtype=torch.long)
    mask[0, :2] = 0
    by_mask = not torch.equal(_rows(model, inward.table.path, tokens, mask), plain)
    return by_mask or not takes


MOST = 4096
"""The longest context that is tried; a longer one is taken to have no end."""


class _ReachedError(Exception):
    """The first block has been passed."""


def has_table(model: "PreTrainedModel", blocks: Blocks, inward: Inward) -> bool:
    """Returns whether a model without a position embedding ends its context where its config does."""
    config = model.config.get_text_config(decoder=True)
    names = SIZES["n_ctx"]
    assert isinstance(names, tuple), "entries of the config"
    length = next((there for name in names if (there := getattr(config, name, None))), None)
    if inward.table is not None or length is None or length > MOST:
        return False

    try:
        _run_to_blocks(model, blocks, input_ids=torch.full((1, length + 1), 3))
    except (IndexError, RuntimeError, ValueError):
        return True
    return False


def takes_embeddings(model: "PreTrainedModel", blocks: Blocks, trace: Trace) -> bool:
    """Returns whether a model's forward takes embeddings in place of token ids."""
    table = model.get_input_embeddings()
    given = next((visit.left for visit in trace.visits if visit.module is table), None)
    if given is None:
        return True  # what its embedding gives is not known
    try:
        _run_to_blocks(model, blocks, inputs_embeds=given)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    return True


def generates_on(model: "PreTrainedModel", ids: Tensor) -> bool:
    """Returns whether `generate` would run a model on just these tokens, as far as it tells."""
    if not model.can_generate():
        return True
    generating = cast("Any", model)
    try:
        given = generating.prepare_inputs_for_generation(ids, use_cache=False).get("input_ids", ids)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return True
    return given is None or given.shape == ids.shape


def _run_to_blocks(model: "PreTrainedModel", blocks: Blocks, **given: Tensor) -> None:
    """Runs a model until its first block is passed."""

    def reached(*_: object) -> None:
        raise _ReachedError

    handle = after(blocks.visits[0].module, reached)
    try:
        with torch.no_grad():
            model(**given, use_cache=False)
    except _ReachedError:
        pass
    finally:
        handle.remove()


def _rows(model: "PreTrainedModel", path: str, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns what the position embedding gives for token ids."""
    trace = traced(model, lambda: model(input_ids=ids, attention_mask=mask, use_cache=False))
    left = trace.at(path)[0].left
    assert left is not None, "it gave vectors before"
    return left
