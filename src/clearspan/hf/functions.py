"""Calls of the functions that a module's forward calls: what they are given and return goes past visitors.

The forward runs as a copy of itself, whose globals have this library's stand-ins under the functions' names. Only the
call under way uses that copy: no other module, no other thread, and nothing after it.
"""

import contextlib
import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from clearspan.errors import NotSeenError
from clearspan.hf.function_call import FunctionCall
from clearspan.hf.recurrence import visited
from clearspan.points import Function, Passed, Role

Visit = Callable[[Tensor], Tensor]


def names_called(kind: type[nn.Module]) -> frozenset[str]:
    """Returns the names that the code of a kind of module's forward uses, of functions and of attributes."""
    return frozenset(inspect.unwrap(kind.forward).__code__.co_names)


class Diversion:
    """One call of a module's forward, in which functions that it calls go past visitors.

    Args:
        module: The module.
        forward: Its forward.
        visits: The visitors by what they see.
        is_paused: Asked at each call of a function: True where it is not the module's own.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        visits: Mapping[Passed, Visit],
        is_paused: Callable[[], bool],
    ) -> None:
        self._module = module
        self._forward = forward
        self._visits = visits
        self._is_paused = is_paused
        self._roles = list(dict.fromkeys(side.role for side in visits))
        self._length: int | None = None
        self._calls = dict.fromkeys(self._roles, 0)
        self._global_names = inspect.unwrap(type(module).forward).__globals__

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward.

        Raises:
            NotSeenError: It did not call each function once.
        """
        first = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
        self._length = None if first is None or first.ndim < 2 else first.shape[1]
        names = names_called(type(self._module))
        replaced: dict[str, Callable[..., Any]] = {}
        whole: tuple[Role, Function] | None = None
        for role in self._roles:
            for function in role.functions:
                if function.name == "forward":
                    whole = role, function
                elif function.name in names:
                    replaced[function.name] = functools.partial(self._called, role, function)
            replaced |= {name: _answered_with_none for name in role.fused if name in names}
        if whole is not None:
            return self._called(*whole, self._forward, *args, **kwargs)
        methods = {name for name in replaced if name not in self._global_names}
        with _methods(self._module, {name: replaced.pop(name) for name in methods}):
            output = rebound(self._forward, replaced)(*args, **kwargs)
        for role, calls in self._calls.items():
            if calls != 1:
                raise self._not_seen(role, f"{calls} calls")
        return output

    def _called(self, role: Role, function: Function, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answers a call of a function as the visitors have it."""
        if self._is_paused():
            return original(*args, **kwargs)
        self._calls[role] += 1
        if self._calls[role] > 1:
            raise self._not_seen(role, "another call in the same forward")
        call = FunctionCall.of(role, function, original, args, kwargs, self._length)
        visits = {side.value: visit for side, visit in self._visits.items() if side.role is role}
        return visited(call, visits, self._recurrent(role))

    def _recurrent(self, role: Role) -> Callable[..., Any] | None:
        """Returns the function of a role that takes single tokens, where the module's code knows one."""
        return self._global_names.get(role.recurrent.name)

    def _not_seen(self, role: Role, got: str) -> NotSeenError:
        functions = " or ".join(function.name for function in role.functions)
        return NotSeenError(
            f"what this mixer does in its {role.name} cannot be reached here",
            expected=f"one call of {functions} in a forward",
            got=got,
            where=type(self._module).__name__,
        )


def _answered_with_none(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    pass


def rebound(function: Callable[..., Any], replaced: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Returns a copy of a function whose globals have stand-ins under some names; the function stays as it is.

    Args:
        function: A function, one in decorators of `functools.wraps`, or a part of one.
        replaced: Stand-ins by name. Each is called with what the name stands for, and the call's arguments.

    Raises:
        NotSeenError: Something that is no Python function is in the way.
    """
    if not replaced:
        return function
    match function:
        case functools.partial():
            return functools.partial(rebound(function.func, replaced), *function.args, **function.keywords)
        case types.MethodType():
            return types.MethodType(rebound(function.__func__, replaced), function.__self__)
        case types.FunctionType():
            return _copied(function, replaced)
    raise NotSeenError(
        "the functions that a module's forward calls cannot be reached here",
        expected="a forward that is a Python function",
        got=type(function).__name__,
    )


def _copied(function: types.FunctionType, replaced: Mapping[str, Callable[..., Any]]) -> types.FunctionType:
    around = vars(function).get("__wrapped__")
    closure, names = function.__closure__, function.__globals__
    if around is None:
        names = {**names, **{name: functools.partial(stand_in, names[name]) for name, stand_in in replaced.items()}}
    else:
        cells = closure or ()
        if not any(cell.cell_contents is around for cell in cells):
            raise NotSeenError(
                "the functions that a module's forward calls cannot be reached here",
                expected="decorators that call the forward itself",
                got=f"{function.__qualname__}, which calls something else",
            )
        inner = rebound(around, replaced)
        closure = tuple(types.CellType(inner) if cell.cell_contents is around else cell for cell in cells)
    copied = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


@contextlib.contextmanager
def _methods(module: nn.Module, replaced: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """While the context is open, a module's methods go to stand-ins, in calls of this thread alone."""
    own, here = vars(module), threading.get_ident()

    def diverted(stand_in: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return stand_in(original, *args, **kwargs) if threading.get_ident() == here else original(*args, **kwargs)

        return call

    try:
        for name, stand_in in replaced.items():
            own[name] = diverted(stand_in, types.MethodType(getattr(type(module), name), module))
        yield
    finally:
        for name in replaced:
            own.pop(name, None)
