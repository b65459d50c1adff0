"""Conversions of activations between a flat last axis and heads, and of a part of each head."""

from torch import Tensor

from clearspan.conversions.base import BaseTensorConversion


class HeadsConversion(BaseTensorConversion):
    """`[batch, pos, head*d_head]` to `[batch, pos, head, d_head]`: a view, without the cost of a pattern's parser.

    Args:
        n_heads: Heads in the last axis.
    """

    def __init__(self, n_heads: int) -> None:
        self.n_heads = n_heads

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns a view by head."""
        return input_value.unflatten(-1, (self.n_heads, -1))

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns heads joined in the last axis."""
        return input_value.flatten(-2)


class HeadPartConversion(BaseTensorConversion):
    """The last `width` channels of each head of a projection, `[batch, pos, ..., head, width]`.

    Args:
        n_heads: Heads in the last axis.
        start: First channel of the part in each head.
        width: Channels of the part.
    """

    def __init__(self, n_heads: int, start: int, width: int) -> None:
        self.n_heads = n_heads
        self.start = start
        self.width = width

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns a view `[batch, pos, head, width]`; axes of size one between positions and channels are left out."""
        flat = input_value if input_value.ndim == 3 else input_value.squeeze(2)
        return flat.unflatten(-1, (self.n_heads, -1)).narrow(-1, self.start, self.width)

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns a copy of the whole projection (the context) with the part replaced."""
        whole = full_context[0].clone()
        self.handle_conversion(whole).copy_(input_value)
        return whole


class HalfConversion(BaseTensorConversion):
    """One half of the last axis, as where a gate and a linear branch are one projection.

    Args:
        is_second: Whether it is the second half.
    """

    def __init__(self, is_second: bool) -> None:
        self.is_second = is_second

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns a view of the half."""
        width = input_value.shape[-1] // 2
        return input_value.narrow(-1, width * self.is_second, width)

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns a copy of the whole (the context) with the half replaced."""
        whole = full_context[0].clone()
        self.handle_conversion(whole).copy_(input_value)
        return whole


class ScaledConversion(BaseTensorConversion):
    """The tensor times a constant, where the model multiplies what a part gives before it is added.

    Args:
        factor: The constant.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the product."""
        return input_value * self.factor

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the quotient."""
        return input_value / self.factor
