"""Observers: who sees a module's calls, and in which order."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from clearspan.hf.adapters import acting
from clearspan.hf.attention import AttentionCall, Call, ForwardCall, ObservedConfig, Observer
from clearspan.hf.torch_hooks import StandIn

_observers: dict[nn.Module, list[Observer]] = {}


@contextlib.contextmanager
def observed(observers: Mapping[nn.Module, Observer]) -> Iterator[None]:
    """While the context is open, each module's calls go to its observer.

    Attention that uses transformers' interface gets another implementation in its own view of the config; the rest of
    the model, its masks included, stays as configured. Any other module's forward is wrapped. If a module has several
    observers, each sees the call in turn. Where an adapter of peft holds copies of a module, the one that acts is
    observed.
    """
    if not observers:
        yield
        return
    observers = {acting(module): observer for module, observer in observers.items()}
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
        if id(config) not in configs:
            configs[id(config)] = ObservedConfig(config, _attend)
        vars(module)["config"] = configs[id(config)]
        return

    def forward(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        first, others = _observers_of(module)
        return first(ForwardCall(module, run, args, kwargs, observers=others))

    StandIn(module, forward)


def _restore(module: nn.Module) -> None:
    diverted, config = vars(module).get("forward"), vars(module).get("config")
    if isinstance(config, ObservedConfig):
        vars(module)["config"] = config.original
    elif isinstance(diverted, StandIn):
        diverted.restore()


def forget_lost(model: nn.Module, kept: Container[nn.Module]) -> None:
    """Ends the observation of a model's modules but some, where who observed them is lost."""
    for module in model.modules():
        if module in _observers and module not in kept:
            del _observers[module]
            _restore(module)


def uses_interface(module: nn.Module) -> bool:
    """Returns whether a module's attention, as configured, is computed by transformers' attention interface."""
    if vars(module).get("reorder_and_upcast_attn") and vars(module)["config"]._attn_implementation == "eager":
        return False  # GPT-2 has an eager path of its own for this setting
    return _names_interface(type(module))


@functools.cache
def _names_interface(kind: type[nn.Module]) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(kind.forward).__code__.co_names


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    first, others = _observers_of(module)
    return first(AttentionCall(module, query, key, value, attention_mask, kwargs, observers=others))


def _observers_of(module: nn.Module) -> tuple[Observer, tuple[Observer, ...]]:
    """Returns a module's first observer, and the others."""
    # Another thread may have taken them all off in the moment of the call.
    first, *others = tuple(_observers.get(module, ())) or (Call.run,)
    return first, tuple(others)
