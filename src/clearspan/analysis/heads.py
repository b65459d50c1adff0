"""Scores that say what kind of attention a head pays, measured on repeated random tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.bridge import TransformerBridge


@dataclass(frozen=True)
class Head:
    """One head and its score."""

    layer: int
    head: int
    score: float

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Two scores of every head, in units of attention from 0 to 1, on the CPU."""

    induction: Float[Tensor, "layer head"]
    previous_token: Float[Tensor, "layer head"]


def strongest(scores: Float[Tensor, "layer head"], k: int = 5) -> list[Head]:
    """Returns the `k` heads with the highest score, highest first.

    Example:
        >>> [str(head) for head in strongest(torch.tensor([[0.1, 0.9], [0.4, 0.2]]), k=2)]
        ['L0H1', 'L1H0']
    """
    top = scores.flatten().topk(min(k, scores.numel()))
    n_heads = scores.shape[1]
    return [Head(i // n_heads, i % n_heads, s) for s, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]


@torch.no_grad()
def head_scores(bridge: TransformerBridge, *, rows: int = 4, period: int = 50, seed: int = 0) -> HeadScores:
    """Returns each head's induction and previous-token score.

    The text is BOS (where the tokenizer has one), then a block of `period` random tokens, twice. There nothing but
    the repetition can be predicted.

    - Induction: mean attention from a token of the second block to the token *after* its first occurrence.
    - Previous token: mean attention from each token of the two blocks to the one before it.

    Args:
        bridge: A model with a tokenizer.
        rows: Random texts, over which the scores are averaged.
        period: Length of a block; half of the context where that is less.
        seed: Of the random tokens, which are uniform over the vocabulary without special tokens.

    Returns:
        Scores by layer and head, in attention from 0 to 1.

    Raises:
        NoTokenizerError: The bridge has no tokenizer.

    References:
        Olsson et al. (2022), "In-context Learning and Induction Heads", arXiv:2209.11895: prefix matching, section
        "Model analysis table". There the repeated block is 25 tokens long and stands four times.
    """
    period = min(period, (bridge.cfg.n_ctx - 1) // 2)
    tokens, start = _repeated(bridge, rows, period, seed)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(bridge.cfg.n_layers)]
    _, cache = bridge.run_with_cache(tokens, names_filter=names)
    induction, previous = [], []
    for name in names:
        pattern = cache[name].float()
        # The diagonal at offset k - q: `period - 1` tokens back for induction, one for the previous token.
        after_first = pattern.diagonal(1 - period, dim1=-2, dim2=-1)[..., -period:]
        before = pattern.diagonal(-1, dim1=-2, dim2=-1)[..., max(start - 1, 0) :]
        induction.append(after_first.mean((0, -1)))
        previous.append(before.mean((0, -1)))
    return HeadScores(torch.stack(induction).cpu(), torch.stack(previous).cpu())


def _repeated(bridge: TransformerBridge, rows: int, period: int, seed: int) -> tuple[Int[Tensor, "row pos"], int]:
    """Returns texts of one random block twice, and the position where the first block starts."""
    tokenizer = bridge.text.tokenizer
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.long)
    ids = torch.arange(min(bridge.cfg.d_vocab, len(tokenizer)))
    ids = ids[~torch.isin(ids, special)]
    block = ids[torch.randint(len(ids), (rows, period), generator=torch.Generator().manual_seed(seed))]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    start = torch.tensor(bos, dtype=torch.long).expand(rows, len(bos))
    return torch.cat([start, block, block], dim=1), len(bos)
