"""Masks: from the form that fused attention takes to the one that eager attention adds."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def additive_mask(
    mask: "Tensor | BlockMask | None", query: Tensor, key: Tensor, module: nn.Module, kwargs: Mapping[str, Any]
) -> Tensor:
    """Returns the mask that eager attention adds to its scores, from the one made for the model's implementation.

    Args:
        mask: As sdpa gets it (None where its `is_causal` says all, or boolean), as flash attention does (None, or two
            axes that mark padding), as flex attention does (a function of positions), or additive already.
        query: `[batch, head, q_pos, d_head]`.
        key: `[batch, kv_head, k_pos, d_head]`.
        module: The attention module.
        kwargs: What the attention function was called with besides.
    """
    if mask is not None and not isinstance(mask, Tensor):
        mask = _written_out(mask, query, key)
    if mask is not None and mask.is_floating_point() and mask.ndim == 4:
        return mask
    allowed = mask.bool() if mask is not None and mask.ndim == 4 else _allowed(mask, query, key, module, kwargs)
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(allowed, zero, least_score(query.dtype))


def _written_out(mask: "BlockMask", query: Tensor, key: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask  # It takes long to import.

    return create_mask(mask.mask_mod, query.shape[0], None, query.shape[2], key.shape[2], device=query.device)


def least_score(dtype: torch.dtype) -> float:
    """Returns the score of a key that a mask hides."""
    # Eager attention often takes its softmax in float32, where float64's least number would be -inf, and a row that is
    # masked throughout would be NaN.
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


def _allowed(mask: Tensor | None, query: Tensor, key: Tensor, module: nn.Module, kwargs: Mapping[str, Any]) -> Tensor:
    """Returns where a query may look, `[batch or 1, 1, q_pos, k_pos]`, for a mask that says it by omission."""
    q_len, k_len = query.shape[2], key.shape[2]
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    k_pos = torch.arange(k_len, device=key.device)
    # Without a mask sdpa aligns queries with the first keys (a cache of fixed length has empty ones behind them); flash
    # attention, whose mask marks padding alone, aligns them with the last.
    first = 0 if mask is None and q_len > 1 else k_len - q_len
    q_pos = torch.arange(q_len, device=key.device)[:, None] + first
    allowed = k_pos <= q_pos if is_causal else torch.ones_like(k_pos <= q_pos)
    window = kwargs.get("sliding_window")
    if window is not None:
        allowed = allowed & (k_pos > q_pos - window)
    return allowed[None, None] if mask is None else allowed & mask.bool()[:, None, None, :]


def without_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns an additive mask of what a mask hides, and nothing else.

    A module with an eager path of its own adds its position bias there itself, where the mask made for its fused path
    has the bias in it already.

    Args:
        mask: Boolean, or additive.
        dtype: Of the scores.
    """
    least = torch.finfo(dtype).min
    allowed = mask if mask.dtype == torch.bool else mask > least / 2
    return torch.where(allowed, torch.zeros((), dtype=dtype, device=mask.device), least)
