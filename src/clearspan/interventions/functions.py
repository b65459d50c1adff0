"""Functions known by name, so that an intervention that calls one can be stored."""

from collections.abc import Callable

from torch import Tensor

from clearspan.checks import check_kind
from clearspan.errors import InvalidArgumentError
from clearspan.points import nearest

ValueFunction = Callable[[Tensor], Tensor]
"""From the part of a value that is chosen, the batch's axis first, to what takes its place."""

_FUNCTIONS: dict[str, ValueFunction] = {}


def register_function(name: str) -> Callable[[ValueFunction], ValueFunction]:
    """Returns a decorator that makes a function known under a name, for `Apply(name)`.

    A stored experiment holds the name alone: whoever runs it again registers the function first.

    Raises:
        InvalidArgumentError: Another function has the name.

    Example:
        >>> import torch
        >>> @register_function("flip sign")
        ... def flip(value):
        ...     return -value
        >>> function_named("flip sign")(torch.tensor([1.0]))
        tensor([-1.])
    """
    check_kind(str, name=name)

    def register(function: ValueFunction) -> ValueFunction:
        known = _FUNCTIONS.get(name)
        if known is not None and known.__qualname__ != function.__qualname__:
            raise InvalidArgumentError(
                f"the name {name!r} is taken", got=function.__qualname__, expected=known.__qualname__
            )
        _FUNCTIONS[name] = function
        return function

    return register


def function_named(name: str) -> ValueFunction:
    """Returns a registered function.

    Raises:
        InvalidArgumentError: None has the name.
    """
    if name not in _FUNCTIONS:
        raise InvalidArgumentError(
            f"no function is registered as {name!r}",
            nearest=nearest(name, _FUNCTIONS),
            fix=f"@clearspan.register_function({name!r}) above its definition",
        )
    return _FUNCTIONS[name]
