"""What the model card reports: bits per byte on held-out files, and induction scores on repeated random tokens."""

import math
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GPTBigCodeForCausalLM

from corpus import Source


@torch.no_grad()
def bits_per_byte(model: GPTBigCodeForCausalLM, tokenizer: Tokenizer, sources: Sequence[Source], bos: int) -> float:
    """Returns the negative log2 likelihood of the files' tokens divided by their UTF-8 bytes.

    Each file starts after the BOS token. Windows of the full context overlap by half, and a token is scored in the
    first window in which it has at least half a context before it (or all that the file has).
    """
    window = model.config.n_positions
    total_bits, total_bytes = 0.0, 0
    for source in sources:
        ids = torch.tensor([bos, *tokenizer.encode(source.text).ids])
        total_bytes += len(source.text.encode())
        scored = 1
        for start in range(0, max(1, len(ids) - window // 2), window // 2):
            piece = ids[start : start + window]
            if start + len(piece) <= scored:
                break
            log_probs = model(piece[None], use_cache=False).logits[0].float().log_softmax(-1)
            first = scored - start
            targets = piece[first:]
            total_bits -= log_probs[first - 1 : -1].gather(1, targets[:, None]).sum().item() / math.log(2)
            scored = start + len(piece)
    return total_bits / total_bytes


@torch.no_grad()
def induction_scores(model: GPTBigCodeForCausalLM, *, period: int = 100, rows: int = 16, seed: int = 0) -> Tensor:
    """Returns each head's attention from a repeated token to the token after its first occurrence, `[layer, head]`.

    The rows are BOS, then a block of `period` uniformly random tokens twice; the score is the mean over rows and over
    the positions of the second block (Olsson et al. 2022, arXiv 2209.11895).
    """
    generator = torch.Generator().manual_seed(seed)
    bos = model.config.bos_token_id
    assert bos is not None, "rows start with a BOS"
    block = torch.randint(1, model.config.vocab_size, (rows, period), generator=generator)
    tokens = torch.cat([torch.full((rows, 1), bos), block, block], dim=1)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    patterns = model(tokens, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(implementation or "eager")
    return torch.stack([p.diagonal(1 - period, dim1=-2, dim2=-1)[..., 2:].mean((0, -1)) for p in patterns])
