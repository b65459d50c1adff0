"""How much the last prediction depends on the residual stream at each layer and position."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.progress import Progress, silent
from clearspan.bridge import TransformerBridge

BATCH_TOKENS = 8192


@dataclass(frozen=True, eq=False)
class CausalEffect:
    """What the last prediction loses when one position of one layer's input is replaced, on the CPU.

    Attributes:
        target: The model's likeliest token after the last position.
        log_prob: Its log-probability in nats, with nothing replaced.
        drop: How many nats `log_prob` falls by with the position replaced; negative where it rises.
    """

    target: int
    log_prob: float
    drop: Float[Tensor, "layer pos"]


@torch.no_grad()
def causal_effect(
    bridge: TransformerBridge, tokens: Int[Tensor, "1 pos"], *, progress: Progress = silent
) -> CausalEffect:
    """Returns the effect of mean-ablating the stream that enters each block, one position at a time.

    `drop[l, p] = log P(target) - log P(target | resid_pre[l][p] := mean)`, where the mean is that layer's own over
    the text's positions without the first. The first is left out (of a longer text) because it is BOS or stands in
    for one: models park attention there, and its stream can be hundreds of times larger than the others.

    All positions of a layer are rows of one batch, in chunks of some 8,192 tokens. It starts at that layer and
    unembeds the last position alone.

    Args:
        bridge: A model whose attention is causal.
        tokens: One text.
        progress: Called after each chunk.

    Returns:
        Effects in nats.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> tokens = bridge.to_tokens("def f(self")
        >>> causal_effect(bridge, tokens).drop.shape == (bridge.cfg.n_layers, tokens.shape[1])
        True

    References:
        Meng et al. (2022), "Locating and Editing Factual Associations in GPT", arXiv:2202.05262, section 2.1: the
        grid of layer and position. Wang et al. (2022), arXiv:2211.00593, section 2.1: replacing by the mean. Here
        the mean is the text's own, so that no other text is needed.
        Sun et al. (2024), "Massive Activations in Large Language Models", arXiv:2402.17762: the first position.
    """
    n_layers = bridge.cfg.n_layers
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
    logits, cache = bridge.run_with_cache(tokens, names_filter=names)
    log_probs = logits[0, -1].float().log_softmax(-1)
    target = int(log_probs.argmax())
    chunks = torch.arange(tokens.shape[1]).split(max(1, BATCH_TOKENS // tokens.shape[1]))
    ablated = torch.empty(n_layers, tokens.shape[1])
    for layer, name in enumerate(names):
        for number, positions in enumerate(chunks, start=layer * len(chunks) + 1):
            ablated[layer, positions] = _ablated(bridge, cache[name], layer, positions, target).cpu()
            progress("causal effect", number, n_layers * len(chunks))
    log_prob = float(log_probs[target])
    return CausalEffect(target=target, log_prob=log_prob, drop=log_prob - ablated)


def _ablated(
    bridge: TransformerBridge,
    resid: Float[Tensor, "1 pos d_model"],
    layer: int,
    positions: Int[Tensor, "row"],
    target: int,
) -> Float[Tensor, "row"]:
    """Returns the target's log-probability with each of `positions` replaced in turn, one row each."""
    rows = resid.repeat(len(positions), 1, 1)
    rows[torch.arange(len(positions)), positions] = stand_in(resid)
    n_layers = bridge.cfg.n_layers
    last = bridge(rows, start_at_layer=layer, stop_at_layer=n_layers)[:, -1:]
    return bridge(last, start_at_layer=n_layers)[:, -1].float().log_softmax(-1)[:, target]


def stand_in(resid: Float[Tensor, "1 pos d_model"]) -> Float[Tensor, "d_model"]:
    """Returns the mean of a stream over its positions without the first, or the first where there is no other."""
    return resid[0, 1:].mean(0) if resid.shape[1] > 1 else resid[0, 0]
