"""A corpus as pieces of a bounded length, drawn into padded batches."""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError

Corpus = Sequence[str] | Int[Tensor, "text pos"]
"""Texts, or token ids without padding."""
Piece = Int[Tensor, "pos"]
Batch = tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]
"""Token ids, filled on the right, and their mask: 1 for real tokens."""


def pieces(bridge: TransformerBridge, corpus: Corpus, length: int) -> list[Piece]:
    """Returns each text cut into pieces of at most `length` tokens, one after the other, on the CPU.

    A text has a BOS first where the model's texts do by default; its later pieces have none.

    Raises:
        InvalidArgumentError: There is no text, or a length of less than one.
        NoTokenizerError: Texts, and the bridge has no tokenizer.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> [len(piece) for piece in pieces(bridge, ["import os", "import sys, os"], length=4)]
        [3, 4, 1]
    """
    check_positive(length=length)
    if not len(corpus):
        raise InvalidArgumentError("there is nothing to read", expected="at least one text", got="none")
    match corpus:
        case str():
            rows = [bridge.to_tokens(corpus)[0]]
        case Tensor():
            rows = list(corpus)
        case _:
            rows = [bridge.to_tokens(text)[0] for text in corpus]
    length = min(length, bridge.cfg.n_ctx)
    return [piece.cpu() for row in rows for piece in row.split(length)]


def drawn(pieces: Sequence[Piece], *, size: int, count: int, seed: int) -> Iterator[list[Piece]]:
    """Yields `count` batches of `size` pieces, each piece once before any comes again, in an order given by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(size * count / len(pieces))
    order = torch.cat([torch.randperm(len(pieces), generator=generator) for _ in range(rounds)])
    for batch in order[: size * count].view(count, size).tolist():
        yield [pieces[i] for i in batch]


def padded(pieces: Sequence[Piece]) -> Batch:
    """Returns pieces as one batch.

    Example:
        >>> padded([torch.tensor([5, 6]), torch.tensor([7])])
        (tensor([[5, 6],
                [7, 0]]), tensor([[1, 1],
                [1, 0]]))
    """
    tokens = torch.zeros(len(pieces), max(map(len, pieces)), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, piece in enumerate(pieces):
        tokens[row, : len(piece)] = piece
        mask[row, : len(piece)] = 1
    return tokens, mask


def check_positive(**sizes: float) -> None:
    """Raises InvalidArgumentError unless all sizes are more than 0.

    Example:
        >>> check_positive(steps=0)
        Traceback (most recent call last):
        clearspan.errors.InvalidArgumentError: steps=0
          expected: steps > 0
    """
    for name, size in sizes.items():
        if not size > 0:
            raise InvalidArgumentError(f"{name}={size}", expected=f"{name} > 0")
