"""A corpus: texts read one after the other, cut into pieces of a bounded length, drawn in a random order."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts
from clearspan.errors import InvalidArgumentError, argument
from clearspan.inputs import Batch, Input
from clearspan.model import check_bridge
from clearspan.text import is_conversation

Corpus = Input | Iterable[Input]
"""Any input, or any number of them: texts, rows of token ids, rows of a dataset, chats."""


def texts_of(bridge: TransformerBridge, corpus: Corpus) -> Iterator[Int[Tensor, "pos"]]:
    """Yields the token ids of each text, on the CPU; of an empty text, none.

    No text is asked for before the one before it was taken.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> [len(text) for text in texts_of(bridge, ["import os", "", {"text": "import sys, os"}])]
        [3, 0, 5]
    """
    if not _is_many(corpus):
        with argument("corpus"):
            rows = list(_rows(bridge.to_batch(cast("Input", corpus))))
        yield from rows
        return
    for text in cast("Iterable[Input]", corpus):
        if _is_empty(text):
            yield torch.empty(0, dtype=torch.long)
        else:
            with argument("corpus"):
                rows = list(_rows(bridge.to_batch(text)))
            yield from rows


def pieces(bridge: TransformerBridge, corpus: Corpus, length: int) -> Batch:
    """Returns each text cut into pieces of at most `length` tokens, one after the other, filled on the right.

    A text has a BOS first where the model's texts do by default; its later pieces have none. Empty texts are passed
    over.

    Raises:
        InvalidArgumentError: There is no text, or a length of less than one.
        NoTokenizerError: Texts, and the bridge has no tokenizer.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> pieces(bridge, ["import os", "import sys, os"], length=4).lengths.tolist()
        [3, 4, 1]
    """
    check_bridge(bridge)
    check_counts(length=length)
    most = min(length, bridge.cfg.n_ctx)
    cut = [piece for text in texts_of(bridge, corpus) for piece in text.split(most) if len(piece)]
    if not cut:
        raise InvalidArgumentError("there is nothing to read", expected="a corpus of at least one text", got="none")
    return bridge.to_batch(cast("Input", cut), padding_side="right")


def drawn(rows: int, *, size: int, count: int, seed: int) -> Iterator[Int[Tensor, "size"]]:
    """Yields `count` times the numbers of `size` rows, each row once before any comes again, in a random order.

    Example:
        >>> [numbers.tolist() for numbers in drawn(3, size=2, count=3, seed=0)]
        [[2, 0], [1, 2], [1, 0]]
    """
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(size * count / rows)
    order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(rounds)])
    yield from order[: size * count].view(count, size)


def _is_many(corpus: object) -> bool:
    """Returns whether a corpus is a collection of inputs, and not one input."""
    match corpus:
        case str() | bytes() | Tensor() | np.ndarray() | Batch() | Mapping():
            return False
        case [int() | np.integer(), *_]:
            return False
    return not is_conversation(corpus) and isinstance(corpus, Iterable)


def _is_empty(text: object) -> bool:
    given: Any = text
    if isinstance(text, Mapping):
        given = next((text[name] for name in ("input_ids", "text", "messages") if text.get(name) is not None), None)
    return isinstance(given, Sized) and not isinstance(given, Mapping) and len(given) == 0


def _rows(batch: Batch) -> Sequence[Int[Tensor, "pos"]]:
    ids = batch.ids.cpu()
    return [row[list(real)] for row, real in zip(ids, batch.real_columns, strict=True)]
