"""Inputs: text and token ids as a batch, with the mask of what is padded, made once at the public entry.

Below the entry nobody passes ids and a mask side by side. A position is counted among a row's real tokens here, and
nowhere else.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.checks import check_flags, is_whole, wholes
from clearspan.errors import InputError, InvalidArgumentError, TokenRangeError
from clearspan.text import BY_LAST_MESSAGE, Chat, PaddingSide, Text, is_conversation
from clearspan.transfers import on_device

Positions = int | Sequence[int] | Sequence[Sequence[int]] | slice | None
"""Positions among a row's real tokens: one, several, a list for each row, a slice, or all (None)."""
FEW = 256
"""Token ids whose bounds Python finds sooner than a kernel starts."""
Place = tuple[int, int]
"""A row of a batch, and a position among its real tokens."""


@dataclass(frozen=True, eq=False, repr=False)
class Batch:
    """Rows of tokens, with the mask of what is padded, and the texts that they were. `bridge.to_batch` makes one.

    A position of a row is counted among its real tokens, negative from the last one; a column is a place in the
    tensors, padding included.

    Attributes:
        tokens: Token ids, or None for embeddings.
        mask: 1 for real tokens, or None where nothing is padded.
        embeds: Embeddings, or the residual stream that a run starts from, in place of tokens.
        attention: A mask of four axes in place of a padding mask, as the model's own code takes it.
        texts: The text of each row, where it was text.
        is_one: Whether one text was given, and not a list.
        is_bare: Whether it was token ids or embeddings alone, which do not tell what is padding.
    """

    tokens: Int[Tensor, "row pos"] | None
    mask: Int[Tensor, "row pos"] | None = None
    embeds: Float[Tensor, "row pos d_model"] | None = None
    attention: Tensor | None = None
    texts: tuple[str, ...] | None = None
    is_one: bool = False
    is_bare: bool = False

    def __post_init__(self) -> None:
        _check_parts(self)

    @classmethod
    def of_ids(cls, tokens: Int[Tensor, "row pos"]) -> Self:
        """Returns bare token ids as a batch. They were checked: every run makes one."""
        batch, (rows, width) = object.__new__(cls), tokens.shape
        # The other fields have their defaults.
        vars(batch).update(tokens=tokens, is_bare=True, rows=rows, width=width)
        return batch

    @property
    def value(self) -> Tensor:
        """The token ids, or the embeddings."""
        value = self.tokens if self.embeds is None else self.embeds
        assert value is not None, "a batch has tokens or embeddings"
        return value

    @property
    def ids(self) -> Int[Tensor, "row pos"]:
        """The token ids.

        Raises:
            InputError: The batch holds embeddings.
        """
        if self.tokens is None:
            raise InputError("this needs token ids", got="embeddings", expected="text, or token ids [row, pos]")
        return self.tokens

    @cached_property
    def rows(self) -> int:
        """How many rows."""
        return len(self.value)

    @cached_property
    def width(self) -> int:
        """How many columns, padding included."""
        return self.value.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self.value.device

    @property
    def is_padded(self) -> bool:
        """Whether some tokens are padding."""
        return self.mask is not None

    # --- positions ---------------------------------------------------------------------------------------------------

    @cached_property
    def lengths(self) -> Int[Tensor, "row"]:
        """Real tokens of each row, on the CPU."""
        return torch.full((self.rows,), self.width) if self.mask is None else self.mask.sum(-1).cpu()

    @property
    def longest(self) -> int:
        """Real tokens of the longest row."""
        return int(self.lengths.max())

    @property
    def real(self) -> Int[Tensor, "row pos"]:
        """1 for real tokens, also where nothing is padded."""
        return (
            torch.ones(self.value.shape[:2], dtype=torch.long, device=self.device) if self.mask is None else self.mask
        )

    @cached_property
    def real_columns(self) -> tuple[tuple[int, ...], ...]:
        """The columns of each row's real tokens, in order."""
        if self.mask is None:
            return (tuple(range(self.width)),) * self.rows
        return tuple(tuple(row.nonzero()[:, 0].tolist()) for row in self.mask.cpu())

    def position_of(self, row: int, position: int, what: str = "position") -> int:
        """Returns a position of a row counted from 0.

        Raises:
            InvalidArgumentError: The row does not have it.
        """
        if not is_whole(position):
            raise InvalidArgumentError(f"{what} {position!r} is no whole number")
        length = len(self.real_columns[row])
        if not -length <= position < length:
            raise InvalidArgumentError(
                f"row {row} has no {what} {position}",
                expected=f"-{length} to {length - 1}" if length else "a token",
                got=f"{length} real tokens",
            )
        return position % length

    def column_of(self, row: int, position: int, what: str = "position") -> int:
        """Returns the column of a position of a row.

        Raises:
            InvalidArgumentError: The row does not have it.
        """
        return self.real_columns[row][self.position_of(row, position, what)]

    def positions(self, chosen: Positions, what: str = "position") -> list[list[int]]:
        """Returns chosen positions of each row, counted from 0.

        Raises:
            InvalidArgumentError: A row does not have one of them, or there is not one list for each row.
        """
        by_row: Sequence[Sequence[int] | slice | None]
        match chosen:
            case None | slice():
                by_row = [chosen] * self.rows
            case int() | np.integer() if is_whole(chosen):
                by_row = [[int(chosen)]] * self.rows
            case Tensor() | np.ndarray():
                return self.positions(cast("Sequence[int]", chosen.tolist()), what)
            case list() | tuple() if any(isinstance(one, Tensor | np.ndarray) for one in chosen):
                plain = [one.tolist() if isinstance(one, Tensor | np.ndarray) else one for one in chosen]
                return self.positions(cast("Sequence[int]", plain), what)
            case list() | tuple() if any(isinstance(one, list | tuple | range) for one in chosen):
                rows = [list(one) if isinstance(one, list | tuple | range) else [one] for one in chosen]
                by_row = cast("Sequence[Sequence[int]]", rows)
                if len(by_row) != self.rows:
                    raise InvalidArgumentError(
                        f"{what}s are not one list for each row", expected=f"{self.rows} lists", got=str(len(by_row))
                    )
            case list() | tuple() | range():
                by_row = [list(cast("Sequence[int]", chosen))] * self.rows
            case _:
                raise InvalidArgumentError(
                    f"{what}s={chosen!r} are no positions",
                    expected="a whole number, several, a list for each row, a slice, or None for all",
                )
        found = []
        for row, wanted in enumerate(by_row):
            length = len(self.real_columns[row])
            if wanted is None or isinstance(wanted, slice):
                own = list(range(length)[slice(None) if wanted is None else wanted])
            else:
                own = [self.position_of(row, one, what) for one in wanted]
            if not own:
                raise InvalidArgumentError(
                    f"row {row} has no {what} in {chosen!r}",
                    expected=f"{what}s=None for all",
                    got=f"{length} real tokens",
                )
            found.append(own)
        return found

    def places(self, chosen: Positions) -> tuple[Int[Tensor, "place"], Int[Tensor, "place"], tuple[Place, ...]]:
        """Returns the rows and columns of chosen positions, row by row, and their places."""
        places = tuple((row, one) for row, own in enumerate(self.positions(chosen)) for one in own)
        rows = torch.tensor([row for row, _ in places], device=self.device)
        columns = torch.tensor([self.real_columns[row][one] for row, one in places], device=self.device)
        return rows, columns, places

    # --- other batches -----------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> Self:
        """Returns the batch on a device."""
        if self.device == torch.device(device):
            return self
        names = ("tokens", "mask", "embeds", "attention")
        there = torch.device(device)
        moved = {name: on_device(getattr(self, name), there) for name in names if getattr(self, name) is not None}
        return replace(self, **moved)

    def may_hide_padding(self, like: "Batch") -> bool:
        """Returns whether it is bare ids that may be padded as another batch of their shape is."""
        is_alike = self.tokens is not None and self.tokens.shape == like.value.shape[:2]
        return self.is_bare and like.is_padded and is_alike

    def told_by(self, like: "Batch") -> "Batch":
        """Returns the batch with the padding of another, where it is bare ids that have the other's ids there.

        Raises:
            InvalidArgumentError: Bare ids of the other's shape, and other ids at its padding: they do not tell theirs.
        """
        if not self.may_hide_padding(like):
            return self
        hidden = like.real == 0
        if like.tokens is None or not torch.equal(self.ids[hidden], like.tokens[hidden]):
            raise untold_padding()
        return replace(self, mask=like.mask, is_bare=False)

    def select(self, rows: slice | Sequence[int] | Tensor) -> Self:
        """Returns some of the rows, without columns at the ends that are padding in all of them."""
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows, device=self.device)
        names = ("tokens", "mask", "embeds", "attention")
        chosen: dict[str, Any] = {name: getattr(self, name)[index] for name in names if getattr(self, name) is not None}
        numbers = torch.arange(self.rows)[index if isinstance(index, slice) else index.cpu()].tolist()
        texts = None if self.texts is None else tuple(self.texts[number] for number in numbers)
        found = replace(self, **chosen, texts=texts)
        return found if found.mask is None else found._trimmed()

    def split(self, size: int) -> Iterator[Self]:
        """Yields the rows in their order, at most `size` at a time."""
        for start in range(0, self.rows, size):
            yield self.select(slice(start, start + size))

    def _trimmed(self) -> Self:
        """Returns the batch without columns at the ends that are padding in all rows."""
        assert self.mask is not None, "something is padded"
        there = self.mask.any(0).nonzero()[:, 0]
        kept = slice(int(there[0]), int(there[-1]) + 1)
        names = [name for name in ("tokens", "embeds") if getattr(self, name) is not None]
        return replace(
            self, **{name: getattr(self, name)[:, kept] for name in names}, mask=_or_none(self.mask[:, kept])
        )

    def repeated(self, copies: int) -> Self:
        """Returns all rows `copies` times over, copy after copy."""
        if copies == 1:
            return self
        names = ("tokens", "mask", "embeds", "attention")
        tensors = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        copied = {name: one.repeat(copies, *[1] * (one.ndim - 1)) for name, one in tensors.items()}
        return replace(self, **copied, texts=None if self.texts is None else self.texts * copies)

    def joined(self, other: "Batch") -> Self:
        """Returns the rows of this batch, and then those of another whose real tokens are in the same columns."""
        names = ("tokens", "embeds")
        parts = {name: (getattr(self, name), getattr(other, name)) for name in names if getattr(self, name) is not None}
        return replace(
            self,
            **{name: torch.cat(pair) for name, pair in parts.items()},
            mask=None if self.mask is None and other.mask is None else torch.cat([self.real, other.real]),
            texts=None if self.texts is None or other.texts is None else self.texts + other.texts,
        )

    def entering(self, residual: Float[Tensor, "copies*row pos d_model"]) -> Self:
        """Returns the batch of a run that starts at a layer, from the residual stream entering it.

        Args:
            residual: Of this batch's rows, or of all of them several times over.
        """
        copied = self.repeated(len(residual) // self.rows)
        return replace(copied, tokens=None, embeds=residual)

    def check_alike(self, other: "Batch") -> None:
        """Raises InvalidArgumentError if the rows of two batches differ in number or in real length."""
        if self.rows != other.rows or not torch.equal(self.lengths, other.lengths):
            raise InvalidArgumentError(
                "the two inputs do not lie position on position",
                expected="as many rows, and as many real tokens in each",
                got=f"{self.lengths.tolist()} and {other.lengths.tolist()} real tokens",
            )

    def is_laid_out_as(self, other: "Batch") -> bool:
        """Whether its real tokens are in the columns of another one's."""
        return self.width == other.width and self.real_columns == other.real_columns

    def laid_out_as(self, other: "Batch") -> Self:
        """Returns the batch with its real tokens in the columns of another one's.

        Raises:
            InvalidArgumentError: The rows differ in number or in real length.
        """
        self.check_alike(other)
        if self.is_laid_out_as(other):
            return self
        value = self.value.new_zeros(self.rows, other.width, *self.value.shape[2:])
        for row, (own, there) in enumerate(zip(self.real_columns, other.real_columns, strict=True)):
            value[row, list(there)] = self.value[row, list(own)]
        mask = None if other.mask is None else other.mask.to(self.device)
        return replace(self, **{"tokens" if self.embeds is None else "embeds": value, "mask": mask})

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        lengths = self.lengths.tolist()
        tokens = f"{lengths[0]} tokens" if len(set(lengths)) == 1 else f"{min(lengths)} to {max(lengths)} tokens"
        what = "" if self.embeds is None else " as embeddings"
        return f"Batch({self.rows} row{'s' * (self.rows > 1)} of {tokens}{what})"


Input = (
    str
    | Sequence[str]
    | Tensor
    | np.ndarray
    | Batch
    | Mapping[str, Any]
    | Sequence[Mapping[str, Any]]
    | Sequence[int]
    | Sequence[Sequence[int]]
)
"""All that `bridge.to_batch` takes."""

_ACCEPTED = "text, texts, token ids [row, pos], a tokenizer's output, rows of a dataset, chat messages, or a Batch"


@dataclass(frozen=True)
class Reader:
    """What reads text, and how it was asked to.

    Attributes:
        text: Turns text into tokens.
        prepend_bos: Whether text gets one BOS first.
        side: Where shorter rows are filled.
        chat: How conversations end.
    """

    text: Text
    prepend_bos: bool | None = None
    side: PaddingSide | None = None
    chat: Chat = BY_LAST_MESSAGE


def batch_of(
    input: Input,
    reader: Reader,
    device: torch.device,
    *,
    d_vocab: int,
    attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
) -> Batch:
    """Returns an input as a batch on a device. The arguments are those of `Model.to_batch`.

    Args:
        input: The input.
        reader: Turns text into tokens.
        device: Where the batch goes.
        d_vocab: Ids of the vocabulary.
        attention_mask: Of token ids that are padded.
    """
    if isinstance(input, Batch):
        if attention_mask is not None:
            raise InvalidArgumentError("a Batch has a mask of its own", got="attention_mask=")
        return _checked(input, device, d_vocab)
    found = _as_rows(input, reader)
    if attention_mask is not None:
        if found.mask is not None and found.texts is None:
            raise InvalidArgumentError("the input has a mask of its own", got="attention_mask= as well")
        found = _masked(found, attention_mask)
    return _checked(found, device, d_vocab)


def _checked(batch: Batch, device: torch.device, d_vocab: int) -> Batch:
    """Returns a batch on a device, if the model has its ids and can read its values."""
    if batch.tokens is not None:
        _check_ids(batch.tokens, d_vocab)
    if batch.value.is_meta and device.type != "meta":
        raise InputError("a tensor on the meta device has no values to run", got=f"{batch.value.dtype} on meta")
    if batch.mask is not None:
        _or_none(batch.mask)
    return batch.to(device)


def check_dense(name: str, given: Tensor) -> None:
    """Raises InputError unless a tensor has its values in strides, one behind the other."""
    if given.layout is not torch.strided or given.is_nested or given.is_quantized:
        kind = "a nested tensor" if given.is_nested else given.dtype if given.is_quantized else given.layout
        fix = None if given.is_nested else f"{name}.dequantize()" if given.is_quantized else f"{name}.to_dense()"
        raise InputError(f"{name} cannot be read", expected="a dense tensor", got=str(kind), fix=fix)


def check_has_values(name: str, given: Tensor) -> None:
    """Raises InputError unless a tensor is dense and not on the meta device."""
    check_dense(name, given)
    if given.is_meta:
        raise InputError(f"{name} on the meta device has no values", expected="a tensor on a CPU or an accelerator")


def _check_parts(batch: Batch) -> None:
    """Raises InputError unless the parts of a batch are tensors that lie row on row and column on column.

    It looks at no value, which would wait for an accelerator.
    """
    tokens, embeds, mask = batch.tokens, batch.embeds, batch.mask
    if tokens is not None and not (_is_tensor(tokens, 2) and _is_whole(tokens) and tokens.numel()):
        raise InputError("tokens= are no token ids", expected="whole numbers [row, pos], not empty", got=_told(tokens))
    if embeds is not None and not (_is_tensor(embeds, 3, 4) and embeds.shape[0] and embeds.shape[1]):
        raise InputError("embeds= are no embeddings", expected="[row, pos, d_model], not empty", got=_told(embeds))
    if (tokens is None) == (embeds is None):
        raise InputError("a batch has token ids or embeddings", got="neither" if tokens is None else "both")
    shape = batch.value.shape[:2]
    if mask is not None and not (_is_tensor(mask, 2) and _is_whole(mask) and mask.shape == shape):
        raise InputError("mask= does not fit the input", expected=f"whole numbers {list(shape)}", got=_told(mask))
    if batch.attention is not None and not _is_tensor(batch.attention, 4):
        raise InputError("attention= is a mask of four axes", expected="a tensor", got=_told(batch.attention))
    texts = batch.texts
    if texts is not None and not (
        isinstance(texts, tuple) and len(texts) == len(batch.value) and all(isinstance(one, str) for one in texts)
    ):
        raise InputError("texts= are one for each row", expected=f"a tuple of {len(batch.value)}", got=repr(texts)[:80])
    check_flags(is_one=batch.is_one, is_bare=batch.is_bare)


def _is_tensor(value: object, *axes: int) -> bool:
    return isinstance(value, Tensor) and value.ndim in axes


def _is_whole(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _told(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]


def _as_rows(input: Any, reader: Reader) -> Batch:
    """Returns an input as a batch, by what it is."""
    match input:
        case str():
            return replace(_encoded([input], reader), is_one=True)
        case Tensor():
            return _of_tensor(input)
        case np.ndarray() if input.dtype.kind in "biufc":
            return _of_tensor(_of_array(input))
        case np.ndarray() if input.dtype.kind in "OSTU":
            return _as_rows(input.tolist(), reader)
        case Mapping():
            return _of_mapping(input, reader)
        case bytes() | int() | float() | None | set() | frozenset() | np.ndarray():
            raise _unusable(input)
        case Iterable():
            return _of_list(list(input), reader)
    raise _unusable(input)


def _of_list(rows: list[Any], reader: Reader) -> Batch:
    match rows:
        case []:
            raise InputError("an empty list has no rows", got="[]", expected=_ACCEPTED)
        case [str(), *_] if all(isinstance(row, str) for row in rows):
            return _encoded(rows, reader)
        case [Mapping(), *_] if all(isinstance(row, Mapping) for row in rows):
            if is_conversation(rows):
                return replace(_encoded(rows, reader), is_one=True)
            return _of_mapping({key: [row.get(key) for row in rows] for key in rows[0]}, reader)
        case [[Mapping(), *_], *_]:
            return _encoded(rows, reader)
        case [int() | np.integer(), *_] if all(map(is_whole, rows)):
            return _of_tensor(_row_of_ids([int(one) for one in rows]))
        case [Tensor() | list() | tuple() | np.ndarray(), *_]:
            return _padded([_row_of_ids(row) for row in rows], reader)
    raise _unusable(rows)


def _of_mapping(given: Mapping[str, Any], reader: Reader) -> Batch:
    """Returns a tokenizer's output, or rows of a dataset, as a batch."""
    if given.get("input_ids") is not None:
        found = _as_rows(given["input_ids"], reader)
        mask = given.get("attention_mask")
        if mask is None:
            return found
        if not isinstance(mask, Iterable):
            raise InputError("the attention mask is no tensor", expected="[row, pos] of 0 and 1", got=repr(mask)[:80])
        own = mask if isinstance(mask, Tensor | np.ndarray) else list(mask)
        if found.mask is None:
            return _masked(found, own)
        # Rows of different lengths were padded here, by the same rule for ids and masks.
        rows = [_row_of_ids(row, "mask") for row in cast("list[Any]", own)]
        if [len(row) for row in rows] != found.lengths.tolist():
            raise InputError(
                "the attention mask does not fit the input",
                expected=f"rows of {found.lengths.tolist()}",
                got=f"rows of {[len(row) for row in rows]}",
            )
        return replace(found, mask=_or_none(_padded(rows, reader).ids * found.mask))
    for name in ("text", "messages"):
        if given.get(name) is not None:
            return _as_rows(given[name], reader)
    if given.get("inputs_embeds") is not None:
        found = _as_rows(given["inputs_embeds"], reader)
        mask = given.get("attention_mask")
        return found if mask is None else _masked(found, mask)
    raise InputError(
        "a mapping is no input without ids or text",
        expected="input_ids (and attention_mask), text, messages, or inputs_embeds",
        got=", ".join(map(str, given)) or "nothing",
    )


def _encoded(rows: Sequence[Any], reader: Reader) -> Batch:
    """Returns texts, or conversations, as a batch."""
    tokens, mask, texts = reader.text.encode(rows, reader.prepend_bos, reader.side, chat=reader.chat)
    return Batch(tokens, mask, texts=texts)


def _of_array(value: np.ndarray) -> Tensor:
    """Returns an array of numbers as a tensor of its own, whatever its strides and the order of its bytes."""
    try:
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    except TypeError:  # torch has no such numbers
        raise _unusable(value) from None


def _of_tensor(value: Tensor) -> Batch:
    if (
        value.dtype is torch.int64
        and value.ndim == 2
        and value.numel()
        and value.layout is torch.strided
        and not (value.is_nested or value.is_meta)
    ):  # nearly always
        return Batch.of_ids(value)
    check_dense("input", value)
    if value.is_floating_point():
        if value.ndim not in (3, 4) or not value.numel():  # four: several residual streams
            raise InputError(
                "a tensor of numbers is taken as embeddings or a residual stream",
                expected="[row, pos, d_model], not empty",
                got=str(list(value.shape)),
            )
        return Batch(None, embeds=value, is_bare=True)
    if value.dtype == torch.bool or value.is_complex():
        raise InputError("token ids are whole numbers", got=str(value.dtype))
    check_has_values("input", value)
    value = value if value.dtype in (torch.int32, torch.int64) else value.long()
    rows = value[None] if value.ndim == 1 else value
    if rows.ndim != 2 or not rows.numel():
        raise InputError("token ids have two axes", expected="[row, pos], not empty", got=str(list(value.shape)))
    return Batch(rows, is_bare=True)


def _padded(rows: Sequence[Tensor], reader: Reader) -> Batch:
    """Returns rows of ids as one batch, filled where they are shorter."""
    return Batch(*reader.text.padded([row.tolist() for row in rows], reader.side))


def _masked(batch: Batch, mask: Any) -> Batch:
    """Returns a batch with a mask."""
    try:
        given = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError("the attention mask is no tensor", expected="[row, pos] of 0 and 1", got=str(error)) from None
    check_has_values("attention_mask", given)
    if given.is_complex():
        raise InputError("the attention mask is not one of padding", expected="0 and 1", got=str(given.dtype))
    given = given[None] if given.ndim == 1 and batch.rows == 1 else given
    if given.ndim == 4:
        return replace(batch, attention=given, mask=None, is_bare=False)
    if given.shape != batch.value.shape[:2]:
        raise InputError(
            "the attention mask does not fit the input",
            expected=f"{list(batch.value.shape[:2])}, or four axes",
            got=str(list(given.shape)),
        )
    return replace(batch, mask=_or_none(given.to(batch.device)), is_bare=False)


def row_numbers(rows: slice | Sequence[int] | Tensor, count: int) -> list[int]:
    """Returns chosen rows, from 0.

    Args:
        rows: Their numbers, negative from the end; a mask; or a slice.
        count: How many there are.

    Raises:
        InvalidArgumentError: There are no such rows, or none is chosen.
    """
    if isinstance(rows, slice):
        found = list(range(count)[rows])
    elif isinstance(rows, Tensor) and rows.dtype == torch.bool and rows.shape == (count,):
        found = rows.nonzero()[:, 0].tolist()
    else:
        found = [one if one >= 0 else one + count for one in wholes(rows) or ()]
    if not found or not all(0 <= one < count for one in found):
        raise InvalidArgumentError(
            f"rows={rows!r} chooses none that there is"[:120], expected=f"some of {count}: numbers, a mask, or a slice"
        )
    return found


def untold_padding() -> InvalidArgumentError:
    """Returns the error about a source whose ids do not tell which of them are padding."""
    return InvalidArgumentError(
        "the token ids of a source do not tell which of them are padding",
        expected="the ids of the input where that is padded, or a mask",
        fix="{'input_ids': ids, 'attention_mask': mask} in their place",
    )


def _or_none(mask: Tensor) -> Tensor | None:
    """Returns a padding mask as whole numbers, or None where nothing is padded.

    Raises:
        InputError: A number besides 0 and 1, or a row without a token.
    """
    values = mask.cpu()  # a device is waited for once
    if bool(((values != 0) & (values != 1)).any()):
        raise InputError("the attention mask is not one of padding", expected="1 for real tokens, 0 for padding")
    counts = values.long().sum(-1)
    if not bool(counts.all()):
        raise InputError(f"row {int((counts == 0).nonzero()[0])} has no real token", expected="a token in each row")
    return None if bool((counts == mask.shape[1]).all()) else mask.long()


def _row_of_ids(row: Any, what: Literal["token ids", "mask"] = "token ids") -> Int[Tensor, "pos"]:
    if isinstance(row, Tensor):
        check_has_values("input", row)
    try:
        found = torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise _unusable(row) from None
    is_ids = not (found.is_floating_point() or found.is_complex() or (found.dtype == torch.bool and what != "mask"))
    if not is_ids or found.ndim != 1 or not found.numel():
        raise InputError(f"a row of {what} is a list of whole numbers, not empty", got=repr(row)[:80])
    return found.long()


def _check_ids(tokens: Tensor, d_vocab: int) -> None:
    if tokens.is_cpu and tokens.numel() <= FEW:
        found = [one for row in tokens.tolist() for one in row]
        least, most = min(found), max(found)
    else:
        least, most = torch.stack(torch.aminmax(tokens)).tolist()  # one wait for an accelerator
    if least < 0 or most >= d_vocab:
        raise TokenRangeError(
            "token ids outside the vocabulary", expected=f"0 to {d_vocab - 1}", got=f"{least} to {most}"
        )


def _unusable(input: object) -> InputError:
    return InputError("cannot run this input", expected=_ACCEPTED, got=f"{type(input).__name__} {input!r}"[:120])
