"""Whether a run can go on from the keys and values that an earlier forward kept."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clearspan.hf.keywords import kv_cache_in
from clearspan.structure.trace import Trace

if TYPE_CHECKING:
    from clearspan.hf.types import PreTrainedModel


def why_whole_sequences(model: "PreTrainedModel", trace: Trace, ids: Tensor) -> str | None:
    """Returns why runs cannot go on from a KV cache, or None if they can, or if nothing in the model attends."""
    if not trace.attended:
        return None
    try:
        with torch.no_grad():
            given = model(input_ids=ids[:1, :2], use_cache=True)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return f"its forward raises {type(error).__name__} with a KV cache"
    return None if kv_cache_in(given) is not None else "its forward gives no KV cache"
