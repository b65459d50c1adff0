"""Reading components of the residual stream through a norm and the unembedding, exactly on raw weights.

Given the scale that the norm had in the run, a norm is linear but for its bias: what each component contributes to its
output sums to the whole.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clearspan.bridge.positions import PosSlice, at_positions
from clearspan.components import NormalizationBridge
from clearspan.errors import InvalidArgumentError
from clearspan.weights.processing import final_norm, readout

if TYPE_CHECKING:
    from clearspan.bridge.cache import ActivationCache
    from clearspan.bridge.transformer_bridge import TransformerBridge

BatchSlice = int | slice | list[int] | Tensor | None
"""Rows of a batch: one (its axis goes), a slice, a list, or a tensor of indices; None for all."""
Tokens = str | int | Tensor
"""A token for every row (text of one token, or an id), one for each `[batch]`, or for each position `[batch, pos]`."""


def linear_part(cache: "ActivationCache", norm: NormalizationBridge, value: Tensor, scale: Tensor) -> Tensor:
    """Returns a norm's output for a part of its input, with a given scale, without the norm's bias."""
    centred = value if norm.uses_rms_norm else value - value.mean(-1, keepdim=True)
    weight = None if norm.module._parameters.get("weight") is None else cache.weights(norm.w)
    normalized = centred / scale
    return normalized if weight is None else normalized * weight.to(normalized)


def norm_at(bridge: "TransformerBridge", depth: int, *, mlp_input: bool) -> NormalizationBridge | None:
    """Returns the norm through which a layer (its MLP), or the unembedding, reads the residual stream, if any."""
    if depth == bridge.cfg.n_layers:
        return final_norm(bridge)
    block = bridge.blocks[depth]
    if block.norms_the_sum:
        return None
    key = "ln2" if mlp_input and "ln2" in block.submodules else "ln1"
    if mlp_input and key == "ln1" and not block.is_parallel:
        return None
    found = block.submodules.get(key)
    return found if isinstance(found, NormalizationBridge) else None


def through_norm(
    cache: "ActivationCache",
    stack: Tensor,
    depth: int,
    *,
    mlp_input: bool,
    pos_slice: PosSlice,
    batch_slice: BatchSlice,
    has_batch_dim: bool,
    recompute_ln: bool,
    is_picked: bool = False,
) -> Tensor:
    """Returns what each component of a stack is in a norm's output; where nothing norms, the stack as it is."""
    if not is_picked:
        stack = fitted(stack, cache.rows_and_positions(has_batch_dim), pos_slice, batch_slice, cache)
    norm = norm_at(cache.bridge, depth, mlp_input=mlp_input)
    if norm is None:
        return stack
    if recompute_ln:
        return linear_part(cache, norm, stack, norm.scale(stack))
    scale = cache[f"{norm.path}.hook_scale"]
    if cache.has_batch_dim and not has_batch_dim:
        scale = scale.squeeze(0)
    return linear_part(cache, norm, stack, _picked(scale, pos_slice, batch_slice, cache))


def fitted(
    stack: Tensor, axes: dict[str, int], pos_slice: PosSlice, batch_slice: BatchSlice, cache: "ActivationCache"
) -> Tensor:
    """Returns a stack at the chosen rows and positions, whether it was picked before or still has them all.

    Args:
        stack: `[component, ..., d_model]`, between them the axes, each whole or as it is after the choice.
        axes: The cache's own axes in order, with their sizes.
        pos_slice: Positions.
        batch_slice: Rows.
        cache: Of which the axes are.
    """
    whole = tuple(axes.values())
    probe = torch.arange(max(1, torch.Size(whole).numel())).reshape(*whole, 1)
    picked = _picked(probe, pos_slice, batch_slice, cache)
    found = {}
    for rows, positions in ((None, None), (batch_slice, None), (None, pos_slice), (batch_slice, pos_slice)):
        already = _picked(probe, positions, rows, cache)
        shape = tuple(already.shape[:-1])
        if tuple(stack.shape[1:-1])[-len(shape) or stack.ndim :] != shape or stack.ndim < len(shape) + 2:
            continue
        # What is left to pick, told by which of the cache's places the result would hold.
        left = (batch_slice if rows is None else None, pos_slice if positions is None else None)
        found.setdefault(tuple(already.flatten().tolist()), left)
    if not found:
        raise InvalidArgumentError(
            "the stack does not have this cache's rows and positions",
            expected=f"[component, {', '.join(f'{axis}={size}' for axis, size in axes.items())}, d_model], or as after "
            f"pos_slice={pos_slice!r}, batch_slice={batch_slice!r}: {[len(stack), *picked.shape[:-1]]}",
            got=str(list(stack.shape)),
        )
    if len(found) > 1:
        raise InvalidArgumentError(
            "cannot tell whether the stack holds all rows and positions or those chosen: both have this shape",
            got=str(list(stack.shape)),
            fix="pick them yourself, and use a cache of them alone (run_with_cache(..., pos_slice=...))",
        )
    ((rows, positions),) = found.values()
    return _picked(stack, positions, rows, cache)


