"""Answers of any number of tokens, behind the prompts that ask for them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.checks import wholes
from clearspan.errors import InputError, InvalidArgumentError, argument
from clearspan.inputs import Batch, Input
from clearspan.model import check_bridge
from clearspan.sweep.metrics import AnswerLogProbability
from clearspan.text import PaddingSide

Answers = str | int | Sequence[str | int | Sequence[int]]
"""An answer for all rows, or one for each: text, a token id, or several token ids."""


def answered(
    bridge: TransformerBridge,
    input: Input,
    answers: Answers,
    *,
    attention_mask: Int[Tensor, "row pos"] | None = None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
) -> tuple[Batch, AnswerLogProbability]:
    r"""Returns prompts with their answers behind them, and the metric that is the answers' log-probability in nats.

    Prompt and answer are encoded apart, so that the prompt's tokens are those that it has alone. One run scores all of
    an answer's tokens, each behind the real ones before it. The difference of two answers is that of two such runs.

    Args:
        bridge: The model.
        input: The prompts: any input of tokens. Chat messages end with the start of an answer.
        answers: One for all rows, or one for each: text (with its space in front, as it stands in a text), a token id,
            or a list of token ids.
        attention_mask: 1 for real tokens, where bare token ids have padding.
        prepend_bos: As for `to_batch`; answers get none.
        padding_side: Where shorter rows are filled; by default the tokenizer's side.

    Raises:
        InputError: Nothing that can be run, embeddings, or an answer without tokens or unknown to the tokenizer.
        InvalidArgumentError: Neither one answer nor one for each row.
        NoTokenizerError: Text, and the bridge has no tokenizer.

    Example:
        >>> import clearspan
        >>> from clearspan.patching import activation_patching
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> answer = "\nimport sys"
        >>> clean, metric = answered(bridge, "import os", answer)
        >>> corrupted, _ = answered(bridge, "import re", answer)
        >>> activation_patching(bridge, clean, corrupted, metric, progress=False).units
        {'answer_log_probability': 'nats'}
    """
    check_bridge(bridge)
    batch = bridge.to_batch(input, attention_mask, prepend_bos, padding_side)
    if batch.attention is not None:
        raise InputError("an answer goes behind rows that a mask of two axes tells", got="a mask of four axes")
    with argument("answers"):
        kept = [_ids_of(bridge, one) for one in _each(answers)]
    if len(kept) not in (1, batch.rows):
        raise InvalidArgumentError(
            "answers are one for all rows, or one for each", expected=f"1 or {batch.rows}", got=f"{len(kept)}"
        )
    by_row = kept * (batch.rows if len(kept) == 1 else 1)
    prompts = [row[list(real)].tolist() for row, real in zip(batch.ids, batch.real_columns, strict=True)]
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, by_row, strict=True)]
    tokens, mask = bridge.text.padded(rows, padding_side)
    return bridge.to_batch(Batch(tokens, mask)), AnswerLogProbability(tuple(map(tuple, kept)))


def _each(answers: Any) -> list[Any]:
    """Returns the answers one by one."""
    if isinstance(answers, Tensor | np.ndarray):
        answers = answers.tolist()
    several = list(answers) if isinstance(answers, list | tuple) else [answers]
    if not several:
        raise InvalidArgumentError("there is no answer", expected="text, or token ids", got=repr(answers))
    return several


def _ids_of(bridge: TransformerBridge, answer: Any) -> list[int]:
    """Returns the token ids of one answer."""
    if isinstance(answer, str):
        return bridge.text.continuation(answer)
    ids = wholes(answer)
    if not ids or not all(0 <= token < bridge.embed.n_tokens for token in ids):
        raise InvalidArgumentError(
            f"{answer!r} is no answer"[:120],
            expected=f"text, a token id or a list of them, from 0 to {bridge.embed.n_tokens - 1}",
        )
    return list(ids)
