"""Torch hooks of this library's on a model's modules: how they are put there, and how they are found again."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

NO_KEYWORDS: Mapping[str, Any] = MappingProxyType({})
"""The keywords of a hook's call in whose moment another thread puts the hook on or takes it off."""


class TorchHook:
    """A function on a module. Copies of the module do not have it, and it is not pickled with the module."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Calls the function."""
        return self._function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> str:
        return "nothing"


def nothing(*_: Any) -> None:
    """Changes nothing, as a torch hook."""


def before(module: nn.Module, function: Callable[..., Any], *, first: bool = False) -> RemovableHandle:
    """Has a function called with a module, its arguments and its keywords before each forward of the module.

    Args:
        module: The module.
        function: What it returns, unless it is None, are the arguments and keywords that the module gets.
        first: Whether it is called before the hooks that are there.
    """

    def called(on: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = NO_KEYWORDS) -> Any:
        return function(on, args, kwargs)

    return module.register_forward_pre_hook(TorchHook(called), with_kwargs=True, prepend=first)


def after(module: nn.Module, function: Callable[..., Any], *, always: bool = False) -> RemovableHandle:
    """Has a function called with a module, its arguments, its keywords and its output after each forward of the module.

    Args:
        module: The module.
        function: What it returns, unless it is None, takes the output's place.
        always: Whether it is called also where the forward raises; then without keywords, and the output is None.
    """
    if always:
        return module.register_forward_hook(TorchHook(function), always_call=True)

    def called(on: nn.Module, args: tuple[Any, ...], *others: Any) -> Any:
        return function(on, args, *others) if len(others) > 1 else function(on, args, NO_KEYWORDS, *others)

    return module.register_forward_hook(TorchHook(called), with_kwargs=True)
