"""Calls of attention, seen and run one way or another: by transformers' attention interface, or module by module."""

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from clearspan.errors import NotSeenError
from clearspan.hf.masks import additive_mask, without_bias
from clearspan.hf.offload import execution_device
from clearspan.hf.relocation import Relocation
from clearspan.hf.watch import RouterWatch, SoftmaxWatch, Visit, Visits, takes
from clearspan.points import Side

IMPLEMENTATION = "clearspan"
"""Name of the attention function registered with transformers; only a layer that is observed is given it."""


def _never() -> bool:
    return False


@dataclass(frozen=True)
class _Watcher:
    """What one observer asks to be handed. The fields are the arguments of `run_watched`."""

    visits: Visits
    is_paused: Callable[[], bool]
    is_last: bool


def _joined(watchers: Sequence[_Watcher]) -> tuple[Visits, Callable[[], bool]]:
    """Returns the visitors of all watchers as one for each side, in their order, and whether any is paused."""
    at: dict[Side, list[Visit]] = {}
    for watcher in sorted(watchers, key=lambda watcher: watcher.is_last):
        for side, visit in watcher.visits.items():
            at.setdefault(side, []).append(visit)

    def through(visits: Sequence[Visit]) -> Visit:
        return (
            visits[0]
            if len(visits) == 1
            else lambda tensor: functools.reduce(lambda t, visit: visit(t), visits, tensor)
        )

    return {side: through(visits) for side, visits in at.items()}, lambda: any(one.is_paused() for one in watchers)


@dataclass(frozen=True)
class AttentionCall:
    """One call of a layer's attention function, through transformers' attention interface.

    Attributes:
        module: The attention module.
        query: `[batch, head, q_pos, d_head]`, as used in the product.
        key: `[batch, kv_head, k_pos, d_head]`.
        value: `[batch, kv_head, k_pos, d_head]`.
        mask: As it was made for the model's own implementation.
        kwargs: What the function was called with besides.
        observers: Those who have still to see the call.
        watchers: What they have asked to be handed.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    kwargs: dict[str, Any]
    observers: "tuple[Observer, ...]" = ()
    watchers: "tuple[_Watcher, ...]" = ()

    def run(self) -> Any:
        """Hands the call to the next observer, and after the last one runs it.

        It is run by the implementation that the model is configured with; only where someone is to be handed scores or
        pattern, by the model's own eager function.
        """
        if self.observers:
            return self.observers[0](replace(self, observers=self.observers[1:]))
        return self._run_for_watchers() if self.watchers else self._run_natively()

    def _run_eagerly(self) -> Any:
        mask = additive_mask(self.mask, self.query, self.key, self.module, self.kwargs)
        return _eager(self.module)(self.module, self.query, self.key, self.value, mask, **self.kwargs)

    def _run_natively(self) -> Any:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if self.query.is_meta:  # only shapes are wanted, for which few kernels serve
            rows, heads, positions, _ = self.query.shape
            return self.query.new_empty(rows, positions, heads, self.value.shape[-1]), None
        module = self.module
        shown: Any = module.config
        config = shown.original if isinstance(shown, _ObservedConfig) else shown
        vars(module)["config"] = config  # flash attention reads its own name there
        try:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, _eager(module))
            return attend(module, self.query, self.key, self.value, self.mask, **self.kwargs)
        finally:
            vars(module)["config"] = shown

    def run_watched(self, visits: Visits, is_paused: Callable[[], bool] = _never, *, is_last: bool = False) -> Any:
        """Runs the call; the visitors may replace what they are handed.

        Args:
            visits: The visitors.
            is_paused: Asked at each operation whether it is not the module's own.
            is_last: Whether they come after those of all other observers.
        """
        return replace(self, watchers=(*self.watchers, _Watcher(visits, is_paused, is_last))).run()

    def _run_for_watchers(self) -> Any:
        visits, is_paused = _joined(self.watchers)
        query = visits[Side.QUERY](self.query) if Side.QUERY in visits else self.query
        key = visits[Side.KEY](self.key) if Side.KEY in visits else self.key
        call = replace(self, query=query, key=key)
        inside = {side: visit for side, visit in visits.items() if side in (Side.SCORES, Side.PATTERN)}
        if not inside:
            return call._run_natively()
        with SoftmaxWatch(inside, is_paused) as watch:
            output = call._run_eagerly()
        watch.check(self.module)
        return output

    def inside(self) -> tuple[Tensor, Tensor]:
        """Returns scores and pattern, `[batch, head, q_pos, k_pos]`, as the eager function computes them.

        They are computed where the module is, and returned where the call is.
        """
        seen: list[Tensor] = []

        def see(tensor: Tensor) -> Tensor:
            seen.append(tensor)
            return tensor

        narrow = replace(self, value=self.key[..., :1])  # what the pattern multiplies is not asked for
        here, home = self.query.device, execution_device(self.module)
        there = narrow if here == home else narrow.to(Relocation(home))
        with torch.no_grad(), SoftmaxWatch({Side.SCORES: see, Side.PATTERN: see}, _never) as watch:
            there._run_eagerly()
        watch.check(self.module)
        scores, pattern = seen
        return scores.to(here), pattern.to(here)

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors that the call holds, but for the module's own."""
        named = {"query": self.query, "key": self.key, "value": self.value, "attention_mask": self.mask, **self.kwargs}
        return {
            name: one for name, one in named.items() if isinstance(one, Tensor) and not isinstance(one, nn.Parameter)
        }

    def to(self, there: Relocation) -> "AttentionCall":
        """Returns the call with its tensors on another device; the module's own stay where they are."""
        named = {name: _moved(value, there) for name, value in self.kwargs.items()}
        query, key, value, mask = (_moved(one, there) for one in (self.query, self.key, self.value, self.mask))
        return replace(self, query=query, key=key, value=value, mask=mask, kwargs=named)

    def detached(self) -> "AttentionCall":
        """Returns the call with tensors outside the graph."""
        mask = None if self.mask is None else self.mask.detach()
        return replace(
            self, query=self.query.detach(), key=self.key.detach(), value=self.value.detach(), mask=mask, observers=()
        )