def _picked(value: Tensor, pos_slice: PosSlice, batch_slice: BatchSlice, cache: "ActivationCache") -> Tensor:
    """Returns `[..., batch, pos, d]` at rows and positions; axes that the cache leaves out are not there."""
    if pos_slice is not None and not cache.has_positions:
        raise InvalidArgumentError("pos_slice picks positions of a cache that holds one position only")
    has_pos = cache.has_positions
    if batch_slice is not None:
        if not cache.has_batch_dim:
            raise InvalidArgumentError("batch_slice picks rows of a cache without a batch axis")
        index = [batch_slice] if isinstance(batch_slice, int) else batch_slice
        axis = -3 if has_pos else -2
        rows = torch.arange(value.shape[axis], device=value.device)[index]
        value = value.index_select(axis, rows)
        value = value.squeeze(axis) if isinstance(batch_slice, int) else value
    return at_positions(value, pos_slice) if has_pos else value


# --- logits ----------------------------------------------------------------------------------------------------------


def directions(cache: "ActivationCache", tokens: Tokens) -> Tensor:
    """Returns the direction of each token's logit in the last norm's output, `[..., d_model]`.

    The logit of token `t` is, up to `logit_constant` and before a cap, the norm's output times its direction.
    """
    bridge = cache.bridge
    ids = token_ids(bridge, tokens)
    *before, _ = readout(bridge)
    found = cache.weights(bridge.W_U).T[ids] * bridge.cfg.logit_scale
    for part in reversed(before):
        found = found @ cache.weights(part.matrix)
    return found


def token_ids(bridge: "TransformerBridge", tokens: Tokens) -> Tensor:
    """Returns tokens as ids on the model's device."""
    if isinstance(tokens, str):
        tokens = bridge.to_single_token(tokens)
    ids = torch.as_tensor(tokens, device=bridge.device)
    d_vocab = bridge.W_U.shape[1]
    if ids.is_floating_point() or ids.ndim > 2 or (ids.numel() and not 0 <= ids.min() <= ids.max() < d_vocab):
        raise InvalidArgumentError(
            "these are no tokens",
            expected=f"text of one token, or ids from 0 to {d_vocab - 1}: one, [batch] or [batch, pos]",
            got=f"{ids.dtype} {list(ids.shape)}",
        )
    return ids


def constant(cache: "ActivationCache", tokens: Tokens) -> Tensor:
    """Returns what biases of the last norm and of the unembedding add to tokens' logits, in the tokens' shape."""
    bridge = cache.bridge
    ids = token_ids(bridge, tokens)
    total = cache.weights(bridge.b_U)[ids] * bridge.cfg.logit_scale
    norm = final_norm(bridge)
    bias = None if norm is None else norm.bias_or_none()
    if bias is not None:
        total = total + directions(cache, ids) @ cache.weights(bias)
    *before, unembed = readout(bridge)
    for number, part in enumerate(before):
        shift = part.bias_or_none()
        if shift is not None:
            shift = cache.weights(shift)
            for later in before[number + 1 :]:
                shift = later.matrix @ shift
            total = total + (unembed.matrix @ shift)[ids] * bridge.cfg.logit_scale
    return total


def logit_attributions(
    cache: "ActivationCache",
    stack: Tensor,
    tokens: Tokens,
    incorrect_tokens: Tokens | None,
    *,
    pos_slice: PosSlice,
    batch_slice: BatchSlice,
    has_batch_dim: bool,
) -> Tensor:
    """Returns what each component of a stack adds to tokens' logits, or to the difference of two tokens' logits."""
    normed = through_norm(
        cache,
        stack,
        cache.bridge.cfg.n_layers,
        mlp_input=False,
        pos_slice=pos_slice,
        batch_slice=batch_slice,
        has_batch_dim=has_batch_dim,
        recompute_ln=False,
    )
    towards = _laid(cache, directions(cache, tokens), pos_slice, batch_slice, has_batch_dim)
    if incorrect_tokens is not None:
        away = _laid(cache, directions(cache, incorrect_tokens), pos_slice, batch_slice, has_batch_dim)
        towards = towards - away
    return (normed * towards.to(normed)).sum(-1)


def _laid(
    cache: "ActivationCache",
    found: Tensor,
    pos_slice: PosSlice,
    batch_slice: BatchSlice,
    has_batch_dim: bool,
) -> Tensor:
    """Returns directions with the axes of a stack that was normed: rows and positions as it has them."""
    axes = cache.rows_and_positions(has_batch_dim)
    if found.ndim == 1:
        return found
    if found.ndim == 3 or "batch" not in axes:
        return fitted(found[None], axes, pos_slice, batch_slice, cache)[0]
    # One token for each row, at all of its positions.
    index = [batch_slice] if isinstance(batch_slice, int) else batch_slice
    rows = len(found) if index is None else len(torch.arange(axes["batch"])[index])
    if len(found) == axes["batch"] and index is not None and rows != len(found):
        found = found[torch.arange(len(found))[index]]
    if len(found) != rows:
        raise InvalidArgumentError(
            "there is not one token for each row", expected=f"[{rows}]", got=str(list(found.shape[:-1]))
        )
    if isinstance(batch_slice, int):
        return found[0]
    keeps_positions = cache.has_positions and not isinstance(pos_slice, int)
    return found[:, None] if keeps_positions else found
