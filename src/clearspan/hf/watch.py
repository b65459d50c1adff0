"""Inside a module: torch function modes that show what it computes between its input and its output."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clearspan.errors import NotSeenError
from clearspan.interrupts import held_off
from clearspan.points import Passed, Side

Visit = Callable[[Tensor], Tensor]
"""Takes a tensor and returns the one to use in its place: the same one, where nobody edits it."""

Visits = Mapping[Side | Passed, Visit]

SOFTMAXES = frozenset({torch.nn.functional.softmax, torch.softmax, Tensor.softmax})
PRODUCTS = frozenset({torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__})
_OPERANDS = {
    torch.nn.functional.scaled_dot_product_attention: (0, ("query", "key")),
    torch.baddbmm: (1, ("batch1", "batch2")),
    Tensor.baddbmm: (1, ("batch1", "batch2")),
}
"""Functions that multiply queries and keys and do more: the place of queries among their arguments, and both names."""
_LINEARS = frozenset({torch.nn.functional.linear})


def run_under(mode: TorchFunctionMode, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function under a mode, while interrupts wait but in hook functions.

    Torch takes a mode off while its function runs. An interrupt there could put it back when all is over.
    """
    with held_off(), mode:
        return function(*args)


class OperandsWatch(TorchFunctionMode):
    """Shows visitors queries and keys as multiplied, in whichever way a module multiplies them: nothing else changes.

    Args:
        visits: The visitors.
        is_paused: Asked at each operation: True where it is not the module's own.
    """

    def __init__(self, visits: Visits, is_paused: Callable[[], bool]) -> None:
        super().__init__()
        self._visits = visits
        self._is_paused = is_paused
        self._softmaxes = 0
        self._is_multiplied = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._is_paused():
            args, kwargs = self._given(func, args, kwargs)
        return func(*args, **kwargs)

    def _given(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns a function's arguments, with what is visited of them as visited."""
        if func not in SOFTMAXES:
            return self._multiplied(func, args, kwargs)
        self._softmaxes += 1
        return args, kwargs

    def _multiplied(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns a function's arguments, with queries and keys as visited if it multiplies them."""
        if self._softmaxes or self._is_multiplied:
            return args, kwargs
        if func in PRODUCTS and args[1].ndim > 2:
            return (*self._operands(args[0], args[1]), *args[2:]), kwargs
        if func not in _OPERANDS:
            return args, kwargs
        first, names = _OPERANDS[func]
        # Which are given by name depends on who calls.
        named = {**dict(zip(names, args[first:], strict=False)), **kwargs}
        query, key = (named.pop(name) for name in names)
        if first:  # the second one is transposed already
            query, key = self._operands(query, key)
        else:
            self._is_multiplied = True
            query, key = self._visited(Side.QUERY, query), self._visited(Side.KEY, key)
        return (*args[:first], query, key, *args[first + 2 :]), named

    def _operands(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Returns queries, and keys with their last two axes swapped, as visited."""
        self._is_multiplied = True
        query, given = self._visited(Side.QUERY, query), key.transpose(-1, -2)
        new = self._visited(Side.KEY, given)
        return query, key if new is given else new.transpose(-1, -2)

    def _visited(self, side: Side, tensor: Tensor) -> Tensor:
        return self._visits[side](tensor) if side in self._visits else tensor

    def check(self, module: nn.Module) -> None:
        """Raises unless a product was seen."""
        if not self._is_multiplied:
            raise NotSeenError(
                "attention's queries and keys cannot be reached here",
                expected="a product of queries and keys, or torch's kernel for attention",
                got="neither",
                where=type(module).__name__,
            )


class SoftmaxWatch(OperandsWatch):
    """Shows visitors what attention computes: queries and keys as multiplied, the masked scores, the pattern.

    Scores are the softmax's input. A model with sinks joins each row's sink to its scores, and may then subtract the
    row's maximum. There they are shown before they are joined: afterwards they depend on the sink, and scores of two
    runs could not be compared.

    Args:
        visits: The visitors.
        is_paused: Asked at each operation: True where it is not the module's own.
    """

    def __init__(self, visits: Visits, is_paused: Callable[[], bool]) -> None:
        super().__init__(visits, is_paused)
        self._scores_shape: torch.Size | None = None
        self._awaits_product = False

    def _given(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if func in SOFTMAXES:
            self._softmaxes += 1
            self._awaits_product = True
            return (args if self._scores_shape is not None else (self._scores(args[0]), *args[1:])), kwargs
        if func in PRODUCTS and self._awaits_product:
            self._awaits_product = False
            return (self._pattern(args[0]), *args[1:]), kwargs
        if func is torch.cat and args and self._is_multiplied and not self._softmaxes:
            return (self._beside_sink(args[0]), *args[1:]), kwargs
        return self._multiplied(func, args, kwargs)

    def _scores(self, scores: Tensor) -> Tensor:
        self._scores_shape = scores.shape
        return self._visited(Side.SCORES, scores)

    def _beside_sink(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns the parts of a `torch.cat`; where they are scores and each row's sink, with the scores as edited."""
        if len(parts) == 2 and parts[1].shape == (*parts[0].shape[:-1], 1):
            return [self._scores(parts[0]), parts[1]]
        return parts

    def _pattern(self, weights: Tensor) -> Tensor:
        if Side.PATTERN not in self._visits:
            return weights
        assert self._scores_shape is not None, "a softmax comes before"
        pattern = weights.view(self._scores_shape)
        new = self._visits[Side.PATTERN](pattern)
        return weights if new is pattern else new.reshape(weights.shape)

    def check(self, module: nn.Module) -> None:
        """Raises unless one softmax was seen, and a product after it."""
        if self._softmaxes != 1 or self._awaits_product:
            raise NotSeenError(
                "attention's scores and pattern cannot be reached here",
                expected="one softmax and a matrix product of its result",
                got=f"{self._softmaxes} softmaxes, {'no product' if self._awaits_product else 'a product'} after",
                where=type(module).__name__,
            )


class RouterWatch(TorchFunctionMode):
    """Shows a visitor the output of a router's linear map.

    Args:
        visit: The visitor.
        is_paused: Asked at each operation: True where it is not the module's own.
    """

    def __init__(self, visit: Visit, is_paused: Callable[[], bool]) -> None:
        super().__init__()
        self._visit = visit
        self._is_paused = is_paused
        self._linears = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _LINEARS and not self._is_paused():
            self._linears += 1
            return self._visit(result)
        return result

    def check(self, module: nn.Module) -> None:
        """Raises unless one linear map was seen."""
        if self._linears != 1:
            raise NotSeenError(
                "the router's logits cannot be reached here",
                expected="one linear map",
                got=f"{self._linears} of them",
                where=type(module).__name__,
            )
