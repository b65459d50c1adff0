"""The residual stream at every depth, how the model itself reads it, and the words of what is read.

Depth 0 is the embedding, depth `l + 1` the stream that leaves block `l`; the last depth is what the model itself reads.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.corpus import Batch
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.plots.labels import visible

from .tuned_lens import TunedLens

Translator = Callable[[Float[Tensor, "*place d_model"], int], Float[Tensor, "*place d_model"]]
"""Called as `lens(resid, depth)` before a stream is read: a `TunedLens`, or any function of that form."""


def stream_names(n_layers: int) -> list[str]:
    """Returns the hook point of each depth.

    Example:
        >>> stream_names(2)
        ['blocks.0.hook_resid_pre', 'blocks.0.hook_resid_post', 'blocks.1.hook_resid_post']
    """
    return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(n_layers))]


def depth_names(n_layers: int) -> tuple[str, ...]:
    """Returns a name for each depth: `embed`, then the layer whose block the stream leaves.

    Example:
        >>> depth_names(2)
        ('embed', '0', '1')
    """
    return ("embed", *(str(layer) for layer in range(n_layers)))


def read(bridge: TransformerBridge, resid: Float[Tensor, "place d_model"]) -> Float[Tensor, "place d_vocab"]:
    """Returns the log-probabilities, in nats, that the model gives where `resid` is its last residual stream.

    The stream goes to the model's own final norm (where it has one), unembedding, and scale or cap of the logits, as
    rows of one position each, and no block is run. Gradients reach `resid`. Computed in float32 at least.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> logits, cache = bridge.run_with_cache("import os")
        >>> torch.allclose(read(bridge, cache["resid_post", -1][0]), logits[0].log_softmax(-1), atol=1e-5)
        True
    """
    logits = bridge(resid[:, None], start_at_layer=bridge.cfg.n_layers)[:, 0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@torch.no_grad()
def real_streams(
    bridge: TransformerBridge, batch: Batch, names: Sequence[str]
) -> tuple[list[Float[Tensor, "place d_model"]], Float[Tensor, "place d_vocab"]]:
    """Returns the streams at `names` of a batch's real tokens, row after row, and the model's own log-probabilities."""
    tokens, mask = (part.to(bridge.device) for part in batch)
    logits, cache = bridge.run_with_cache(tokens, names_filter=names, attention_mask=mask)
    real = mask.bool()
    final = logits[real].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return [cache[name][real] for name in names], final


def kl_divergence(
    final: Float[Tensor, "place d_vocab"], other: Float[Tensor, "place d_vocab"]
) -> Float[Tensor, "place"]:
    """Returns `KL(final || other)` in nats, from log-probabilities.

    Example:
        >>> half, skewed = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(float(kl_divergence(half, skewed)), 4)
        0.1438
    """
    return (final.exp() * (final - other)).sum(-1)


def translator(bridge: TransformerBridge, lens: Translator | None) -> Translator:
    """Returns what a stream goes through before it is read: nothing, or a lens that was made for this model.

    Raises:
        InvalidArgumentError: A tuned lens of another width or depth.
    """
    match lens:
        case None:
            return _as_it_is
        case TunedLens():
            lens.check_fits(bridge)
            return lens
        case _ if callable(lens):
            return lens
    raise InvalidArgumentError(
        "cannot read through this lens",
        expected="a TunedLens, or a function lens(resid, depth) that returns a stream",
        got=type(lens).__name__,
    )


def _as_it_is(resid: Float[Tensor, "*place d_model"], depth: int) -> Float[Tensor, "*place d_model"]:  # noqa: ARG001
    return resid


def words_of(bridge: TransformerBridge, *ids: Int[Tensor, "..."]) -> dict[int, str]:
    """Returns each token's text, with white space visible; nothing where the bridge has no tokenizer."""
    if bridge.tokenizer is None:
        return {}
    unique = torch.cat([part.flatten().cpu() for part in ids]).unique().tolist()
    return {token: visible(bridge.to_single_str_token(token)) for token in unique}


def word(words: Mapping[int, str], token: int) -> str:
    """Returns a token's text, or its id where there is none.

    Example:
        >>> word({7: "self"}, 7), word({}, 7)
        ('self', '7')
    """
    return words.get(token, str(token))
