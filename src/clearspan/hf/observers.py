"""Observers: who sees a module's calls, and in which order."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from clearspan.hf.attention import IMPLEMENTATION, AttentionCall, ForwardCall, ObservedConfig, Observer

_observers: dict[nn.Module, list[Observer]] = {}


@contextlib.contextmanager
def observed(observers: Mapping[nn.Module, Observer]) -> Iterator[None]:
    """While the context is open, each module's calls go to its observer.

    Attention that uses transformers' interface gets another implementation in its own view of the config; the rest of
    the model, its masks included, stays as configured. Any other module's forward is wrapped. If a module has several
    observers, each sees the call in turn.
    """
    if not observers:
        yield
        return
    _register()
    configs: dict[int, ObservedConfig] = {}
    try:
        for module, observer in observers.items():
            if module not in _observers:
                _divert(module, configs)
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


def _divert(module: nn.Module, configs: dict[int, ObservedConfig]) -> None:
    """Sends a module's calls to its observers."""
    if uses_interface(module):
        config = vars(module)["config"]
        vars(module)["config"] = configs.setdefault(id(config), ObservedConfig(config))
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
    """A module's forward that sends its calls to the observers."""

    def __init__(self, module: nn.Module, own: Callable[..., Any] | None) -> None:
        self.module = module
        self.own = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.own or functools.partial(type(self.module).forward, self.module)
        return ForwardCall(self.module, forward, args, kwargs, observers=_of(self.module)).run()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        module = memo.get(id(self.module))  # nobody observes a copy of the model
        return self.own or functools.partial(type(self.module).forward, module)


def uses_interface(module: nn.Module) -> bool:
    """Returns whether a module's attention, as configured, is computed by transformers' attention interface."""
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
    return AttentionCall(module, query, key, value, attention_mask, kwargs, observers=_of(module)).run()


def _of(module: nn.Module) -> tuple[Observer, ...]:
    """Returns a module's observers; none, where another thread has taken them off in the moment of the call."""
    return tuple(_observers.get(module, ()))
