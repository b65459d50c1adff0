"""The logit lens: what the model would predict if it stopped after each block."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.bridge import TransformerBridge


@dataclass(frozen=True, eq=False)
class LogitLens:
    """Predictions read from the residual stream at every depth, on the CPU.

    Row 0 is the embedding, row `l + 1` the stream that leaves block `l`; the last row is the model's own prediction.

    Attributes:
        top_ids: Likeliest next token at that depth.
        top_probs: Its probability.
        final_ids: The model's own likeliest next token, which is the last row of `top_ids`.
        final_probs: The probability that each depth gives to `final_ids`.
        final_ranks: How many tokens each depth holds to be likelier than `final_ids`: 0 where it agrees.
    """

    top_ids: Int[Tensor, "depth pos"]
    top_probs: Float[Tensor, "depth pos"]
    final_ids: Int[Tensor, "pos"]
    final_probs: Float[Tensor, "depth pos"]
    final_ranks: Int[Tensor, "depth pos"]

    @property
    def depths(self) -> tuple[str, ...]:
        """A name for each row: `embed`, then the layer whose block the stream leaves."""
        return ("embed", *(str(layer) for layer in range(len(self.top_ids) - 1)))


@torch.no_grad()
def logit_lens(bridge: TransformerBridge, tokens: Int[Tensor, "1 pos"]) -> LogitLens:
    """Returns what the residual stream at each depth says when read as if it were the last.

    The stream after block `l` goes to the model's own final norm, unembedding and scale or cap of the logits:
    `softmax(bridge(resid_post[l], start_at_layer=n_layers))`, which skips every block.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> logit_lens(bridge, bridge.to_tokens("def f(self")).depths
        ('embed', '0', '1', '2', '3', '4')

    References:
        nostalgebraist (2020), "interpreting GPT: the logit lens", lesswrong.com/posts/AcKRB8wDpdaN6v6ru.
    """
    n_layers = bridge.cfg.n_layers
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(n_layers))]
    logits, cache = bridge.run_with_cache(tokens, names_filter=names)
    final_ids = logits[0].argmax(-1)
    rows = [_read(bridge(cache[name], start_at_layer=n_layers)[0], final_ids) for name in names]
    top_ids, top_probs, final_probs, final_ranks = (torch.stack(column).cpu() for column in zip(*rows, strict=True))
    return LogitLens(top_ids, top_probs, final_ids.cpu(), final_probs, final_ranks)


def _read(logits: Float[Tensor, "pos d_vocab"], final_ids: Int[Tensor, "pos"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns top id, its probability, and probability and rank of `final_ids`, each `[pos]`."""
    probs = logits.float().softmax(-1)
    top = probs.max(-1)
    final = logits.gather(-1, final_ids[:, None])
    return top.indices, top.values, probs.gather(-1, final_ids[:, None])[:, 0], (logits > final).sum(-1)