def _moved(value: Any, there: Relocation) -> Any:
    match value:
        case nn.Parameter():
            return value
        case Tensor():
            return there(value)
    # Flex attention's mask is no tensor, and is moved likewise.
    return value.to(there.device) if hasattr(value, "to") else value


@dataclass(frozen=True)
class ForwardCall:
    """One call of a module's forward, where only that can be watched: attention of its own, or a router.

    Attributes:
        module: The module.
        forward: Its forward.
        args: What it was called with.
        kwargs: And by keyword.
        observers: Those who have still to see the call.
        watchers: What they have asked to be handed.
    """

    module: nn.Module
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    observers: "tuple[Observer, ...]" = ()
    watchers: "tuple[_Watcher, ...]" = ()

    def run(self) -> Any:
        """Hands the call to the next observer, and after the last one runs it."""
        if self.observers:
            return self.observers[0](replace(self, observers=self.observers[1:]))
        return self._run_for_watchers() if self.watchers else self.forward(*self.args, **self.kwargs)

    def run_watched(self, visits: Visits, is_paused: Callable[[], bool] = _never, *, is_last: bool = False) -> Any:
        """Runs the call; the visitors may replace what they are handed. Its arguments are as for `AttentionCall`."""
        return replace(self, watchers=(*self.watchers, _Watcher(visits, is_paused, is_last))).run()

    def _run_for_watchers(self) -> Any:
        visits, is_paused = _joined(self.watchers)
        if Side.ROUTER in visits:
            with RouterWatch(visits[Side.ROUTER], is_paused) as watch:
                output = self.forward(*self.args, **self.kwargs)
        else:
            call = self._eagerly()
            with SoftmaxWatch(visits, is_paused) as watch:
                output = call.forward(*call.args, **call.kwargs)
        watch.check(self.module)
        return output

    def _eagerly(self) -> "ForwardCall":
        """Returns the call as it must be for the module to take its eager path."""
        config = vars(self.module).get("config")
        if config is None or config._attn_implementation == "eager" or self.kwargs.get("output_attentions"):
            return self
        kwargs = {**self.kwargs, "output_attentions": True} if takes(self.module, "output_attentions") else self.kwargs
        mask = kwargs.get("attention_mask")
        if mask is None:
            return replace(self, kwargs=kwargs)
        dtype = self.args[0].dtype if self.args else kwargs["hidden_states"].dtype
        return replace(self, kwargs={**kwargs, "attention_mask": without_bias(mask, dtype)})


Call = AttentionCall | ForwardCall

Observer = Callable[[Any], Any]
"""Runs a call, one way or another, and returns its output."""

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
    """Has each module's calls go to its observer while the context is open.

    Attention that uses transformers' interface sees another implementation, in its own view of the config: the rest of
    the model, its masks included, goes on as it is configured. Any other module's forward is wrapped. A module may have
    several observers; each sees the call in turn.
    """
    if not observers:
        yield
        return
    _register()
    views: dict[int, _ObservedConfig] = {}
    try:
        for module, observer in observers.items():
            if module not in _observers:
                _divert(module, views)
            _observers.setdefault(module, []).append(observer)
        yield
    finally:
        for module, observer in observers.items():
            there = _observers.get(module, [])
            if observer in there:
                there.remove(observer)
            if module in _observers and not there:
                del _observers[module]
                _restore(module)


def _divert(module: nn.Module, views: dict[int, _ObservedConfig]) -> None:
    """Has a module's calls go to its observers."""
    if uses_interface(module):
        config = vars(module)["config"]
        vars(module)["config"] = views.setdefault(id(config), _ObservedConfig(config))
        return
    own = vars(module).get("forward")  # where another library has put one
    vars(module)["forward"] = _Diverted(module, own)


def _restore(module: nn.Module) -> None:
    diverted = vars(module).get("forward")
    if not isinstance(diverted, _Diverted):
        vars(module)["config"] = vars(module)["config"].original
        return
    del vars(module)["forward"]
    if diverted.own is not None:
        vars(module)["forward"] = diverted.own


class _Diverted:
    """A module's forward that hands its calls to the observers."""

    def __init__(self, module: nn.Module, own: Callable[..., Any] | None) -> None:
        self.module = module
        self.own = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first, *others = _observers[self.module]
        forward = self.own or functools.partial(type(self.module).forward, self.module)
        return first(ForwardCall(self.module, forward, args, kwargs, tuple(others)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        module = memo.get(id(self.module))  # a copy of the model is observed by nobody
        return self.own or functools.partial(type(self.module).forward, module)


def uses_interface(module: nn.Module) -> bool:
    """Returns whether a module's attention is computed by transformers' attention interface as it is configured."""
    if vars(module).get("reorder_and_upcast_attn") and vars(module)["config"]._attn_implementation == "eager":
        return False  # GPT-2 has an eager path of its own for this setting
    return _names_interface(type(module))


@functools.cache
def _names_interface(kind: type[nn.Module]) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(kind.forward).__code__.co_names


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
        raise NotSeenError(
            "attention's scores and pattern cannot be reached here",
            where=type(module).__name__,
            reason=f"{type(module).__module__} has no eager attention function of its own",
        )
    return eager
