"""Inside attention: the model's own eager function, watched for its softmax and the product that follows."""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clearspan.errors import AttentionNotSeenError

IMPLEMENTATION = "clearspan"
"""Name of the attention function registered with transformers; only a layer that is observed is given it."""

Visit = Callable[[Tensor], Tensor]

_SOFTMAXES = frozenset({torch.nn.functional.softmax, torch.softmax, Tensor.softmax})
_PRODUCTS = frozenset({torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__})


@dataclass(frozen=True)
class AttentionCall:
    """One call of a layer's attention function.

    Attributes:
        module: The attention module.
        query: `[batch, head, q_pos, d_head]`, as used in the product.
        key: `[batch, kv_head, k_pos, d_head]`.
        value: `[batch, kv_head, k_pos, d_head]`.
        mask: As it was made for the model's own implementation.
        kwargs: What the function was called with besides.
        observers: Those who have still to see the call.
        eagerly: Whether one of them needs it to be run by the eager function.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    kwargs: dict[str, Any]
    observers: "tuple[Observer, ...]" = ()
    eagerly: bool = False

    def run(self) -> Any:
        """Hands the call to the next observer, and after the last one runs it.

        It is run by the implementation that the model is configured with, or by the eager one.
        """
        if self.observers:
            return self.observers[0](replace(self, observers=self.observers[1:]))
        return self._run_eagerly() if self.eagerly else self._run_natively()

    def _run_eagerly(self) -> Any:
        mask = additive_mask(self.mask, self.query, self.key, self.module, self.kwargs)
        return _eager(self.module)(self.module, self.query, self.key, self.value, mask, **self.kwargs)

    def _run_natively(self) -> Any:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        module = self.module
        shown: Any = module.config
        config = shown.original if isinstance(shown, _ObservedConfig) else shown
        vars(module)["config"] = config  # flash attention reads its own name there
        try:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, _eager(module))
            return attend(module, self.query, self.key, self.value, self.mask, **self.kwargs)
        finally:
            vars(module)["config"] = shown

    def run_watched(self, scores: Visit, pattern: Visit) -> Any:
        """Runs the call by the model's own eager function; the visitors may replace scores and pattern."""
        with SoftmaxWatch(scores, pattern) as watch:
            output = replace(self, eagerly=True).run()
        watch.check(self.module)
        return output

    def inside(self) -> tuple[Tensor, Tensor]:
        """Returns scores and pattern, `[batch, head, q_pos, k_pos]`, as the eager function computes them."""
        seen: list[Tensor] = []

        def see(tensor: Tensor) -> Tensor:
            seen.append(tensor)
            return tensor

        with SoftmaxWatch(see, see) as watch:
            self._run_eagerly()
        watch.check(self.module)
        scores, pattern = seen
        return scores, pattern

    def tensors(self) -> dict[str, Tensor]:
        """Returns queries, keys and values."""
        return {"query": self.query, "key": self.key, "value": self.value}

    def detached(self) -> "AttentionCall":
        """Returns the call with tensors outside the graph."""
        mask = None if self.mask is None else self.mask.detach()
        return replace(
            self, query=self.query.detach(), key=self.key.detach(), value=self.value.detach(), mask=mask, observers=()
        )


Observer = Callable[[AttentionCall], Any]
"""Runs a call, one way or another, and returns the attention function's output."""

_observers: dict[nn.Module, list[Observer]] = {}


class _ObservedConfig:
    """A module's config, with another attention implementation."""

    _attn_implementation = IMPLEMENTATION

    def __init__(self, original: Any) -> None:
        self.original = original

    def __getattr__(self, name: str) -> Any:
        if "original" not in vars(self):  # while a copy of it is being made
            raise AttributeError(name)
        return getattr(self.original, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)  # a copy of the model is observed by nobody


