"""What an experiment measures of the logits: a function of them, and the loss that is measured by default."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.bridge.loss import lm_loss
from clearspan.errors import InvalidArgumentError

Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, "*batch"]]
"""From logits to one number for each row `[batch]`, or one for all of them."""


def next_token_loss(
    tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"] | None = None
) -> Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, "batch"]]:
    """Returns a metric: each row's mean loss on its next tokens, in nats.

    Args:
        tokens: The token ids that the logits are of.
        mask: Padding mask. A prediction counts where both its position and the next token are real.

    Raises:
        InvalidArgumentError: A row has fewer than two real tokens, so nothing is predicted in it.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> tokens = bridge.to_tokens("import os")
        >>> logits, loss = bridge(tokens, return_type="both")
        >>> bool(next_token_loss(tokens)(logits)[0].isclose(loss))
        True
    """
    real = torch.ones_like(tokens) if mask is None else mask
    counts = (real[:, :-1].bool() & real[:, 1:].bool()).sum(-1)
    if not (counts > 0).all():
        raise InvalidArgumentError(
            "there is no next token to predict", expected="two real tokens or more in each row", got="fewer"
        )

    def loss(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "batch"]:
        on = logits.device
        losses = lm_loss(logits, tokens.to(on), real.to(on), per_token=True)
        return losses.sum(-1) / counts.to(on)

    return loss


def measured(metric: Metric, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "row"]:
    """Returns what a metric says of logits, one number for each row, or one number in all; on the CPU.

    Raises:
        InvalidArgumentError: The metric returned something else.
    """
    found = metric(logits)
    if not isinstance(found, Tensor) or found.ndim > 1 or (found.ndim == 1 and len(found) != len(logits)):
        raise InvalidArgumentError(
            "the metric is not a number for each row",
            expected=f"a tensor [batch={len(logits)}], or of no axes",
            got=str(list(found.shape)) if isinstance(found, Tensor) else type(found).__name__,
        )
    return found.detach().reshape(-1).to(torch.promote_types(found.dtype, torch.float32)).cpu()
