"""Generation, by Hugging Face's own `generate`."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clearspan.bridge.inputs import Input, as_tensor, check_length
from clearspan.bridge.text import PaddingSide
from clearspan.errors import InputError

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge


def generate(
    bridge: "TransformerBridge",
    input: Input,
    prepend_bos: bool | None,
    padding_side: PaddingSide,
    attention_mask: Tensor | None,
    generate_kwargs: dict[str, Any],
) -> Any:
    """Returns text for text, tokens for tokens. The arguments are those of `TransformerBridge.generate`."""
    tokens, mask = as_tensor(bridge, input, prepend_bos, padding_side)
    if tokens.is_floating_point():
        raise InputError("generation starts from text or token ids", got="embeddings")
    check_length(bridge, tokens.shape[1] + (generate_kwargs.get("max_new_tokens") or 0))
    mask = attention_mask if attention_mask is not None else mask
    if "pad_token_id" not in generate_kwargs and bridge.hf_model.generation_config.pad_token_id is None:
        pad = None if bridge.tokenizer is None else bridge.tokenizer.pad_token_id
        generate_kwargs["pad_token_id"] = 0 if pad is None else pad
    model: Any = bridge.hf_model  # its class has `generate` where it is a causal language model
    generated = model.generate(
        tokens, attention_mask=torch.ones_like(tokens) if mask is None else mask, **generate_kwargs
    )
    if isinstance(input, Tensor) or not isinstance(generated, Tensor):
        return generated
    assert bridge.tokenizer is not None, "text was encoded"
    texts = bridge.tokenizer.batch_decode(generated, skip_special_tokens=True)
    return texts[0] if isinstance(input, str) and len(texts) == 1 else texts
