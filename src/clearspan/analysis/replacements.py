"""What an ablated value is replaced by: zero, its mean over a reference, or its value on another row of one."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError

from .corpus import Batch

AblationMethod = Literal["zero", "mean", "resample"]
Replacement = Float[Tensor, "#batch #pos *rest"] | None
"""What a value `[batch, pos, ...]` is replaced by; None for zero."""


@torch.no_grad()
def replacements(
    bridge: TransformerBridge,
    names: Sequence[str],
    method: AblationMethod,
    *,
    given: Batch,
    reference: Batch,
    seed: int,
) -> Mapping[str, Replacement]:
    """Returns what the value of each point is replaced by.

    Args:
        bridge: The model.
        names: Hook points with the axes `[batch, pos, ...]`.
        method: Which replacement.
        given: Tokens that are ablated, and their mask.
        reference: Tokens from which means and other values are taken, and their mask.
        seed: Of the rows' order.

    Raises:
        InvalidArgumentError: An unknown method; for `"resample"`, fewer than two rows, padding, or a reference of
            another shape.
    """
    if method not in get_args(AblationMethod):
        raise InvalidArgumentError(f"unknown method {method!r}", expected="'zero', 'mean' or 'resample'")
    if method == "zero":
        return dict.fromkeys(names)
    if method == "resample":
        _check_resampled(given, reference)
    tokens, mask = reference
    padding = padding_of(mask)
    _, cache = bridge.run_with_cache(tokens, names_filter=list(names), attention_mask=padding, return_type=None)
    if method == "mean":
        return {name: _mean(cache[name], mask) for name in names}
    order = derangement(len(tokens), seed)
    return {name: cache[name][order.to(cache[name].device)] for name in names}


def padding_of(mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"] | None:
    """Returns the mask where something is padded, otherwise None, so that the model runs as it does without one."""
    return None if bool(mask.all()) else mask


def derangement(size: int, seed: int) -> Int[Tensor, "row"]:
    """Returns a random order in which nothing keeps its place, each such order as likely as any other.

    Example:
        >>> derangement(2, seed=5)
        tensor([1, 0])
    """
    assert size > 1, "one thing alone keeps its place"
    generator = torch.Generator().manual_seed(seed)
    while True:  # one draw in e has no fixed point
        order = torch.randperm(size, generator=generator)
        if not (order == torch.arange(size)).any():
            return order


def _mean(value: Float[Tensor, "batch pos *rest"], mask: Int[Tensor, "batch pos"]) -> Float[Tensor, "1 1 *rest"]:
    real = value[mask.bool().to(value.device)]
    return real.to(torch.promote_types(value.dtype, torch.float32)).mean(0).to(value.dtype)[None, None]


def _check_resampled(given: Batch, reference: Batch) -> None:
    shapes = [list(tokens.shape) for tokens, _ in (given, reference)]
    if shapes[0] != shapes[1]:
        raise InvalidArgumentError(
            "method='resample' takes each row's replacement from the reference at the same position",
            expected=f"a reference of the input's shape {shapes[0]}",
            got=str(shapes[1]),
        )
    if shapes[0][0] < 2:
        raise InvalidArgumentError(
            "method='resample' takes the values of another row", expected="two rows or more", got="one"
        )
    if not all(bool(mask.all()) for _, mask in (given, reference)):
        raise InvalidArgumentError(
            "method='resample' takes the value at the same position",
            expected="rows of one length",
            got="rows with padding",
            fix="method='mean'",
        )
