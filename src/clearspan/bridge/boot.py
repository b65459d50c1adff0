"""Booting: from a name, a folder or a loaded model to a bridge."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from clearspan.architectures import adapter_class
from clearspan.bridge.transformer_bridge import TransformerBridge
from clearspan.errors import UnknownArgumentError
from clearspan.hf.config import bridge_config
from clearspan.hf.loading import check_model, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def boot(
    model: "str | Path | PreTrainedModel",
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
    **from_pretrained_kwargs: Any,
) -> TransformerBridge:
    """Returns a bridge to a model.

    A model loaded here is in eval mode; one handed over stays in the mode, dtype and attention implementation it has.

    Args:
        model: A hub id, a checkpoint's folder, `"tiny-bigcode"` (the embedded model), or a loaded `PreTrainedModel`.
        tokenizer: For a loaded model, or instead of the checkpoint's own. Without any, the bridge takes tokens only.
        dtype: Of the weights; `"auto"` is the checkpoint's own.
        device: Where to move the model; by default it stays where it is.
        **from_pretrained_kwargs: For `AutoModelForCausalLM.from_pretrained`.

    Raises:
        UnsupportedArchitectureError: The architecture has no adapter.
        CheckpointNotFoundError: The name is no checkpoint.
        CompiledModelError: The model is the result of `torch.compile`.
        UnknownArgumentError: Keywords for loading, beside a model that is loaded already.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> bridge.cfg.n_layers, bridge.cfg.n_heads, bridge.cfg.n_key_value_heads
        (5, 8, 1)
    """
    if isinstance(model, str | Path):
        hf_model, own_tokenizer = load_model(model, dtype, **from_pretrained_kwargs)
    else:
        check_model(model)
        if from_pretrained_kwargs:
            raise UnknownArgumentError(
                f"unknown keywords {', '.join(from_pretrained_kwargs)}",
                reason="the model is loaded already; keywords for from_pretrained go with a name or a folder",
            )
        hf_model, own_tokenizer = model, None
        if dtype != "auto":
            nn.Module.to(hf_model, dtype)
    if device is not None:
        nn.Module.to(hf_model, device)
    adapter_type = adapter_class(type(hf_model).__name__)
    adapter = adapter_type(bridge_config(hf_model, adapter_type))
    return TransformerBridge(hf_model, adapter, tokenizer if tokenizer is not None else own_tokenizer)