@contextlib.contextmanager
def observed(observers: Mapping[nn.Module, Observer]) -> Iterator[None]:
    """Has each attention module's calls go to its observer while the context is open.

    Only these modules see another attention implementation, in their own view of the config. The rest of the model, its
    masks included, goes on as it is configured. A module may have several observers; each sees the call in turn.
    """
    if not observers:
        yield
        return
    _register()
    views: dict[int, _ObservedConfig] = {}
    try:
        for module, observer in observers.items():
            if module not in _observers:
                config = vars(module)["config"]
                vars(module)["config"] = views.setdefault(id(config), _ObservedConfig(config))
            _observers.setdefault(module, []).append(observer)
        yield
    finally:
        for module, observer in observers.items():
            there = _observers.get(module, [])
            if observer in there:
                there.remove(observer)
            if module in _observers and not there:
                del _observers[module]
                vars(module)["config"] = vars(module)["config"].original


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    first, *others = _observers[module]
    return first(AttentionCall(module, query, key, value, attention_mask, kwargs, tuple(others)))


def _eager(module: nn.Module) -> Callable[..., Any]:
    eager = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
    if eager is None:
        raise AttentionNotSeenError(
            "attention's scores and pattern cannot be reached here",
            where=type(module).__name__,
            reason=f"{type(module).__module__} has no eager attention function of its own",
        )
    return eager


class SoftmaxWatch(TorchFunctionMode):
    """Hands over the softmax's input and the first operand of the product that follows it.

    Args:
        scores: Called with the softmax's input; what it returns is used instead.
        pattern: Called with the product's first operand, likewise.
    """

    def __init__(self, scores: Visit, pattern: Visit) -> None:
        super().__init__()
        self._scores = scores
        self._pattern = pattern
        self._softmaxes = 0
        self._awaits_product = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SOFTMAXES:
            self._softmaxes += 1
            self._awaits_product = True
            args = (self._scores(args[0]), *args[1:])
        elif self._awaits_product and func in _PRODUCTS:
            self._awaits_product = False
            args = (self._pattern(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))

    def check(self, module: nn.Module) -> None:
        """Raises unless one softmax was seen, and a product after it."""
        if self._softmaxes != 1 or self._awaits_product:
            raise AttentionNotSeenError(
                "attention's scores and pattern cannot be reached here",
                expected="one softmax and a matrix product of its result",
                got=f"{self._softmaxes} softmaxes, {'no product' if self._awaits_product else 'a product'} after",
                where=type(module).__name__,
            )


def additive_mask(
    mask: Tensor | None, query: Tensor, key: Tensor, module: nn.Module, kwargs: Mapping[str, Any]
) -> Tensor:
    """Returns the mask that eager attention adds to its scores, from the one made for the model's implementation.

    Args:
        mask: As sdpa gets it (None where its `is_causal` says all, or boolean), as flash attention does (None, or two
            axes that mark padding), or additive already.
        query: `[batch, head, q_pos, d_head]`.
        key: `[batch, kv_head, k_pos, d_head]`.
        module: The attention module.
        kwargs: What the attention function was called with besides.
    """
    if mask is not None and mask.is_floating_point() and mask.ndim == 4:
        return mask
    allowed = mask.bool() if mask is not None and mask.ndim == 4 else _allowed(mask, query, key, module, kwargs)
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    # Eager attention often takes its softmax in float32, where float64's least number would be -inf, and a row that is
    # masked throughout would be NaN.
    least = max(torch.finfo(query.dtype).min, torch.finfo(torch.float32).min)
    return torch.where(allowed, zero, least)


def _allowed(mask: Tensor | None, query: Tensor, key: Tensor, module: nn.Module, kwargs: Mapping[str, Any]) -> Tensor:
    """Returns where a query may look, `[batch or 1, 1, q_pos, k_pos]`, for a mask that says it by omission."""
    q_len, k_len = query.shape[2], key.shape[2]
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    k_pos = torch.arange(k_len, device=key.device)
    # Without a mask sdpa aligns queries with the first keys (a cache of fixed length has empty ones behind them); flash
    # attention, whose mask marks padding alone, aligns them with the last.
    first = 0 if mask is None and q_len > 1 else k_len - q_len
    q_pos = torch.arange(q_len, device=key.device)[:, None] + first
    allowed = k_pos <= q_pos if is_causal else torch.ones_like(k_pos <= q_pos)
    window = kwargs.get("sliding_window")
    if window is not None:
        allowed = allowed & (k_pos > q_pos - window)
    return allowed[None, None] if mask is None else allowed & mask.bool()[:, None, None, :]
