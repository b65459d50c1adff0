"""What an experiment measures of the logits: a function of them, and the loss that is measured by default."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._forward.forward import lm_loss
from clearspan.errors import InvalidArgumentError
from clearspan.sweep.metrics import Metric as Metric
from clearspan.sweep.readings import measured as measured


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
    counts = check_predicted(tokens, real)

    def loss(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "batch"]:
        on = logits.device
        losses = lm_loss(logits, tokens.to(on), real.to(on), per_token=True)
        return losses.sum(-1) / counts.to(on)

    return loss


def check_predicted(tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch"]:
    """Returns how many next tokens are predicted in each row; raises where there are none.

    Args:
        tokens: Token ids.
        mask: 1 for real ones. A prediction counts where both its position and the next token are real.
    """
    counts = (mask[:, :-1].bool() & mask[:, 1:].bool()).sum(-1)
    if tokens.shape[1] < 2 or not (counts > 0).all():
        raise InvalidArgumentError(
            "there is no next token to predict", expected="two real tokens or more in each row", got="fewer"
        )
    return counts
