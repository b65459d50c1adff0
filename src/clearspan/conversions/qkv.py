"""Fused projections: how queries, keys and values lie side by side in one axis."""

from abc import abstractmethod

from torch import Tensor

from clearspan.conversions.base import BaseTensorConversion

QKV = ("q", "k", "v")


class QKVConversionRule(BaseTensorConversion):
    """How a family fuses queries, keys and values, and how each divides into heads.

    The same rule splits the rows of a weight or bias (`dim=0`) and the last axis of an activation (`dim=-1`).
    """

    @abstractmethod
    def split(self, fused: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns views of the query, key and value parts of the fused axis.

        A part keeps the axis flat (heads times d_head) where that is a view, and has it divided into
        `[head, d_head]` where only that is one. The views are made one by one: autograd lets no view be written to that
        was made together with others.
        """


class InterleavedQKVConversionRule(QKVConversionRule):
    """Each head's query, key and value lie together: the fused axis is `(head, qkv, d_head)`.

    Args:
        n_heads: Heads, as many for keys and values as for queries.
        d_head: Width of a head.
    """

    def __init__(self, n_heads: int, d_head: int) -> None:
        self.n_heads = n_heads
        self.d_head = d_head

    def split(self, fused: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns views in which the fused axis is `[head, d_head]`."""
        axis = dim % fused.ndim
        by_head = fused.unflatten(axis, (self.n_heads, 3, self.d_head))
        return by_head.select(axis + 1, 0), by_head.select(axis + 1, 1), by_head.select(axis + 1, 2)

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns `[batch, pos, head, d_head]`; a 4-D tensor, which has heads already, passes unchanged.

        Raises:
            ValueError: The tensor is neither 3-D nor 4-D.
        """
        match input_value.ndim:
            case 3:
                return input_value.unflatten(-1, (self.n_heads, self.d_head))
            case 4:
                return input_value
            case _:
                raise wrong_rank(input_value)

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns heads joined in the last axis; a 3-D tensor passes unchanged.

        Raises:
            ValueError: The tensor is neither 3-D nor 4-D.
        """
        return join_heads(input_value)


class QKVPartConversion(BaseTensorConversion):
    """One of query, key and value, by head, as a part of the fused activation.

    Args:
        rule: The family's rule.
        part: `"q"`, `"k"` or `"v"`.
    """

    def __init__(self, rule: QKVConversionRule, part: str) -> None:
        self.rule = rule
        self.part = part
        self._index = QKV.index(part)

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns a view `[batch, pos, head, d_head]` of the part."""
        return self.rule.handle_conversion(self.rule.split(input_value, -1)[self._index])

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns a copy of the fused tensor (the context) with the part replaced."""
        fused = full_context[0].clone()
        self.handle_conversion(fused).copy_(input_value)
        return fused


def join_heads(value: Tensor) -> Tensor:
    """Returns `[batch, pos, head, d_head]` with heads joined in the last axis, and `[batch, pos, width]` as it is."""
    match value.ndim:
        case 3:
            return value
        case 4:
            return value.flatten(-2)
        case _:
            raise wrong_rank(value)


def wrong_rank(tensor: Tensor) -> ValueError:
    """Returns the error for a tensor that is neither flat nor divided into heads."""
    return ValueError(
        "expected 3-D [batch, pos, width] or 4-D [batch, pos, head, d_head], "
        f"got {tensor.ndim}-D with shape {list(tensor.shape)}"
    )
