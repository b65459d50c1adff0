"""Conversions that only rearrange axes, written as einops patterns."""

from einops import rearrange
from torch import Tensor

from clearspan.conversions.base import BaseTensorConversion


class RearrangeTensorConversion(BaseTensorConversion):
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
