"""Texts read as they come: cut into pieces, put into batches, and forgotten."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.analysis.corpus import Piece, pieces
from clearspan.bridge import TransformerBridge

Texts = str | Iterable[str] | Int[Tensor, "text pos"] | Iterable[Int[Tensor, "pos"]]
"""One text, or any number of texts or rows of token ids without padding; they are read one after the other, once."""


@dataclass(frozen=True, eq=False)
class Part:
    """A piece of a text.

    Attributes:
        text: Number of the text, from 0.
        start: Where in the text the piece starts.
        tokens: Its tokens.
    """

    text: int
    start: int
    tokens: Piece


def batches(bridge: TransformerBridge, texts: Texts, *, length: int, size: int) -> Iterator[list[Part]]:
    """Yields pieces of at most `length` tokens, `size` at a time, in their order; empty texts are passed over.

    No text is asked for before the batch in which it starts.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> stream = batches(bridge, (text for text in ["import os", "", "import sys, os"]), length=4, size=2)
        >>> [[(part.text, part.start, len(part.tokens)) for part in batch] for batch in stream]
        [[(0, 0, 3), (2, 0, 4)], [(2, 4, 1)]]
    """
    parts = _parts(bridge, texts, length)
    while batch := list(itertools.islice(parts, size)):
        yield batch


def _parts(bridge: TransformerBridge, texts: Texts, length: int) -> Iterator[Part]:
    match texts:
        case str():
            texts = [texts]
        case Tensor():
            texts = torch.atleast_2d(texts)
    for number, text in enumerate(texts):
        if not len(text):
            continue
        start = 0
        for piece in pieces(bridge, [text] if isinstance(text, str) else text[None], length):
            yield Part(number, start, piece)
            start += len(piece)
