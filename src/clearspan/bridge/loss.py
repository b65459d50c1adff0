"""The language-modelling loss."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def lm_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None = None,
    per_token: bool = False,
) -> Float[Tensor, "..."]:
    """Returns the cross-entropy of each next token, in nats, computed in float32 at least.

    Args:
        logits: `[batch, pos, d_vocab]`.
        tokens: `[batch, pos]`.
        mask: Padding mask `[batch, pos]`. A prediction counts where both its position and the next token are real.
        per_token: Whether to return `[batch, pos-1]`, zero where a prediction does not count, and not the mean.
    """
    exact = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    losses = functional.cross_entropy(exact.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    losses = losses.unflatten(0, exact.shape[:2])
    if mask is None:
        return losses if per_token else losses.mean()
    counts = (mask[:, :-1].bool() & mask[:, 1:].bool()).to(losses.dtype)
    losses = losses * counts
    return losses if per_token else losses.sum() / counts.sum()
