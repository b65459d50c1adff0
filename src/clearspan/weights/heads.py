"""Key/value heads seen from the query heads: each serves a group of them."""

from torch import Tensor

from clearspan.errors import InvalidArgumentError


def expand_kv_heads(value: Tensor, n_heads: int, axis: int = -3, *, by_group: bool = False) -> Tensor:
    """Returns weights or activations of key/value heads for all query heads.

    Args:
        value: With an axis of key/value heads, such as `W_K` `[layer, kv_head, d_model, d_head]`.
        n_heads: Query heads.
        axis: Which axis that is: -3 for weights; -2 for biases and for activations.
        by_group: Whether the axis becomes two, `kv_head, group`, where the heads of a group are next to each other.

    Returns:
        With one key/value head (MQA) the axis has stride 0, and with one for each query head (MHA) the value is
        returned: no copy. With several that serve groups (GQA) no single axis can be strided so, and the heads are a
        copy; with `by_group=True` the `group` axis has stride 0, and there is never a copy.

    Raises:
        InvalidArgumentError: The axis does not divide the heads.

    Example:
        >>> import torch
        >>> expand_kv_heads(torch.zeros(5, 1, 256, 32), n_heads=8).stride(1)
        0
        >>> expand_kv_heads(torch.zeros(2, 256, 32), n_heads=8, by_group=True).shape
        torch.Size([2, 4, 256, 32])
    """
    at = axis % value.ndim
    kv_heads = value.shape[at]
    if not kv_heads or n_heads % kv_heads:
        raise InvalidArgumentError(
            "these are no key/value heads",
            expected=f"a size that divides {n_heads} query heads at axis {axis}",
            got=str(list(value.shape)),
            fix="axis=-2 for biases and activations, -3 for weights",
        )
    group = n_heads // kv_heads
    grouped = value.unsqueeze(at + 1).expand(*value.shape[: at + 1], group, *value.shape[at + 1 :])
    if by_group:
        return grouped
    return grouped.squeeze(at) if kv_heads == 1 else grouped.flatten(at, at + 1) if group > 1 else value
