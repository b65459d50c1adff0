"""Text and tokens: one leading BOS where asked for, padding by length and never by token id."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from clearspan.config import TransformerBridgeConfig
from clearspan.errors import InputError, InvalidArgumentError, NoTokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PaddingSide = Literal["left", "right"]


class Text:
    """Turns text into tokens and back.

    Args:
        tokenizer: A Hugging Face tokenizer, or None.
        cfg: Says whether a BOS is put first by default, and how long an input may be.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None", cfg: TransformerBridgeConfig) -> None:
        self._tokenizer = tokenizer
        self._cfg = cfg

    @property
    def tokenizer_or_none(self) -> "PreTrainedTokenizerBase | None":
        """The tokenizer, or None."""
        return self._tokenizer

    @tokenizer_or_none.setter
    def tokenizer_or_none(self, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer.

        Raises:
            NoTokenizerError: There is none.
        """
        if self._tokenizer is None:
            raise NoTokenizerError(
                "this bridge has no tokenizer, so it takes no text",
                where=self._cfg.model_name or self._cfg.architecture,
                fix="clearspan.boot(model, tokenizer=...), or pass token ids as a tensor [batch, pos]",
            )
        return self._tokenizer

    def encode(
        self,
        text: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        truncate: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns token ids `[batch, pos]` and the mask of real tokens, None where there is no padding.

        Args:
            text: One string, or one for each row.
            prepend_bos: Whether each row starts with a BOS: one, also where the text itself begins with it. By default
                as `cfg.default_prepend_bos` says, where the tokenizer has one. No other special token is added.
            padding_side: Where shorter rows are filled; by default the tokenizer's own side.
            truncate: Whether a text longer than the context is cut at its end.

        Raises:
            InputError: An empty string, or no string.
            NoTokenizerError: There is no tokenizer.
        """
        tokenizer = self.tokenizer
        side = padding_side or tokenizer.padding_side
        if side not in ("left", "right"):
            raise InvalidArgumentError(f"unknown padding_side {side!r}", expected="'left' or 'right'")
        rows = [text] if isinstance(text, str) else list(text)
        if not rows or not all(rows):
            raise InputError(
                "an empty string has no tokens" if rows else "an empty list has no rows",
                got=repr(text),
                fix="for the BOS token alone, pass torch.tensor([[bridge.tokenizer.bos_token_id]])",
            )
        bos = tokenizer.bos_token_id
        prepend = prepend_bos if prepend_bos is not None else self._cfg.default_prepend_bos and bos is not None
        if prepend and bos is None:
            raise InputError("prepend_bos=True, but the tokenizer has no BOS token", fix="prepend_bos=False")
        # A text longer than the tokenizer's limit is reported, or cut, against the model's own context instead.
        encoded = [list(tokenizer(row, add_special_tokens=False, verbose=False)["input_ids"]) for row in rows]
        encoded = [[bos, *row] if prepend and row[:1] != [bos] else row for row in encoded]
        if not all(encoded):
            raise InputError("a text has no tokens", got=repr(text), where=type(tokenizer).__name__)
        if truncate:
            encoded = [row[: self._cfg.n_ctx] for row in encoded]
        return self._pad(encoded, side)

    def _pad(self, rows: list[list[int]], side: str) -> tuple[Tensor, Tensor | None]:
        width = max(map(len, rows))
        if all(len(row) == width for row in rows):
            return torch.tensor(rows), None
        pad = self.tokenizer.pad_token_id
        tokens = torch.full((len(rows), width), pad if isinstance(pad, int) else 0)  # masked: the value is not seen
        mask = torch.zeros_like(tokens)
        for index, row in enumerate(rows):
            span = slice(width - len(row), width) if side == "left" else slice(len(row))
            tokens[index, span] = torch.tensor(row)
            mask[index, span] = 1
        return tokens, mask

    def decode(self, tokens: Tensor | Sequence[int] | int) -> str | list[str]:
        """Returns the text of a row of ids (or one id), or a list of texts for rows."""
        ids = torch.as_tensor(tokens)
        if ids.ndim == 2:
            return [str(self.tokenizer.decode(row.tolist())) for row in ids]
        return str(self.tokenizer.decode(ids.reshape(-1).tolist()))

    def str_tokens(
        self, input: str | Sequence[str] | Tensor, prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """Returns each token's own text, as one list for a string or a row of ids and a list of lists for several."""
        if isinstance(input, Tensor):
            if input.ndim == 2 and len(input) > 1:
                return [self._pieces(row.tolist()) for row in input]
            return self._pieces(input.reshape(-1).tolist())
        if isinstance(input, str):
            return self._pieces(self.encode(input, prepend_bos)[0][0].tolist())
        return [self._pieces(self.encode(row, prepend_bos)[0][0].tolist()) for row in input]

    def _pieces(self, ids: list[int]) -> list[str]:
        return [str(self.tokenizer.decode([token])) for token in ids]

    def single_token(self, text: str) -> int:
        """Returns the id of a text that is one token.

        Raises:
            InputError: It is none, or more than one.
        """
        ids = self.encode(text, prepend_bos=False)[0][0].tolist()
        if len(ids) != 1:
            raise InputError(
                f"{text!r} is not a single token", expected="one token", got=f"{len(ids)}: {self._pieces(ids)}"
            )
        return ids[0]
