"""Interchange examples: pairs of inputs, where values are exchanged between them, and what should come out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.analysis.places import Input, encoded, target_ids_of
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError

PairPositions = int | Sequence[int] | Int[Tensor, "example *place"]
"""One position for all pairs, one for each, or several for each `[example, place]`."""
Answers = Sequence[str] | Sequence[int]
"""Tokens, as text or ids."""


@dataclass(frozen=True, eq=False, repr=False)
class InterchangeExamples:
    """Pairs of a base and a source, with the answer that a hypothesis expects of the base after the interchange.

    The answer is the likeliest token after a base's last token. Positions are counted among each row's real tokens,
    negative from the end. All tensors are on the CPU. `of` makes examples from text, and `draw_interchanges` from a
    causal model.

    Attributes:
        base: Tokens of the runs that are changed.
        source: Tokens of the runs that values are taken from; they need not be as long as the bases.
        labels: The token that should come out, for each pair.
        base_positions: Where values are written.
        source_positions: Where the values for these places are read.
        answers: The tokens among which the likeliest is the answer, in order; None for the whole vocabulary.
        base_mask: 1 for real tokens, where the bases have padding.
        source_mask: The same of the sources.

    Raises:
        InvalidArgumentError: Rows, places or masks that do not fit each other, no pair, a position that a row does not
            have or that is written twice, or a label that is no answer.

    Example:
        >>> pair = InterchangeExamples(
        ...     base=torch.tensor([[5, 6, 7]]),
        ...     source=torch.tensor([[8, 9]]),
        ...     labels=torch.tensor([3]),
        ...     base_positions=torch.tensor([[-1]]),
        ...     source_positions=torch.tensor([[0]]),
        ... )
        >>> pair, pair.base_columns
        (InterchangeExamples(1 pair of 3 and 2 tokens, values exchanged at 1 place), tensor([[2]]))
    """

    base: Int[Tensor, "example pos"]
    source: Int[Tensor, "example source_pos"]
    labels: Int[Tensor, "example"]
    base_positions: Int[Tensor, "example place"]
    source_positions: Int[Tensor, "example place"]
    answers: tuple[int, ...] | None = None
    base_mask: Int[Tensor, "example pos"] | None = None
    source_mask: Int[Tensor, "example source_pos"] | None = None

    def __post_init__(self) -> None:
        for name in _tensors(self):
            object.__setattr__(self, name, getattr(self, name).detach().cpu())
        _check_shapes(self)
        ordered = self.base_columns.sort(1).values
        if (ordered.diff(dim=1) == 0).any():
            raise InvalidArgumentError("a position of a base is written twice", got=str(self.base_positions.tolist()))
        _ = self.source_columns  # checked
        if self.answers is not None:
            object.__setattr__(self, "answers", tuple(sorted(set(self.answers))))
            self.targets()

    @classmethod
    def of(
        cls,
        bridge: TransformerBridge,
        base: Input,
        source: Input,
        labels: Sequence[str] | Int[Tensor, "example"],
        *,
        position: PairPositions = -1,
        source_position: PairPositions | None = None,
        answers: Answers | None = None,
        base_mask: Int[Tensor, "example pos"] | None = None,
        source_mask: Int[Tensor, "example source_pos"] | None = None,
    ) -> Self:
        """Returns examples from texts, or from token ids.

        Args:
            bridge: The model that they are for.
            base: Text, texts, or token ids `[example, pos]`.
            source: The same, as many.
            labels: One token for each pair, as text or ids.
            position: Where values are written: one position for all pairs, one for each, or `[example, place]`.
            source_position: Where they are read; by default at `position`.
            answers: The tokens among which the likeliest is the answer, as text or ids; None for the whole vocabulary.
            base_mask: 1 for real tokens, where token ids have padding.
            source_mask: The same of the source.

        Raises:
            NoTokenizerError: Text, and the bridge has no tokenizer.
            InvalidArgumentError: A label that is not one token of the vocabulary, or as above.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> InterchangeExamples.of(bridge, ["import re, sys"], ["import os"], [" os"], position=1)
            InterchangeExamples(1 pair of 5 and 3 tokens, values exchanged at 1 place)
        """
        (tokens, mask), (other, other_mask) = encoded(bridge, base, base_mask), encoded(bridge, source, source_mask)
        written = _laid(position, len(tokens))
        return cls(
            tokens,
            other,
            target_ids_of(bridge, labels, len(tokens)),
            written,
            written if source_position is None else _laid(source_position, len(other)),
            None if answers is None else tuple(bridge.to_single_token(a) if isinstance(a, str) else a for a in answers),
            mask,
            other_mask,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        pairs, places = len(self), self.base_positions.shape[1]
        among = "" if self.answers is None else f", {len(self.answers)} answers"
        return (
            f"InterchangeExamples({pairs} pair{'s' * (pairs > 1)} of {self.base.shape[1]} and {self.source.shape[1]} "
            f"tokens, values exchanged at {places} place{'s' * (places > 1)}{among})"
        )

    @cached_property
    def base_columns(self) -> Int[Tensor, "example place"]:
        """Where values are written, counted with padding, from 0."""
        return _columns(_real(self.base, self.base_mask), self.base_positions, "base")

    @cached_property
    def source_columns(self) -> Int[Tensor, "example place"]:
        """Where values are read, counted with padding, from 0."""
        return _columns(_real(self.source, self.source_mask), self.source_positions, "source")

    @cached_property
    def last_columns(self) -> Int[Tensor, "example"]:
        """Where each base's last token is, counted with padding, from 0."""
        real = _real(self.base, self.base_mask)
        return _columns(real, torch.full((len(self), 1), -1), "base")[:, 0]

    def targets(self) -> Int[Tensor, "example"]:
        """Returns each label as its place among the answers; its id where every token is one."""
        if self.answers is None:
            return self.labels
        places = {token: place for place, token in enumerate(self.answers)}
        for row, label in enumerate(self.labels.tolist()):
            if label not in places:
                raise InvalidArgumentError(
                    f"the label {label} of pair {row} is no answer", expected=", ".join(map(str, self.answers))
                )
        return torch.tensor([places[label] for label in self.labels.tolist()])

    def select(self, rows: Tensor | slice) -> Self:
        """Returns some of the pairs.

        Args:
            rows: Their numbers, a mask, or a slice.
        """
        return replace(self, **{name: getattr(self, name)[rows] for name in _tensors(self)})

    def split(self, size: int) -> Iterator[Self]:
        """Yields the pairs in their order, at most `size` at a time."""
        for start in range(0, len(self), size):
            yield self.select(slice(start, start + size))

    def relabelled(self, labels: Int[Tensor, "example"]) -> Self:
        """Returns the same pairs with other labels."""
        return replace(self, labels=labels)


