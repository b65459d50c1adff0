"""What this library puts on modules, torch hooks and forwards: how it gets there, and how it is found again."""

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from clearspan.modes import closed_to_compiler

Thing = TypeVar("Thing")
NO_KEYWORDS: Mapping[str, Any] = MappingProxyType({})
"""The keywords of a hook's call in whose moment another thread puts the hook on or takes it off."""

HOOK_TABLES = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
"""Endings of the names of a module's tables of hooks."""


class TorchHook(functools.partial[Any]):
    """A function on a module. Copies of the module do not have it, nor has what is pickled.

    As a partial, it is called as fast as the function.
    """

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return itself, (nothing,)


def nothing(*_: Any) -> None:
    """Changes nothing, as a torch hook."""


def itself(thing: Thing) -> Thing:
    """Returns what it is given: what pickle writes in the place of something else."""
    return thing


class StandIn:
    """A forward in the place of a module's own, until `restore`. Copies of the module have their own.

    Args:
        module: The module.
        function: Called with the forward whose place it takes, and with what that would be called with.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        self._module = module
        self._function = function
        self._cover(vars(module).get("forward"))  # where another library, or another stand-in, has put one
        vars(module)["forward"] = self

    def _cover(self, before: Callable[..., Any] | None) -> None:
        """Notes what it takes the place of: a forward of the module alone, or None for that of its class."""
        self._before = before
        # Its signature is that of what it takes the place of: `generate` asks what a model's forward takes.
        self.__wrapped__ = before or functools.partial(type(self._module).forward, self._module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self._function(self.__wrapped__, *args, **kwargs)

    def _own(self, module: nn.Module) -> Callable[..., Any]:
        """Returns the forward without this library's stand-ins, for a copy of the module."""
        before = self._before
        while isinstance(before, StandIn):
            before = before._before
        return before or functools.partial(type(module).forward, module)

    def restore(self) -> None:
        """Puts the forward back that was there before. Another stand-in that came later stays."""
        above = vars(self._module)["forward"]
        if above is not self:
            while above._before is not self:
                above = above._before
            above._cover(self._before)
        elif self._before is None:
            del vars(self._module)["forward"]
        else:
            vars(self._module)["forward"] = self._before

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return self._own(memo[id(self._module)])

    def __reduce__(self) -> tuple[Any, ...]:
        return itself, (self._own(self._module),)


def is_unhooked(module: nn.Module) -> bool:
    """Whether no torch hook changes a module's output: what its forward returns is what others get.

    There a forward in the place of its own sees what a torch hook would see, which torch needs ten times as long to put
    on and to call.
    """
    return not (module._forward_hooks or torch_module._global_forward_hooks)


class Seen(StandIn):
    """A module's own forward, after which a function is called with its arguments, its keywords and its output."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward, and has the function look at it."""
        output = self.__wrapped__(*args, **kwargs)
        self._function(args, kwargs, output)
        return output


def without_hooks(module: nn.Module, change: Callable[[nn.Module, nn.Module], None] | None = None) -> nn.Module:
    """Returns a module on the same tensors, without torch hooks and without this library's forwards, throughout.

    Args:
        module: The module.
        change: Called with each part, inner ones first, and with what stands for it in the new module.
    """
    own = copy.copy(module)
    state = vars(own)
    state.update({name: OrderedDict() for name in state if name.endswith(HOOK_TABLES)})
    if isinstance(state.get("forward"), StandIn):
        del state["forward"]
    parts = module._modules.items()
    state["_modules"] = {name: None if part is None else without_hooks(part, change) for name, part in parts}
    if change is not None:
        change(module, own)
    return own


def take_off_lost(model: nn.Module, kept: Container[int], diverted: Container[nn.Module]) -> None:
    """Takes what is of this library off a model's modules, but hooks with these ids, and these modules' forwards."""
    for module in model.modules():
        tables = (
            (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        )
        for hooks, *others in tables:
            for key in [key for key, hook in hooks.items() if _is_ours(hook) and key not in kept]:
                for table in (hooks, *others):
                    table.pop(key, None)
        while module not in diverted and isinstance(vars(module).get("forward"), StandIn):
            vars(module)["forward"].restore()


def take_off_copied(model: nn.Module) -> None:
    """Takes off a copied or unpickled model what is in the place of this library's torch hooks there."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook is nothing]:
                del hooks[key]


def _is_ours(hook: object) -> bool:
    return isinstance(hook, TorchHook) or hook is nothing


def before(module: nn.Module, function: Callable[..., Any], *, first: bool = False) -> RemovableHandle:
    """Has a function called with a module, its arguments and its keywords before each forward of the module.

    Args:
        module: The module.
        function: What it returns, unless it is None, are the arguments and keywords that the module gets.
        first: Whether it is called before the hooks that are there.
    """

    def called(on: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = NO_KEYWORDS) -> Any:
        return function(on, args, kwargs)

    return module.register_forward_pre_hook(TorchHook(closed_to_compiler(called)), with_kwargs=True, prepend=first)


def after(
    module: nn.Module, function: Callable[..., Any], *, always: bool = False, is_for_one: bool = False
) -> RemovableHandle:
    """Has a function called with a module, its arguments, its keywords and its output after each forward of the module.

    Args:
        module: The module.
        function: What it returns, unless it is None, takes the output's place.
        always: Whether it is called also where the forward raises; then without keywords, and the output is None.
        is_for_one: Whether the function does nothing in the forwards of other threads, where it may be called without
            keywords. It costs less, and is for runs, which are never compiled.
    """
    if is_for_one:
        return module.register_forward_hook(TorchHook(function), with_kwargs=True)

    def called(on: nn.Module, args: tuple[Any, ...], *others: Any) -> Any:
        return function(on, args, *others) if len(others) > 1 else function(on, args, NO_KEYWORDS, *others)

    return module.register_forward_hook(
        TorchHook(closed_to_compiler(called)), with_kwargs=not always, always_call=always
    )
