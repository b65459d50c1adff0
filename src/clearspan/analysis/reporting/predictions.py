"""The tokens that the model expects after each position."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.errors import NotFiniteError as NotFiniteError


@dataclass(frozen=True, eq=False)
class Predictions:
    """The `k` likeliest next tokens after each position, on the CPU.

    Attributes:
        top_ids: Token ids, likeliest first.
        top_probs: Their probabilities.
        next_probs: Probability given at position `i` to the token that stands at `i + 1`.
    """

    top_ids: Int[Tensor, "pos k"]
    top_probs: Float[Tensor, "pos k"]
    next_probs: Float[Tensor, "pos-1"]


@torch.no_grad()
def predictions(bridge: TransformerBridge, tokens: Int[Tensor, "1 pos"], *, k: int = 5) -> Predictions:
    """Returns the `k` likeliest next tokens after each position of one text.

    Probabilities are the softmax, in float32, of what the model returns.

    Raises:
        NotFiniteError: The model returns NaN.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> found = predictions(bridge, bridge.to_tokens("def f(self"), k=2)
        >>> found.top_ids.shape[1]
        2
    """
    probs = bridge(tokens)[0].float().softmax(-1)
    if probs.isnan().any():
        raise NotFiniteError(
            "the model's logits are not numbers (NaN), so it predicts nothing",
            where=f"{bridge.cfg.model_name}, weights in {bridge.cfg.dtype}",
            fix="clearspan.boot(model, dtype=torch.float32), if they overflow",
        )
    top = probs.topk(min(k, probs.shape[-1]), dim=-1)
    return Predictions(
        top_ids=top.indices.cpu(),
        top_probs=top.values.cpu(),
        next_probs=probs[:-1].gather(-1, tokens[0, 1:, None].to(probs.device)).squeeze(-1).cpu(),
    )