def _tensors(examples: InterchangeExamples) -> list[str]:
    return [field.name for field in fields(examples) if isinstance(getattr(examples, field.name), Tensor)]


def _laid(position: PairPositions, rows: int) -> Int[Tensor, "example place"]:
    """Returns positions as `[example, place]`."""
    given = torch.as_tensor(position)
    match given.ndim:
        case 0:
            return given.expand(rows, 1)
        case 1:
            return given[:, None]
        case _:
            return given


def _check_shapes(examples: InterchangeExamples) -> None:
    rows, place = len(examples.labels), "place"
    wanted = {
        "base": ("base", "pos"),
        "source": ("source", "pos"),
        "labels": (),
        "base_positions": (place, place),
        "source_positions": (place, place),
        "base_mask": ("base", "pos"),
        "source_mask": ("source", "pos"),
    }
    known: dict[str, int] = {}
    for name in _tensors(examples):
        value: Tensor = getattr(examples, name)
        axis = wanted[name]
        shape = [rows] if not axis else [rows, known.setdefault(axis[0], value.shape[-1])]
        if list(value.shape) != shape or not value.numel() or value.is_floating_point():
            letters = "[example]" if not axis else f"[example, {axis[1]}]"
            raise InvalidArgumentError(
                f"{name} of the examples does not fit",
                expected=f"whole numbers {letters} = {shape}, for as many pairs as labels",
                got=f"{value.dtype} {list(value.shape)}",
            )


def _real(tokens: Tensor, mask: Tensor | None) -> Int[Tensor, "example pos"]:
    return torch.ones_like(tokens) if mask is None else mask


def _columns(
    real: Int[Tensor, "example pos"], positions: Int[Tensor, "example place"], what: str
) -> Int[Tensor, "example place"]:
    """Returns positions among real tokens as columns."""
    lengths = real.sum(1, keepdim=True)
    outside = (positions < -lengths) | (positions >= lengths)
    if outside.any():
        row, place = outside.nonzero()[0].tolist()
        length = int(lengths[row])
        raise InvalidArgumentError(
            f"the {what} of pair {row} has no position {int(positions[row, place])}",
            expected=f"-{length} to {length - 1}" if length else "a token",
            got=f"{length} tokens",
        )
    real_first = real.bool().logical_not().long().argsort(dim=1, stable=True)
    return real_first.gather(1, positions % lengths)
