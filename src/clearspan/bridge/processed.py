"""A processed bridge: a model of its own on the same tensors, but for those that processing changes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import torch

from clearspan.errors import UnreadableWeightError
from clearspan.hf.config import bridge_config
from clearspan.hf.sharing import sharing_copy, untie
from clearspan.weights.processing import process

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge

Bridge = TypeVar("Bridge", bound="TransformerBridge")


@torch.no_grad()
def processed(bridge: Bridge, steps: Mapping[str, bool | None]) -> Bridge:
    """Returns a new bridge with processed weights. The steps are the arguments of `TransformerBridge.processed`."""
    _refuse_quantised(bridge)
    model = sharing_copy(bridge.hf_model)
    adapter = type(bridge.adapter)
    cfg = bridge_config(model, adapter)
    cfg.default_prepend_bos = bridge.cfg.default_prepend_bos
    new = type(bridge)(model, adapter(cfg), bridge.text.tokenizer_or_none)
    new.processing = (*bridge.processing, *process(new, steps))
    if bridge.tied and not new.tied:
        untie(model)
    return new


def _refuse_quantised(bridge: "TransformerBridge") -> None:
    for component in bridge.components:
        for part in component.walk():
            if part.name is not None and "weight" in part.module._parameters and part.is_quantised:
                raise UnreadableWeightError(
                    "a quantised model cannot be processed",
                    where=part.path,
                    reason="processed weights are other numbers, which would have to be quantised anew",
                    fix="load it without quantisation",
                )
