"""Tokenizers: a checkpoint's own, and whether one can turn text into the ids of a model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from clearspan.errors import InputError, InvalidArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS = tuple(map(chr, (*range(33, 127), 0xE9, 0x3B1, 0x436, 0x5D0, 0x627, 0x915, 0x3042, 0x4E2D, 0xAC00)))
"""A usable tokenizer gives some of these texts different ids: printable characters, and one of some other scripts."""
_WORDS = 64
"""How many of the tokenizer's own words are such texts as well: it may know no single character."""
_SPARE, _SPARE_SHARE = 1024, 0.1
"""Rows of an embedding that no token has, up to which padding explains them: the most known is 2.4 % (DeepSeek V2)."""


class OwnTokenizer(NamedTuple):
    """What a checkpoint has to turn text into tokens.

    Attributes:
        tokenizer: Its tokenizer, or None.
        fault: Why there is none.
    """

    tokenizer: "PreTrainedTokenizerBase | None" = None
    fault: str | None = None

    def serving(self, d_vocab: int) -> "OwnTokenizer":
        """Returns the tokenizer where it can serve a model of so many tokens, and otherwise why it cannot."""
        fault = None if self.tokenizer is None else tokenizer_fault(self.tokenizer, d_vocab)
        return self if fault is None else OwnTokenizer(None, fault)


NO_TOKENIZER = OwnTokenizer()


def load_tokenizer(source: str, **hub: Any) -> OwnTokenizer:
    """Returns a checkpoint's tokenizer, or why there is none."""
    from transformers import AutoTokenizer

    try:
        return OwnTokenizer(AutoTokenizer.from_pretrained(source, **hub))
    except (OSError, ValueError) as error:  # no files, or a package that reads them is not installed
        return OwnTokenizer(
            fault=f"transformers loads no tokenizer from {source!r}: {' '.join(str(error).split())}"[:400]
        )


def check_tokenizer(tokenizer: object) -> None:
    """Raises unless the object is a tokenizer, or None."""
    if tokenizer is None:
        return
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InvalidArgumentError(
            f"tokenizer={tokenizer!r}"[:80],
            expected="a tokenizer of transformers, or None",
            got=type(tokenizer).__name__,
            fix="transformers.AutoTokenizer.from_pretrained(...)",
        )


def tokenizer_fault(tokenizer: "PreTrainedTokenizerBase", d_vocab: int) -> str | None:
    """Returns why a tokenizer cannot turn text into a model's ids, or None where it can.

    Where a folder has no tokenizer files, transformers makes up one of its special tokens alone, which gives every text
    the same ids. Legal are: a vocabulary shorter than the model's, whose size is often padded; and added tokens beyond
    the model's, which raise where a text holds them.

    Args:
        tokenizer: The tokenizer.
        d_vocab: Rows of the model's token embedding.
    """
    vocabulary = tokenizer.get_vocab()
    added = _added(tokenizer)
    beyond = sorted((index, token) for token, index in vocabulary.items() if index >= d_vocab and token not in added)
    if beyond:
        return (
            f"the tokenizer has {len(vocabulary)} tokens and the model {d_vocab}: ids {beyond[0][0]} to "
            f"{beyond[-1][0]} are outside the model's, {beyond[0][1]!r} the first"
        )
    special = set(tokenizer.all_special_tokens)
    words = (token for token in sorted(vocabulary, key=vocabulary.__getitem__) if token not in special)
    texts = [*_CHARACTERS, *(text for text, _ in zip(words, range(_WORDS), strict=False))]
    return _collapse(tokenizer, texts, len(vocabulary), d_vocab) or _no_return(tokenizer, texts)


def _added(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """Returns the tokens that were added to a tokenizer's own; the one kind without such has none."""
    from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

    is_open = isinstance(tokenizer, PreTrainedTokenizer | PreTrainedTokenizerFast)
    return set(tokenizer.get_added_vocab()) if is_open else set()


def _collapse(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str], size: int, d_vocab: int) -> str | None:
    """Returns the fault that a tokenizer gives all texts the same ids, or None where it tells two apart."""
    found = (ids_of(tokenizer, text) for text in texts)
    first = next(found)
    if any(ids != first for ids in found):
        return None
    return (
        f"the tokenizer gives every text the same ids, {first or 'none at all'}; it has {size} "
        f"token{'s' * (size != 1)} and the model {d_vocab} (transformers makes up such a one, of special tokens alone, "
        "where a checkpoint has no tokenizer files)"
    )


def _no_return(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> str | None:
    """Returns the fault that no text comes back from its ids, or None where one does."""
    for text in texts:
        ids = ids_of(tokenizer, text)
        if ids and _plain(decoded(tokenizer, ids)) == _plain(text):
            return None
    return "the tokenizer turns no text that it was tried on back into itself"


def _plain(text: str) -> str:
    """Returns a text without white space and case, which a tokenizer may change."""
    return "".join(text.split()).casefold()


def ids_of(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Returns a text's ids, without special tokens around them, however long it is."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def decoded(tokenizer: "PreTrainedTokenizerBase", ids: list[int], *, skip_special_tokens: bool = False) -> str:
    """Returns the text of ids as it is: without the cleaning by which some tokenizers drop spaces before commas."""
    return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))


def templated(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> str:
    """Returns chat messages as the text that the tokenizer's template makes of them.

    Raises:
        InputError: The tokenizer has no template, or the template refuses the messages.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise InputError(
            "the tokenizer has no chat template",
            where=type(tokenizer).__name__,
            reason="it is a base model's, or the template was not saved with it",
            fix="bridge.tokenizer.chat_template = ..., or pass text",
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(one) for one in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(
            "the tokenizer's chat template cannot write these messages",
            expected="messages with a role and content, in the order that the template allows",
            got=repr(list(messages))[:200],
            reason=str(error),
        ) from error
    return str(text)


def tokenizer_doubt(tokenizer: "PreTrainedTokenizerBase", d_vocab: int) -> str | None:
    """Returns why a usable tokenizer may be another model's, or None: it is so short that padding does not explain it.

    Args:
        tokenizer: The tokenizer.
        d_vocab: Rows of the model's token embedding.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    if d_vocab - size <= max(_SPARE, _SPARE_SHARE * d_vocab):
        return None
    return f"the tokenizer's ids end at {size - 1}, and the model's at {d_vocab - 1}: it may be another model's"
