"""Inside attention: the model's own eager function, watched for its softmax and the product that follows."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clearspan.errors import AttentionNotSeenError

IMPLEMENTATION = "clearspan_watched"
"""Name of the attention function registered with transformers, used by no layer but a watched one."""

Visit = Callable[[Tensor], Tensor]

_SOFTMAXES = frozenset({torch.nn.functional.softmax, torch.softmax, Tensor.softmax})
_PRODUCTS = frozenset({torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__})

_watched: dict[nn.Module, tuple[Visit, Visit]] = {}


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


@contextmanager
def watched(module: nn.Module, scores: Visit, pattern: Visit) -> Iterator[None]:
    """Runs one attention module eagerly, with a visitor for its scores and one for its pattern, while it is open.

    Only this module sees another implementation: it is given a copy of its config that names ours. The rest of the
    model, its masks included, goes on as it is configured.
    """
    _register()
    config = module.config
    shown = copy.copy(config)
    shown._attn_implementation_internal = IMPLEMENTATION
    _watched[module] = (scores, pattern)
    module.config = shown
    try:
        yield
    finally:
        module.config = config
        del _watched[module]


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function of a watched layer: the model's own eager one, under the watch."""
    eager = sys.modules[type(module).__module__].__dict__.get("eager_attention_forward")
    if eager is None:
        raise AttentionNotSeenError(
            "attention's scores and pattern cannot be reached here",
            where=type(module).__name__,
            reason=f"{type(module).__module__} has no eager attention function of its own",
        )
    mask = additive_mask(attention_mask, query, key, module, kwargs)
    with SoftmaxWatch(*_watched[module]) as watch:
        output = eager(module, query, key, value, mask, **kwargs)
    watch.check(module)
    return output


def additive_mask(
    mask: Tensor | None, query: Tensor, key: Tensor, module: nn.Module, kwargs: dict[str, Any]
) -> Tensor | None:
    """Returns the mask that eager attention adds to its scores, from the one made for the user's implementation.

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
    q_len, k_len = query.shape[2], key.shape[2]
    if mask is not None and mask.ndim == 4:
        allowed = mask.bool()
    else:
        is_causal = kwargs.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        k_pos = torch.arange(k_len, device=key.device)
        # Without a mask sdpa aligns queries with the first keys (a cache of fixed length has empty ones behind them);
        # flash attention, whose mask marks padding alone, aligns them with the last.
        first = 0 if mask is None and q_len > 1 else k_len - q_len
        q_pos = torch.arange(q_len, device=key.device)[:, None] + first
        allowed = (k_pos <= q_pos) if is_causal else torch.ones_like(k_pos <= q_pos)
        window = kwargs.get("sliding_window")
        if window is not None:
            allowed = allowed & (k_pos > q_pos - window)
        allowed = allowed[None, None]
        if mask is not None:
            allowed = allowed & mask.bool()[:, None, None, :]
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(allowed, zero, torch.finfo(query.dtype).min)
