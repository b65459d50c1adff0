"""Where a raw tensor is reached, and how a hook point's value is read from it. Data only: no module is touched here."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from torch import Tensor

from clearspan.points.functions import Role


class Side(StrEnum):
    """The side of a module on which a raw tensor is reached."""

    INPUT = "input"
    OUTPUT = "output"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    SCORES = "scores"
    PATTERN = "pattern"
    Z = "z"
    ROUTER = "router"

    @property
    def is_inside(self) -> bool:
        """Whether it is between a module's input and its output."""
        return self not in (Side.INPUT, Side.OUTPUT)

    @property
    def is_of_a_call(self) -> bool:
        """Whether it follows from the arguments of a call of the attention function."""
        return self in (Side.QUERY, Side.KEY, Side.SCORES, Side.PATTERN)


@dataclass(frozen=True)
class Passed:
    """A value that a module's code hands to a function, or gets from one: a side inside the module.

    Attributes:
        role: What the function is called for.
        value: Which of the role's values.
    """

    role: Role
    value: str

    is_inside = True
    is_of_a_call = False

    def __str__(self) -> str:
        return f"{self.role.name}.{self.value}"


class Layout(StrEnum):
    """How rows and positions lie in a raw tensor. The taps show all tensors as `TOKENS`, as views.

    Queries by keys they show as `ROWS_BY_ROWS`.
    """

    TOKENS = "batch pos ..."
    HEADS_FIRST = "batch head pos ..."
    FLAT = "(batch pos) ..."
    STREAMS_FIRST = "stream batch pos ..."
    """A residual of several streams."""
    ONE_ROW = "pos ..."
    """One row for all rows of the batch, without an axis of rows."""
    POS_FIRST = "pos batch ..."
    LAST = "batch (others pos) ..."
    """Behind other positions, such as those of a prompt that the model puts before the tokens."""
    FIRST = "batch (pos others) ..."
    """Before other positions, such as padding to a multiple of a chunk."""
    SECOND = "batch (pos pos ...) ..."
    """Of several streams side by side in the axis of positions, the second."""
    FIRST_OF_SEVERAL = "batch several pos ..."
    """Of several streams in an axis of their own, the first."""
    ROWS_BY_ROWS = "batch head q_pos k_pos"
    JOINED_HEADS = "(batch head) pos ..."
    JOINED_SQUARE = "(batch head) q_pos k_pos"

    @property
    def is_square(self) -> bool:
        """Whether it has queries by keys."""
        return self in (Layout.ROWS_BY_ROWS, Layout.JOINED_SQUARE)

    @property
    def joins_rows(self) -> bool:
        """Whether rows share an axis with something else, so that the tensor does not tell how many there are."""
        return self in (Layout.FLAT, Layout.JOINED_HEADS, Layout.JOINED_SQUARE)


@dataclass(frozen=True)
class Place:
    """One raw tensor of the forward.

    Attributes:
        module: The module's path in the Hugging Face model; empty for the model itself.
        side: Its input, its output, or inside it, where that may be an argument or the result of a function.
        item: Which of several outputs.
        layout: How rows and positions lie in the tensor.
        rows_of: Path of a module around it whose input tells the batch's rows, if the tensor does not.
        is_overwritten: Whether the model writes into the tensor's storage afterwards.
        also: Names of further arguments of the module that are the same tensor, of an input.
        argument: Name of the argument of the module that it is, of an input that is not the first; empty for the first.
        call: Which call of the module in a forward, from 0, where the model calls it several times; None where once.
    """

    module: str
    side: Side | Passed
    item: int = 0
    layout: Layout = Layout.TOKENS
    rows_of: str = ""
    is_overwritten: bool = False
    also: tuple[str, ...] = ()
    call: int | None = None
    argument: str = ""

    @functools.cached_property
    def key(self) -> str:
        """The place as one string."""
        which = self.argument or self.item
        return f"{self.owner}:{self.side}:{which}" if which else f"{self.owner}:{self.side}"

    @functools.cached_property
    def owner(self) -> str:
        """The module's path, and which call of it, as one string."""
        return self.module if self.call is None else f"{self.module}#{self.call}"

    @property
    def pos_dim(self) -> int:
        """The (query) position axis of the tensor as the taps show it."""
        return 2 if self.layout.is_square else 1

    def __str__(self) -> str:
        which = "" if self.call is None else f", call {self.call}"
        side = f"{self.argument}, {self.side}" if self.argument else self.side
        return f"{side} of {self.module or 'the model'}{which}"


