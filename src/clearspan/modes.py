"""Torch's modes in this thread, changed so that an interrupt leaves them as they were, at whatever instant it comes.

The end of `with torch.no_grad():` is several instructions long, and an interrupt between them would leave gradients
off for the rest of the program.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

_C: Any = torch._C
Params = ParamSpec("Params")
Result = TypeVar("Result")


def with_gradients(
    are_on: bool, function: Callable[Params, Result], *args: Params.args, **kwargs: Params.kwargs
) -> Result:
    """Calls a function with gradients on, or off."""
    before = torch.is_grad_enabled()
    try:
        torch._C._set_grad_enabled(are_on)
        return function(*args, **kwargs)
    finally:
        torch._C._set_grad_enabled(before)  # one call, before which no interrupt can come


def is_autocast_on() -> bool:
    """Returns whether autocast is on for any device."""
    return torch._C._is_any_autocast_enabled()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Returns what autocast computes in on a device now, or None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind in _AUTOCAST and torch.is_autocast_enabled(kind) else None


def with_autocast(dtype: torch.dtype | None, device: torch.device, function: Callable[[], Result]) -> Result:
    """Calls a function as autocast to a dtype would have it on a device and on the CPU, or without autocast (None)."""
    kinds = [kind for kind in ("cpu", device.type) if kind in _AUTOCAST]
    if dtype is None and not any(map(torch.is_autocast_enabled, kinds)):
        return function()
    before = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
    caches = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)  # casts of weights are kept to the end of a context, and here is none
        for kind in kinds:
            torch.set_autocast_enabled(kind, dtype is not None)
            if dtype is not None:
                torch.set_autocast_dtype(kind, dtype)
        return function()
    finally:
        for kind, (was_on, was) in before.items():
            torch.set_autocast_enabled(kind, was_on)
            torch.set_autocast_dtype(kind, was)
        torch.set_autocast_cache_enabled(caches)


_AUTOCAST = ("cpu", "cuda", "mps")
"""Kinds of device that autocast is known on."""


def no_grad(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Returns a function that computes without gradients."""

    @functools.wraps(function)
    def without(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        return with_gradients(False, function, *args, **kwargs)

    return without


@contextlib.contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """Has random numbers that are drawn while the context is open, on the CPU and on a device, drawn again after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def uncompiled(function: Callable[Params, Result], *args: Params.args, **kwargs: Params.kwargs) -> Result:
    """Calls a function as it is, also within code under `torch.compile`."""
    # Importing the compiler takes a second, and without it nothing is compiled.
    if "torch._dynamo" not in sys.modules or _C._dynamo.eval_frame.get_eval_frame_callback() is None:
        return function(*args, **kwargs)
    if not _UNCOMPILED:
        _UNCOMPILED.append(torch._dynamo.disable(_called))
    return _UNCOMPILED[0](function, *args, **kwargs)


def eager(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Returns a function that runs as it is also where it is called from code under `torch.compile`.

    Compiled code would call hooks or not as it did when it was compiled. With `fullgraph=True` torch raises.
    """

    @functools.wraps(function)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        return uncompiled(function, *args, **kwargs)

    return closed_to_compiler(run)


def closed_to_compiler(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Marks a function into which the compiler does not go. What it calls by `uncompiled` is not compiled either."""
    # What the compiler asks of a function before it goes into it.
    for name, value in {"_torchdynamo_disable": True, "_torchdynamo_disable_msg": _WHY}.items():
        setattr(function, name, value)
    return function


def _called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


_UNCOMPILED: list[Callable[..., Any]] = []
_WHY = "clearspan runs a model as it is, with its hooks"


class Modes:
    """The modes that an interrupted forward can leave behind, as they are when it begins."""

    __slots__ = ("_functions", "_gradients")

    def __init__(self) -> None:
        count = torch._C._len_torch_function_stack()
        self._functions = [torch._C._get_function_stack_at(index) for index in range(count)] if count else []
        self._gradients = torch.is_grad_enabled()

    def set_back(self) -> None:
        """Makes them what they were."""
        while torch._C._len_torch_function_stack():
            torch._C._pop_torch_function_stack()
        for mode in self._functions:
            torch._C._push_on_torch_function_stack(mode)
        torch._C._set_grad_enabled(self._gradients)
