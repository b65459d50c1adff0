"""Streaming: what generation adds, handed out while it goes on."""

import collections
import contextlib
import itertools
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clearspan.bridge import generation, hooks
from clearspan.bridge.generation import Prompt
from clearspan.bridge.handover import Handover
from clearspan.bridge.hooks import Hooks
from clearspan.errors import InvalidArgumentError

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge

BROKEN = "\ufffd"
"""What a tokenizer gives for bytes that are no character, or are not one yet."""


def stream(
    bridge: "TransformerBridge", prompt: Prompt, max_tokens_per_yield: int, fwd_hooks: Hooks
) -> Generator[Tensor, None, None] | Generator[str | list[str], None, None]:
    """Returns the stream of a prompt's continuation. The arguments are those of `TransformerBridge.generate_stream`."""
    if max_tokens_per_yield < 1:
        raise InvalidArgumentError(
            "a stream gives at least one token at a time",
            expected="max_tokens_per_yield of 1 or more",
            got=f"{max_tokens_per_yield}",
        )
    if "streamer" in prompt.kwargs:
        raise InvalidArgumentError(
            "generate_stream has a streamer of its own",
            got=type(prompt.kwargs["streamer"]).__name__,
            fix="bridge.generate(..., streamer=...)",
        )
    with generation.hooked(bridge, fwd_hooks, iter(())):
        pass  # a name that is unknown raises here, not when the first token is asked for
    handover: Handover[Tensor] = Handover(
        lambda hand: generation.run(bridge, prompt, streamer=_Streamer(hand, max_tokens_per_yield))
    )
    tokens = _tokens(bridge, handover, fwd_hooks)
    return _texts(bridge, prompt, tokens) if prompt.is_text else tokens


class _Streamer:
    """What Hugging Face's `generate` puts its tokens into.

    Args:
        hand: Given up to `size` tokens of each row at a time, `[batch, new]`.
        size: How many.
    """

    def __init__(self, hand: Callable[[Tensor], None], size: int) -> None:
        self._hand = hand
        self._size = size
        self._rows: int | None = None
        self._tokens: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        """Takes the prompt first, then the new token of each row (several, of one row, in speculation)."""
        if self._rows is None:
            self._rows = len(value)
            return
        self._tokens.extend(value.reshape(self._rows, -1).unbind(1))
        while len(self._tokens) >= self._size:
            self._flush()

    def end(self) -> None:
        """Hands on what is left."""
        if self._tokens:
            self._flush()

    def _flush(self) -> None:
        tokens, self._tokens = self._tokens[: self._size], self._tokens[self._size :]
        self._hand(torch.stack(tokens, 1))


def _tokens(bridge: "TransformerBridge", handover: Handover[Tensor], fwd_hooks: Hooks) -> Generator[Tensor, None, None]:
    """Yields new tokens `[batch, new]`. The hooks are on only while generation goes on, not while its user does."""
    steps = itertools.count()
    calls: collections.Counter[int] = collections.Counter()
    with contextlib.closing(handover):
        while True:
            with generation.hooked(bridge, fwd_hooks, steps) as listeners:
                chunk = next(handover, None)
            calls.update({index: listener.calls for index, (_, listener, _) in enumerate(listeners)})
            if chunk is None:
                break
            yield chunk.to(bridge.device)
    for index, (_, listener, _) in enumerate(listeners):
        listener.calls = calls[index]
    hooks.check_fired(listeners)


def _texts(
    bridge: "TransformerBridge", prompt: Prompt, chunks: Generator[Tensor, None, None]
) -> Generator[str | list[str], None, None]:
    """Yields the new text of each row, as soon as it is known and not earlier."""
    sequences = prompt.tokens
    shown = generation.decode(bridge, sequences)
    with contextlib.closing(chunks):
        for chunk in itertools.chain(chunks, [None]):
            if chunk is not None:
                copies = len(chunk) // len(sequences)  # several sequences a row
                sequences = torch.cat([sequences.repeat_interleave(copies, 0), chunk], 1)
                shown = [text for text in shown for _ in range(copies)]
            texts = generation.decode(bridge, sequences)
            new = [_beyond(before, text, chunk is None) for before, text in zip(shown, texts, strict=True)]
            shown = [text if there else before for before, (text, there) in zip(shown, new, strict=True)]
            if any(there for _, there in new):
                yield new[0][1] if prompt.is_one and len(new) == 1 else [there for _, there in new]


def _beyond(shown: str, text: str, is_last: bool) -> tuple[str, str]:
    """Returns how far a text is certain, and what of that is beyond the text shown already.

    Bytes at its end may be the first of a character whose others come later.

    Args:
        shown: What was shown, the prompt's text first.
        text: The text of all tokens so far.
        is_last: Whether it is complete.
    """
    certain = text if is_last else text.rstrip(BROKEN)
    if certain.startswith(shown):
        return certain, certain[len(shown) :]
    if not is_last:
        return shown, ""
    # Some tokenizers decode a character that never becomes whole into more than its own bytes.
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(shown, text, strict=False)))
    return text, text[same:]
