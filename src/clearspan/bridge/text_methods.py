"""The bridge's methods between text and tokens; the work is in `text.py`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clearspan.bridge.text import PaddingSide, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextMethods:
    """Names what `bridge.text` does."""

    text: Text

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """Its tokenizer, or None; it can be set."""
        return self.text.tokenizer_or_none

    @tokenizer.setter
    def tokenizer(self, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        self.text.tokenizer_or_none = tokenizer

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        *,
        truncate: bool = False,
    ) -> Tensor:
        """Returns token ids `[batch, pos]` on the model's device.

        Texts of different lengths are padded, which the tensor alone does not tell: pass the texts themselves to
        `forward`, or the mask of `bridge.text.encode` along with it.

        Args:
            input: Text, or a list of texts.
            prepend_bos: Whether each row starts with one BOS; by default as `cfg.default_prepend_bos` says.
            padding_side: Where shorter rows are filled; by default the tokenizer's side.
            truncate: Whether to cut a text at the end of the context.

        Raises:
            InputError: An empty string, or no string.
            NoTokenizerError: There is no tokenizer.
        """
        return self.text.encode(input, prepend_bos, padding_side, truncate)[0].to(self.device)

    def to_string(self, tokens: Tensor | Sequence[int] | int) -> str | list[str]:
        """Returns the text of a row of ids or of one id, or a list of texts for `[batch, pos]`."""
        return self.text.decode(tokens)

    def to_str_tokens(
        self, input: str | Sequence[str] | Tensor, prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """Returns each token's own text: a list for one row, a list of lists for several."""
        return self.text.str_tokens(input, prepend_bos)

    def to_single_token(self, string: str) -> int:
        """Returns the id of a text that is one token.

        Raises:
            InputError: It is none, or more than one.
        """
        return self.text.single_token(string)

    def to_single_str_token(self, token: int) -> str:
        """Returns the text of one token id."""
        return str(self.text.decode(token))
