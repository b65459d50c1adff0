"""Where a raw tensor is reached, and how a hook point's value shows in it. Data only: nothing here touches a module."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor


class Side(StrEnum):
    """The side of a module on which a raw tensor is reached."""

    INPUT = "input"
    OUTPUT = "output"
    SCORES = "scores"
    PATTERN = "pattern"


@dataclass(frozen=True)
class Place:
    """One raw tensor of the forward.

    Attributes:
        module: The module's path in the Hugging Face model; empty for the model itself.
        side: Its input, its output, or inside it.
    """

    module: str
    side: Side

    @functools.cached_property
    def key(self) -> str:
        """The place as one string."""
        return f"{self.module}:{self.side}"

    @property
    def pos_dim(self) -> int:
        """The raw tensor's (query) position axis."""
        return 2 if self.side in (Side.SCORES, Side.PATTERN) else 1

    def __str__(self) -> str:
        return f"{self.side} of {self.module or 'the model'}"


class Conversion(Protocol):
    """What an access needs of a conversion (`clearspan.conversions` has them)."""

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the tensor in canonical axes."""
        ...

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the tensor in its own layout."""
        ...


class Derivation(ABC):
    """Values computed from the raw tensor at one place (the source) whose writes act at a later one (the target).

    A derivation may have several parts, in the order in which they fire: a later part sees the edits of earlier ones.
    """

    target: Place
    is_in_series: bool = True
    """Whether all that passes from source to target passes through each part, so that a part can be put in the way."""

    def weights(self) -> tuple[Tensor, ...]:
        """Returns the live parameters that `read` uses, besides the source."""
        return ()

    @abstractmethod
    def read(self, part: str, source: Tensor, edits: Mapping[str, Tensor]) -> Tensor:
        """Returns a part's value, given the source's raw tensor and the edits made so far."""

    @abstractmethod
    def write(self, output: Tensor, source: Tensor, edits: Mapping[str, Tensor], entered: Tensor) -> Tensor:
        """Returns the target's raw tensor with the edits.

        Args:
            output: The raw tensor at the target.
            source: The raw tensor at the source.
            edits: The parts that were changed.
            entered: The input of the target's module.
        """


@dataclass(frozen=True)
class Whole:
    """The raw tensor is the value; a write takes its place."""


@dataclass(frozen=True)
class Converted:
    """The value is the raw tensor or a part of it in canonical axes; a write is converted back and takes its place."""

    conversion: Conversion


@dataclass(frozen=True)
class InPlace:
    """The raw tensor is the value, and others read its storage: a write is copied into it."""


@dataclass(frozen=True)
class SharedRow:
    """The raw tensor has one row where all rows of the batch are alike; the value has the batch's rows."""


@dataclass(frozen=True)
class Derived:
    """The value is one part of a derivation."""

    derivation: Derivation
    part: str


Access = Whole | Converted | InPlace | SharedRow | Derived
