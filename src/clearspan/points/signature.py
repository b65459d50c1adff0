"""Signatures of hook functions: whatever can be called with a value and its hook point."""

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from clearspan.errors import HookTypeError


def by_position(hook: Any, where: str) -> Callable[[Tensor, Any], Tensor | None]:
    """Returns a user's function as one that takes the value and the point by position.

    Raises:
        HookTypeError: It is not callable, or not with these two.
    """
    if not callable(hook):
        raise HookTypeError(
            "a hook function must be callable",
            got=f"{type(hook).__name__} {hook!r}",
            where=where,
            fix="fn(value, hook) that returns a tensor or None",
        )
    function: Callable[..., Any] = hook
    if _takes_two(function):
        return function
    name = getattr(hook, "__name__", type(hook).__name__)
    try:
        signature = inspect.signature(hook.forward if isinstance(hook, nn.Module) else hook)
    except (TypeError, ValueError):  # some functions written in C tell none
        raise _wrong_parameters(f"{name}, whose parameters are not known", where) from None
    kinds = inspect.Parameter
    parameters = list(signature.parameters.values())
    second = next(iter([one for one in parameters if one.kind <= kinds.VAR_POSITIONAL][1:]), None)
    # A default is the user's own, as in `lambda value, layer=layer: ...`: only the name says that the point goes there.
    has_place = second is not None and (second.default is kinds.empty or second.name == "hook")
    takes_any = [one.kind for one in parameters] == [kinds.VAR_POSITIONAL]
    if (has_place or takes_any) and _binds(signature, None, None):
        return function
    if _binds(signature, None, hook=None):
        return lambda value, point: function(value, hook=point)
    raise _wrong_parameters(f"{name}{signature}", where)


def _takes_two(hook: Callable[..., Any]) -> bool:
    """Whether a function, method or object with `__call__` plainly takes two: known without its signature, so cheap."""
    function = hook if type(hook) is FunctionType else getattr(hook, "__func__", type(hook).__call__)
    if type(function) is not FunctionType or function.__defaults__ or function.__kwdefaults__:
        return False
    code = function.__code__
    return code.co_argcount == (2 if function is hook else 3) and not code.co_kwonlyargcount


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _wrong_parameters(got: str, where: str) -> HookTypeError:
    return HookTypeError(
        "a hook function takes two things: a value and its hook point",
        expected="fn(value, hook)",
        got=got,
        where=where,
        fix="lambda value, hook: ...",
    )
