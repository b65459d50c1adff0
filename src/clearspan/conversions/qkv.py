"""Fused projections: how queries, keys and values share one axis."""

import itertools
from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from clearspan.conversions.layouts import LayoutConversion, RearrangeTensorConversion
from clearspan.errors import InvalidArgumentError

QKV = ("q", "k", "v")


class QKVConversionRule(LayoutConversion):
    """How a family fuses queries, keys and values, and how each divides into heads.

    The same rule splits the rows of a weight or bias (`dim=0`) and the last axis of an activation (`dim=-1`).

    Attributes:
        d_head: Width of a head.
        n_kv_heads: Key and value heads.
    """

    d_head: int
    n_kv_heads: int

    @abstractmethod
    def weight(self, part: str) -> RearrangeTensorConversion:
        """Returns the conversion of a part's rows of the weight, as `part` gives them, to `[head, d_model, d_head]`.

        Args:
            part: `"q"`, `"k"` or `"v"`.
        """

    @abstractmethod
    def part(self, fused: Tensor, dim: int, part: str) -> Tensor:
        """Returns a view of the query, key or value part of the fused axis.

        It keeps the axis flat (heads times d_head) if that is a view; otherwise the axis is divided into
        `[head, d_head]`, or `[kv_head, group, d_head]`.

        Args:
            fused: A weight, a bias or an activation.
            dim: Its fused axis.
            part: `"q"`, `"k"` or `"v"`.
        """

    def split(self, fused: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns views of all three parts of the fused axis, as `part` gives them.

        They are made one by one, since autograd refuses writes to a view that was made together with others.
        """
        return self.part(fused, dim, "q"), self.part(fused, dim, "k"), self.part(fused, dim, "v")

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns `[batch, pos, head, d_head]` for a part: a view, unless heads lie in groups.

        Raises:
            ValueError: The tensor is neither 3-D, nor a part in heads (4-D) or in groups of heads (5-D).
        """
        match input_value.ndim:
            case 3:
                return input_value.unflatten(-1, (-1, self.d_head))
            case 4:
                return input_value
            case 5:
                return input_value.flatten(-3, -2)
            case _:
                raise wrong_rank(input_value)

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns heads joined in the last axis, and a 3-D tensor as it is.

        Raises:
            ValueError: The tensor is neither 3-D nor 4-D.
        """
        return join_heads(input_value)


class BlockedQKVConversionRule(QKVConversionRule):
    """All queries, then all keys, then all values: `[n_heads*d_head | n_kv_heads*d_head | n_kv_heads*d_head]`.

    Args:
        n_heads: Query heads.
        d_head: Width of a head.
        n_kv_heads: Key and value heads.
    """

    def __init__(self, n_heads: int, d_head: int, n_kv_heads: int) -> None:
        self.n_heads = n_heads
        self.d_head = d_head
        self.n_kv_heads = n_kv_heads

    def weight(self, part: str) -> RearrangeTensorConversion:
        """Returns the conversion of a part's rows, which are flat."""
        return RearrangeTensorConversion("(n h) m -> n m h", n=self.n_heads if part == "q" else self.n_kv_heads)

    def part(self, fused: Tensor, dim: int, part: str) -> Tensor:
        """Returns a view of a block, flat."""
        queries, keys = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        size = queries + 2 * keys
        if fused.shape[dim] != size:
            raise _wrong_size(fused, dim, size, f"({self.n_heads} + 2 * {self.n_kv_heads}) heads * {self.d_head}")
        if part == "q":
            return fused.narrow(dim, 0, queries)
        return fused.narrow(dim, queries if part == "k" else queries + keys, keys)


class GroupedQKVConversionRule(QKVConversionRule):
    """For each key/value head its group of queries, then its key, then its value: `(kv_head, group + 2, d_head)`.

    In multi-head attention a group is one head: its query, key and value lie together.

    Args:
        n_heads: Query heads.
        d_head: Width of a head.
        n_kv_heads: Key and value heads.
    """

    def __init__(self, n_heads: int, d_head: int, n_kv_heads: int) -> None:
        self.d_head = d_head
        self.n_kv_heads = n_kv_heads
        self.group = n_heads // n_kv_heads

    def weight(self, part: str) -> RearrangeTensorConversion:
        """Returns the conversion of a part's rows, which lie by head, or for queries in groups of heads."""
        if part == "q" and 1 not in (self.group, self.n_kv_heads):
            return RearrangeTensorConversion("g n h m -> (g n) m h", g=self.n_kv_heads)
        n_heads = self.n_kv_heads * self.group if part == "q" else self.n_kv_heads
        return RearrangeTensorConversion("n h m -> n m h", n=n_heads)

    def part(self, fused: Tensor, dim: int, part: str) -> Tensor:
        """Returns a view in which the axis is `[head, d_head]`; for queries in groups `[kv_head, group, d_head]`."""
        axis = dim % fused.ndim
        size = self.n_kv_heads * (self.group + 2) * self.d_head
        if fused.shape[dim] != size:
            raise _wrong_size(fused, dim, size, f"{self.n_kv_heads} groups * ({self.group} + 2) heads * {self.d_head}")
        by_group = fused.unflatten(axis, (self.n_kv_heads, self.group + 2, self.d_head))
        if part != "q":
            return by_group.select(axis + 1, self.group if part == "k" else self.group + 1)
        if self.group == 1:
            return by_group.select(axis + 1, 0)
        if self.n_kv_heads == 1:
            return by_group.select(axis, 0).narrow(axis, 0, self.group)
        return by_group.narrow(axis + 1, 0, self.group)


class SlicedQKVConversionRule(QKVConversionRule):
    """Slices of the axis, each with some heads' queries, keys and values in blocks: `(slice, block, head, d_head)`.

    CodeGen, which was trained on four devices, has four slices, with values before keys.

    Args:
        n_heads: Query heads.
        d_head: Width of a head.
        n_kv_heads: Key and value heads.
        slices: Slices, among which heads are divided in order.
        order: The blocks of a slice, in order: `"q"`, `"k"` and `"v"`.
    """

    def __init__(self, n_heads: int, d_head: int, n_kv_heads: int, slices: int, order: Sequence[str] = QKV) -> None:
        self.d_head = d_head
        self.n_kv_heads = n_kv_heads
        self.slices = slices
        self.order = tuple(order)
        self._heads = {part: (n_heads if part == "q" else n_kv_heads) // slices for part in self.order}
        self._starts = dict(zip(self.order, itertools.accumulate(self._heads.values(), initial=0), strict=False))

    def weight(self, part: str) -> RearrangeTensorConversion:
        """Returns the conversion of a part's rows, which lie in slices of heads."""
        return RearrangeTensorConversion("s n h m -> (s n) m h", s=self.slices)

    def part(self, fused: Tensor, dim: int, part: str) -> Tensor:
        """Returns a view in which the axis is `[slice, head, d_head]`."""
        axis = dim % fused.ndim
        heads = sum(self._heads.values())
        size = self.slices * heads * self.d_head
        if fused.shape[dim] != size:
            raise _wrong_size(fused, dim, size, f"{self.slices} slices * {heads} heads * {self.d_head}")
        by_slice = fused.unflatten(axis, (self.slices, heads, self.d_head))
        return by_slice.narrow(axis + 1, self._starts[part], self._heads[part])


class QKVPartConversion(LayoutConversion):
    """Queries, keys or values, by head, as a part of the fused activation.

    Args:
        rule: The family's rule.
        part: `"q"`, `"k"` or `"v"`.
    """

    def __init__(self, rule: QKVConversionRule, part: str) -> None:
        self.rule = rule
        self.part = part

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns the part as `[batch, pos, head, d_head]`, a view where the rule allows one."""
        return self.rule.handle_conversion(self.rule.part(input_value, -1, self.part))

    def revert(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns a copy of the fused tensor (the context) with the part replaced."""
        fused = full_context[0].clone()
        part = self.rule.part(fused, -1, self.part)
        part.copy_(input_value.reshape(part.shape))
        return fused


def _wrong_size(fused: Tensor, dim: int, size: int, product: str) -> InvalidArgumentError:
    """Returns the error for a fused axis of another size than that of a product."""
    return InvalidArgumentError(
        "the fused axis does not hold these queries, keys and values",
        expected=f"{size} = {product}",
        got=str(fused.shape[dim]),
        fix="the rule or its heads in the adapter",
    )


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
