"""Changes of a tensor's layout: between Hugging Face's and the canonical axes, and back."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor


class BaseTensorConversion(ABC):
    """An invertible change of layout.

    `handle_conversion` gives a view wherever the layouts allow one. `revert` is its inverse; a conversion that shows a
    part of a tensor gets the whole tensor as the second argument, to put the part back into a copy of it.
    """

    @property
    def only_moves(self) -> bool:
        """Whether each number of the value is one of the tensor's, so that gradients are converted as values are."""
        return False

    @abstractmethod
    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the tensor in canonical axes."""

    @abstractmethod
    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the tensor in Hugging Face's layout."""


class LayoutConversion(BaseTensorConversion):
    """A conversion that computes nothing: it shows a tensor, or a part of it, in other axes."""

    @property
    def only_moves(self) -> bool:
        """True."""
        return True


class RearrangeTensorConversion(LayoutConversion):
    """Rearranges axes by an einops pattern; the inverse is the pattern read from right to left.

    Args:
        pattern: An einops pattern without repeated or new axes, such as `"(n h) m -> n m h"`.
        **axes_lengths: Sizes of axes that the pattern alone does not fix.

    Example:
        >>> import torch
        >>> by_head = RearrangeTensorConversion("(n h) m -> n m h", n=4)
        >>> weight = torch.randn(48, 32)
        >>> by_head.handle_conversion(weight).shape
        torch.Size([4, 32, 12])
        >>> torch.equal(by_head.revert(by_head.handle_conversion(weight)), weight)
        True
    """

    def __init__(self, pattern: str, **axes_lengths: int) -> None:
        self.pattern = pattern
        self.axes_lengths = axes_lengths
        left, right = pattern.split("->")
        self._inverse = f"{right.strip()} -> {left.strip()}"

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the rearranged tensor, a view where the strides allow one."""
        return rearrange(input_value, self.pattern, **self.axes_lengths)

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the tensor in the pattern's left-hand layout."""
        return rearrange(input_value, self._inverse, **self.axes_lengths)

    def __repr__(self) -> str:
        lengths = "".join(f", {name}={size}" for name, size in self.axes_lengths.items())
        return f"RearrangeTensorConversion({self.pattern!r}{lengths})"


@dataclass(frozen=True)
class ParamProcessingConversion:
    """The conversion of one weight.

    Attributes:
        tensor_conversion: Between the component's own layout and the canonical one.
    """

    tensor_conversion: BaseTensorConversion

    def convert(self, weight: Tensor) -> Tensor:
        """Returns the weight in canonical axes, a view where the layouts allow one."""
        return self.tensor_conversion.handle_conversion(weight)

    def revert(self, weight: Tensor) -> Tensor:
        """Returns the weight in the component's own layout."""
        return self.tensor_conversion.revert(weight)


@dataclass(frozen=True)
class HeadsConversion(LayoutConversion):
    """`[batch, pos, head*d_head]` to `[batch, pos, head, d_head]`: a view, without the cost of parsing a pattern.

    Attributes:
        n_heads: Heads in the last axis.
    """

    n_heads: int

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns a view by head."""
        return input_value.unflatten(-1, (self.n_heads, -1))

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns heads joined in the last axis."""
        return input_value.flatten(-2)


@dataclass(frozen=True)
class ScaledConversion(BaseTensorConversion):
    """The tensor times a factor, where the model multiplies a part's output before adding it.

    Attributes:
        factor: A number, or a function that returns a live parameter as wide as the tensor.
    """

    factor: float | Callable[[], Tensor]

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the product."""
        return input_value * self._now

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the quotient."""
        return input_value / self._now

    @property
    def _now(self) -> float | Tensor:
        return self.factor() if callable(self.factor) else self.factor


@dataclass(frozen=True)
class ShiftedConversion(BaseTensorConversion):
    """The tensor plus a vector, where the model adds a part's bias after the part has returned.

    Attributes:
        shift: Returns the live parameter, as wide as the tensor.
    """

    shift: Callable[[], Tensor]

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the sum."""
        return input_value + self.shift().to(input_value)

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the difference."""
        return input_value - self.shift().to(input_value)


class PartConversion(LayoutConversion):
    """A part of a tensor, as a view."""

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns a copy of the whole tensor (the context) with the part replaced."""
        whole = full_context[0].clone()
        self.handle_conversion(whole).copy_(input_value)
        return whole


@dataclass(frozen=True)
class HeadPartConversion(PartConversion):
    """Some channels of each head of a projection, `[batch, pos, ..., head, width]`.

    Attributes:
        n_heads: Heads in the last axis.
        start: First channel of the part in each head.
        width: Channels of the part.
    """

    n_heads: int
    start: int
    width: int

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns a view `[batch, pos, head, width]`; axes of size one between positions and channels are left out."""
        flat = input_value if input_value.ndim == 3 else input_value.squeeze(2)
        return flat.unflatten(-1, (self.n_heads, -1)).narrow(-1, self.start, self.width)


@dataclass(frozen=True)
class HalfConversion(PartConversion):
    """One half of the last axis, where a gate and a linear branch are one projection.

    Attributes:
        is_second: Whether it is the second half.
    """

    is_second: bool

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns a view of the half."""
        width = input_value.shape[-1] // 2
        return input_value.narrow(-1, width * self.is_second, width)


@dataclass(frozen=True)
class ChannelsConversion(LayoutConversion):
    """Some channels of a projection's last axis, or of each group in it; by head, if a head's width is given.

    Attributes:
        start: First channel of the part, in each group.
        width: Channels of the part, in each group.
        groups: Groups in the last axis.
        d_head: Width of a head, or None to keep the channels in one axis.
    """

    start: int
    width: int
    groups: int = 1
    d_head: int | None = None

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the channels: a view, unless they lie in several groups and are joined."""
        channels = self._in_groups(input_value).flatten(-2)
        return channels if self.d_head is None else channels.unflatten(-1, (-1, self.d_head))

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns a copy of the whole tensor (the context) with these channels replaced."""
        whole = full_context[0].clone(memory_format=torch.contiguous_format)
        part = self._in_groups(whole)
        part.copy_(input_value.reshape(part.shape))
        return whole

    def _in_groups(self, whole: Tensor) -> Tensor:
        return whole.unflatten(-1, (self.groups, -1)).narrow(-1, self.start, self.width)


@dataclass(frozen=True)
class ChainedConversion(BaseTensorConversion):
    """One conversion after another.

    Attributes:
        first: From Hugging Face's layout.
        second: From what the first one gives.
    """

    first: BaseTensorConversion
    second: BaseTensorConversion

    @property
    def only_moves(self) -> bool:
        """Whether both do."""
        return self.first.only_moves and self.second.only_moves

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the tensor after both."""
        return self.second.handle_conversion(self.first.handle_conversion(input_value, *full_context))

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the tensor before both; the context is the whole tensor, if a conversion shows a part of it."""
        between = [self.first.handle_conversion(whole) for whole in full_context]
        return self.first.revert(self.second.revert(input_value, *between), *full_context)
