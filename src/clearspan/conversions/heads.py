"""The conversion of activations between a flat last axis and heads."""

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
