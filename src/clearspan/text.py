"""Text and chat messages as token ids, and token ids as text, by a model's tokenizer."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeGuard, cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.checks import check_flags, tensor_of, wholes
from clearspan.components import EmbeddingBridge
from clearspan.config import TransformerBridgeConfig
from clearspan.errors import InputError, InvalidArgumentError, NoTokenizerError, TokenizerWarning, TokenRangeError
from clearspan.hf.tokenizers import OwnTokenizer, decoded, ids_of, templated
from clearspan.plots import id_label, visible

if TYPE_CHECKING:
    from clearspan.hf.types import PreTrainedTokenizerBase

PaddingSide = Literal["left", "right"]
Messages = Sequence[Mapping[str, Any]]
"""A conversation: messages with a `role`, and what else the tokenizer's template reads."""
BROKEN = "\ufffd"
"""What a tokenizer gives for bytes that are no character, or are not one yet."""


@dataclass(frozen=True)
class Chat:
    """How a conversation ends once the template has written it; None is by the last message, as in `Text.written`.

    Attributes:
        add_generation_prompt: Whether the start of an answer follows.
        continue_final_message: Whether the last message is left open.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False

    def __post_init__(self) -> None:
        check_flags(**{name: flag for name, flag in vars(self).items() if flag is not None})
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidArgumentError(
                "a last message that is continued has no answer after it",
                got="add_generation_prompt=True, continue_final_message=True",
            )

    def ending(self, messages: Messages) -> "Chat":
        """Returns how one conversation ends."""
        is_answered = messages[-1].get("role") == "assistant"
        continues = self.continue_final_message
        if continues is None:
            continues = is_answered and not self.add_generation_prompt
        prompt = self.add_generation_prompt
        return Chat(not (is_answered or continues) if prompt is None else prompt, continues)


BY_LAST_MESSAGE = Chat()


class Encoded(NamedTuple):
    """Rows of text as tokens.

    Attributes:
        tokens: Their ids.
        mask: 1 for real tokens, or None where nothing is padded.
        texts: The text of each row; of a conversation, as the template wrote it.
    """

    tokens: Int[Tensor, "row pos"]
    mask: Int[Tensor, "row pos"] | None
    texts: tuple[str, ...]


def is_conversation(given: object) -> TypeGuard[Messages]:
    """Returns whether something is the messages of one conversation, and no rows of a dataset."""
    return (
        isinstance(given, list | tuple)
        and bool(given)
        and all(isinstance(one, Mapping) for one in given)
        and "role" in given[0]
        and not {"input_ids", "text", "messages"} & given[0].keys()
    )


class Text:
    """Turns text into tokens and back.

    Args:
        own: A tokenizer, or why there is none.
        cfg: Says whether a BOS is put first by default, and how long an input may be.
        embed: Says how many tokens the model has.
    """

    def __init__(self, own: OwnTokenizer, cfg: TransformerBridgeConfig, embed: EmbeddingBridge) -> None:
        self.own = own
        self._cfg = cfg
        self._embed = embed

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer.

        Raises:
            NoTokenizerError: There is none that turns text into this model's ids.
        """
        if self.own.tokenizer is None:
            raise NoTokenizerError(
                "this bridge has no tokenizer, so it takes no text",
                where=self._cfg.model_name or self._cfg.architecture,
                reason=self.own.fault,
                fix="clearspan.boot(model, tokenizer=...), or pass token ids as a tensor [batch, pos]",
            )
        return self.own.tokenizer

    @property
    def pad_id(self) -> int:
        """The token that fills shorter rows: the tokenizer's, where the model has it, or 0."""
        pad = None if self.own.tokenizer is None else self.own.tokenizer.pad_token_id
        return pad if isinstance(pad, int) and 0 <= pad < self._embed.n_tokens else 0

    # --- text to tokens ----------------------------------------------------------------------------------------------

    def written(self, input: object, chat: Chat) -> tuple[list[str], bool]:
        """Returns the text of each row, and whether they are conversations.

        Args:
            input: Text, texts, the messages of a conversation, or several conversations.
            chat: How conversations end. By default an answer's start follows, except after the assistant's message.

        Raises:
            InputError: Something else, or the tokenizer has no template, or the template refuses a conversation.
            NoTokenizerError: There is no tokenizer.
        """
        tokenizer = self.tokenizer
        is_one = is_conversation(input) or isinstance(input, str) or not isinstance(input, Sequence | np.ndarray)
        rows = [input] if is_one else list(cast("Sequence[Any]", input))
        if rows and all(map(is_conversation, rows)):
            return [self._templated(cast("Messages", row), chat) for row in rows], True
        if not all(isinstance(row, str) for row in rows):
            raise InputError(
                "only text is encoded",
                expected="text, a list of texts, or chat messages with a role each",
                got=repr(input)[:80],
            )
        if not rows or not all(rows):
            raise InputError(
                "an empty string has no tokens" if rows else "an empty list has no rows",
                got=repr(input),
                fix=None
                if tokenizer.bos_token_id is None
                else "for the BOS token alone, pass torch.tensor([[bridge.tokenizer.bos_token_id]])",
            )
        return cast("list[str]", rows), False

    def _templated(self, messages: Messages, chat: Chat) -> str:
        ending = chat.ending(messages)
        text = templated(
            self.tokenizer,
            messages,
            add_generation_prompt=bool(ending.add_generation_prompt),
            continue_final_message=bool(ending.continue_final_message),
        )
        if not text:
            raise InputError("the chat template makes an empty text of the messages", got=repr(messages)[:80])
        return text

    def encode(
        self,
        input: object,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        truncate: bool = False,
        chat: Chat = BY_LAST_MESSAGE,
    ) -> Encoded:
        """Returns rows of text as tokens.

        Args:
            input: One string, or one for each row; the messages of a conversation, or several conversations.
            prepend_bos: Whether each row starts with a BOS: one, also where the text itself begins with it. By default
                as `cfg.default_prepend_bos` says, where the tokenizer has one; a template puts its own. No other
                special token is added.
            padding_side: Where shorter rows are filled; by default the tokenizer's own side.
            truncate: Whether a text longer than the context is cut at its end.
            chat: How conversations end.

        Raises:
            InputError: An empty string, or no string; a text without tokens.
            TokenRangeError: A text has a token for which the model has no embedding.
            NoTokenizerError: There is no tokenizer.
        """
        tokenizer = self.tokenizer
        side = self._side(padding_side)
        check_flags(truncate=truncate)
        rows, is_chat = self.written(input, chat)
        bos = tokenizer.bos_token_id
        if prepend_bos is not None:
            check_flags(prepend_bos=prepend_bos)
        by_default = self._cfg.default_prepend_bos and bos is not None and not is_chat
        prepend = by_default if prepend_bos is None else prepend_bos
        if prepend and bos is None:
            raise InputError("prepend_bos=True, but the tokenizer has no BOS token", fix="prepend_bos=False")
        encoded = [self._ids_of(row) for row in rows]
        encoded = [[bos, *row] if prepend and row[:1] != [bos] else row for row in encoded]
        if truncate:
            encoded = [row[: self._cfg.n_ctx] for row in encoded]
        return Encoded(*self.padded(encoded, side), tuple(rows))

    def _ids_of(self, text: str) -> list[int]:
        """Returns the ids of a text, no special tokens around them.

        A text longer than the tokenizer's limit is reported, or cut, against the model's own context instead.
        """
        tokenizer = self.tokenizer
        ids = ids_of(tokenizer, text)
        if not ids:
            raise InputError("a text has no tokens", got=repr(text), where=type(tokenizer).__name__)
        self._check_known(text, ids)
        if self._is_unknown(text) and all(token == tokenizer.unk_token_id for token in ids):
            warnings.warn(
                f"the tokenizer knows nothing of {text[:40]!r}: each of its tokens is {tokenizer.unk_token!r}",
                TokenizerWarning,
                stacklevel=2,
            )
        return ids

    def _is_unknown(self, text: str) -> bool:
        """Returns whether the unknown token in a text's ids would say that the tokenizer does not know the text."""
        unknown = self.tokenizer.unk_token
        return unknown is not None and str(unknown) not in text

    def _check_known(self, text: str, ids: Sequence[int]) -> None:
        """Raises TokenRangeError unless the model has an embedding for each token of a text."""
        most = self._embed.n_tokens
        beyond = [token for token in ids if token >= most]
        if beyond:
            tokenizer = self.tokenizer
            raise TokenRangeError(
                f"the model has no embedding for {decoded(tokenizer, beyond[:1])!r}",
                expected=f"ids 0 to {most - 1}",
                got=f"{beyond[0]}, in {text[:40]!r}",
                where=f"{type(tokenizer).__name__} of {len(tokenizer)} tokens",
                fix="bridge.hf_model.resize_token_embeddings(len(bridge.tokenizer)), and train the new rows",
            )

    def single_token(self, text: str) -> int:
        """Returns the id of a text that is one token.

        Raises:
            InputError: It is none, or more than one, or unknown to the tokenizer.
        """
        ids = self.continuation(text)
        if len(ids) != 1:
            raise InputError(
                f"{text!r} is not a single token",
                expected="one token",
                got=f"{len(ids)}: {[self.word(token) for token in ids]}, ids {ids}",
                fix=f"{ids[0]} for its first token alone; clearspan.sweep.answered(bridge, prompts, answers) for the "
                "log-probability of all its tokens",
            )
        return ids[0]

    def continuation(self, text: str) -> list[int]:
        """Returns the ids of a text that continues another, as an answer does.

        Raises:
            InputError: No text, an empty one, or one with a token that the tokenizer does not know.
        """
        if not isinstance(text, str):
            raise InputError("an answer is text, or token ids", expected="text", got=repr(text)[:80])
        tokenizer = self.tokenizer
        self.written(text, BY_LAST_MESSAGE)
        ids = self.continuing(text)
        if not ids:
            raise InputError("a text has no tokens", got=repr(text), where=type(tokenizer).__name__)
        self._check_known(text, ids)
        if self._is_unknown(text) and tokenizer.unk_token_id in ids:
            raise InputError(
                f"the tokenizer does not know {text!r}",
                got=f"{self._pieces(ids)}, of which {str(tokenizer.unk_token)!r} is its unknown token",
                where=type(tokenizer).__name__,
                fix="a text of its vocabulary, or a token id",
            )
        return ids

    def continuing(self, text: str) -> list[int]:
        """Returns the ids that a text has behind a word where it starts with a space, and otherwise by itself.

        Some tokenizers put a space of their own before a text.
        """
        before = ids_of(self.tokenizer, "and")
        if text.startswith(" "):
            behind = ids_of(self.tokenizer, f"and{text}")
            if before and behind[: len(before)] == before:
                return behind[len(before) :]
        return ids_of(self.tokenizer, text)

    def padded(self, rows: Sequence[Sequence[int]], side: PaddingSide | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns rows of ids `[row, pos]` and the mask of real tokens, None where nothing is padded.

        Args:
            rows: The ids.
            side: Where shorter rows are filled; by default on the tokenizer's side, or on the right.
        """
        width = max(map(len, rows))
        if all(len(row) == width for row in rows):
            return torch.tensor(rows), None
        side = self._side(side)
        tokens = torch.full((len(rows), width), self.pad_id)  # masked: the value is not seen
        mask = torch.zeros_like(tokens)
        for index, row in enumerate(rows):
            span = slice(width - len(row), width) if side == "left" else slice(len(row))
            tokens[index, span] = torch.tensor(row)
            mask[index, span] = 1
        return tokens, mask

    def _side(self, side: PaddingSide | None) -> PaddingSide:
        """Returns where shorter rows are filled."""
        if side is None:
            return cast("PaddingSide", "right" if self.own.tokenizer is None else self.own.tokenizer.padding_side)
        if not isinstance(side, str) or side not in ("left", "right"):
            raise InvalidArgumentError(f"unknown padding_side {side!r}", expected="'left' or 'right'")
        return side

    # --- tokens to text ----------------------------------------------------------------------------------------------

    def decode(self, tokens: Tensor | Sequence[int] | int) -> str | list[str]:
        """Returns the text of a row of ids (or one id), or a list of texts for rows."""
        tokenizer, ids = self.tokenizer, self._ids(tokens)
        if ids.ndim == 2:
            return [decoded(tokenizer, row.tolist()) for row in ids]
        return decoded(tokenizer, ids.reshape(-1).tolist())

    def without_special(self, rows: Int[Tensor, "row pos"]) -> list[str]:
        """Returns the text of each row, without special tokens."""
        return [decoded(self.tokenizer, row, skip_special_tokens=True) for row in rows.tolist()]

    def str_tokens(self, input: object, prepend_bos: bool | None = None) -> list[str] | list[list[str]]:
        """Returns what each token adds to the text: one list for one row, and a list of lists for several.

        Joined they are the row's text, but for tokens that are part of a character: each is the replacement character.
        """
        if isinstance(input, Tensor) or wholes(input) or (isinstance(input, np.ndarray) and input.dtype.kind in "iu"):
            ids = self._ids(input)
            if ids.ndim == 2 and len(ids) > 1:
                return [self._pieces(row.tolist()) for row in ids]
            return self._pieces(ids.reshape(-1).tolist())
        if isinstance(input, str) or is_conversation(input):
            return self._pieces(self.encode(input, prepend_bos).tokens[0].tolist())
        if not isinstance(input, Sequence | np.ndarray):
            raise InputError("these are no texts", expected="text, texts, or token ids", got=repr(input)[:80])
        return [self._pieces(self.encode(row, prepend_bos).tokens[0].tolist()) for row in input]

    def label(self, token: int, width: int | None = None) -> str:
        """Returns how a token is written where it is looked at: its text as behind a word, white space visible.

        A token without text (there is no tokenizer, or the model's vocabulary is longer) is written as its id, `#5`; to
        one that is part of a character the id is added.

        Args:
            token: Its id.
            width: Characters beyond which the text is cut.
        """
        text = self.word(token)
        if not text:
            return id_label(token)
        return visible(text, width) + (id_label(token) if BROKEN in text else "")

    def word(self, token: int) -> str:
        """Returns what a token adds to a text before it; nothing where there is no tokenizer, or it has no such token.

        A text's first token is decoded without the space that it has elsewhere by some tokenizers, so that `world` at
        the start and `world` within a word would look alike: it is read behind itself.
        """
        tokenizer = self.own.tokenizer
        return "" if tokenizer is None or token >= len(tokenizer) else self._piece(token, token)

    def _piece(self, before: int, token: int) -> str:
        """Returns what a token adds to the text of the one before it; its own text where the two are one character."""
        tokenizer = self.tokenizer
        own, start = decoded(tokenizer, [token]), decoded(tokenizer, [before])
        both = decoded(tokenizer, [before, token])
        return own if BROKEN in own or not both.startswith(start) else both[len(start) :]

    def _pieces(self, ids: list[int]) -> list[str]:
        rest = [self._piece(before, token) for before, token in pairwise(ids)]
        return [decoded(self.tokenizer, ids[:1]), *rest] if ids else []

    def _ids(self, tokens: object) -> Int[Tensor, "*row pos"]:
        """Returns token ids as a tensor of a row, or of rows.

        Raises:
            InputError: They are no whole numbers, or some are negative.
            TokenRangeError: Neither the model nor the tokenizer has them.
        """
        ids = tensor_of("tokens", tokens)
        is_ids = not (ids.is_floating_point() or ids.dtype == torch.bool) or not ids.numel()
        if not is_ids or ids.ndim > 2 or (ids.numel() and int(ids.min()) < 0):
            raise InputError("these are no token ids", expected="one, a row, or rows", got=repr(tokens)[:80])
        most = max(self._embed.n_tokens, len(self.tokenizer)) - 1
        if ids.numel() and int(ids.max()) > most:
            raise TokenRangeError(
                "token ids outside the vocabulary", expected=f"0 to {most}", got=f"{int(ids.min())} to {int(ids.max())}"
            )
        return ids.long()