class Conversion(Protocol):
    """What an access needs of a conversion; `clearspan.conversions` has them."""

    @property
    def only_moves(self) -> bool:
        """Whether each number of the value is one of the tensor's, so that gradients are converted as values are."""
        ...

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the tensor in canonical axes."""
        ...

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the tensor in its own layout."""
        ...


class Derivation(ABC):
    """Values computed from the raw tensor at one place (the source); writing one acts at later places (the targets).

    A derivation may have several parts, in the order in which they fire: a later part sees the edits of earlier ones.
    """

    targets: tuple[Place, ...]
    is_in_series: bool = True
    """Whether all that the targets get from the source passes through each part, so that a part can take its place."""

    def reached_by(self, part: str) -> tuple[Place, ...]:
        """Returns the targets on which a write of the part acts: by default all of them."""
        return self.targets

    def sources(self) -> Sequence[Any]:
        """Returns what the weights are made of that `read` uses: live parameters, or records of adapters."""
        return ()

    def weights_to_write(self) -> tuple[Tensor, ...]:
        """Returns the live parameters that `write` uses."""
        return ()

    @abstractmethod
    def read(self, part: str, source: Tensor, edits: Mapping[str, Tensor]) -> Tensor:
        """Returns a part's value, given the source's raw tensor and the edits made so far."""

    @abstractmethod
    def write(self, target: Place, raw: Tensor, source: Tensor, edits: Mapping[str, Tensor], entered: Tensor) -> Tensor:
        """Returns a target's raw tensor with the edits.

        Args:
            target: Which of the targets.
            raw: The raw tensor there.
            source: The raw tensor at the source.
            edits: The parts that were changed.
            entered: The input of the target's module.
        """


@dataclass(frozen=True)
class Whole:
    """The raw tensor is the value; a write replaces it."""


@dataclass(frozen=True)
class Converted:
    """The value is the raw tensor, or a part of it, in canonical axes; a write is converted back and replaces it."""

    conversion: Conversion


@dataclass(frozen=True)
class InPlace:
    """The raw tensor is the value, and others read its storage: a write is copied into the storage.

    Attributes:
        conversion: Shows it in canonical axes, of which a write is converted back; None where it has them.
    """

    conversion: Conversion | None = None


@dataclass(frozen=True)
class ReadOnly:
    """The raw tensor is computed for whoever reads it, and the model does not use it: a write raises."""


@dataclass(frozen=True)
class Offered:
    """No module makes the value: a hook function computes it, and offers it to the point and to the cache."""


@dataclass(frozen=True)
class SharedRow:
    """The raw tensor may have one row for all rows of the batch; the value has the batch's rows."""


@dataclass(frozen=True)
class Derived:
    """The value is one part of a derivation."""

    derivation: Derivation
    part: str


Access = Whole | Converted | InPlace | ReadOnly | Offered | SharedRow | Derived


def read(access: Access, raw: Tensor, rows: int | None, edits: Mapping[str, Tensor]) -> Tensor:
    """Returns the value that an access reads from a raw tensor.

    Args:
        access: The access.
        raw: The raw tensor, rows and positions first.
        rows: The batch's rows, for a tensor with one row for all; None if unknown.
        edits: Earlier edits of the access's derivation.
    """
    match access:
        case Whole() | ReadOnly():
            return raw
        case InPlace(conversion):
            return raw if conversion is None else conversion.handle_conversion(raw)
        case Converted(conversion):
            return conversion.handle_conversion(raw)
        case SharedRow():
            return raw if rows is None or len(raw) != 1 else raw.expand(rows, *raw.shape[1:])
        case Derived(derivation, part):
            return derivation.read(part, raw, edits)
        case Offered():
            raise AssertionError("an offered value is in no raw tensor")
