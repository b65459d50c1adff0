"""Ctrl-C, held off where it would leave something half done.

Python delivers an interrupt between two instructions of the main thread, also in the middle of a clean-up. So a run
holds interrupts off from before it acquires anything until all is released, and lets them through only while the model
computes.
"""

import _signal  # pyright: ignore[reportMissingImports]
import threading
from collections.abc import Callable
from signal import SIGINT
from types import CodeType, FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

Result = TypeVar("Result")
Params = ParamSpec("Params")
_Handler = Callable[[int, FrameType | None], Any]
Function = TypeVar("Function", bound=Callable[..., Any])

# The functions of `signal` are wrappers that take ten times as long.
_handler_of, _set_handler = _signal.getsignal, _signal.signal


class _Interrupts:
    """What becomes of an interrupt. There is one, of the main thread.

    Attributes:
        depth: How many stretches of code keep the handler installed.
        are_let_through: Whether an interrupt is delivered at once, unless it falls into a clean-up.
        is_waiting: Whether one is to be delivered later.
        previous: The handler that was there before.
        own: The handler that is installed.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.are_let_through = True
        self.is_waiting = False
        self.previous: _Handler | None = None
        self.own: _Handler = self._arrive  # one object: a bound method is made anew each time

    def deliver(self, frame: FrameType | None = None) -> None:
        """Does what would have been done without this module: raises KeyboardInterrupt, as a rule."""
        self.is_waiting = False
        if self.previous is not None:
            self.previous(SIGINT, frame)

    def _arrive(self, _: int, frame: FrameType | None) -> None:
        if self.are_let_through and not _is_cleaning_up(frame):
            self.deliver(frame)
        else:
            self.is_waiting = True


_INTERRUPTS = _Interrupts()
_CLEAN_UPS: dict[CodeType, Callable[[Any], bool]] = {}


def clean_up(is_needed: Callable[[Any], bool]) -> Callable[[Function], Function]:
    """Marks a method in which an interrupt waits, from its first instruction on, for as long as there is need.

    That is so only while the handler is installed.

    Args:
        is_needed: Asked with the method's object.
    """

    def marked(function: Function) -> Function:
        _CLEAN_UPS[function.__code__] = is_needed
        return function

    return marked


def _is_cleaning_up(frame: FrameType | None) -> bool:
    """Whether the interrupted code is called by a clean-up, and by nothing nearer that lets interrupts through."""
    while frame is not None and frame.f_code is not let_through.__code__:
        is_needed = _CLEAN_UPS.get(frame.f_code)
        if is_needed is not None and is_needed(frame.f_locals["self"]):
            return True
        frame = frame.f_back
    return False


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


class held_off:  # noqa: N801 - used like a function
    """While the context is open, interrupts wait; the last one is delivered where the outermost context ends.

    In other threads than the main one it does nothing: interrupts do not reach them.
    """

    # An interrupt can come after each call, and nowhere else in these two methods. So what must be together is between
    # two calls, and the handler, once it is in place, waits for the end of both.

    @clean_up(lambda _: True)
    def __enter__(self) -> None:
        self._is_main = _is_main()
        if not self._is_main:
            return
        interrupts, current = _INTERRUPTS, _handler_of(SIGINT)
        if current is not interrupts.own and callable(current):
            interrupts.previous = current
            _set_handler(SIGINT, interrupts.own)
        self._before = interrupts.are_let_through
        interrupts.are_let_through = False
        interrupts.depth += 1

    @clean_up(lambda _: True)
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._is_main:
            return
        interrupts = _INTERRUPTS
        interrupts.depth -= 1
        interrupts.are_let_through = self._before
        # Somebody may have set another handler since.
        if not interrupts.depth and interrupts.previous is not None and _handler_of(SIGINT) is interrupts.own:
            _set_handler(SIGINT, interrupts.previous)
        if interrupts.is_waiting and interrupts.are_let_through:
            interrupts.deliver()


def let_through(function: Callable[Params, Result], *args: Params.args, **kwargs: Params.kwargs) -> Result:
    """Calls a function while interrupts are delivered, inside of a context that holds them off."""
    if not _INTERRUPTS.depth or not _is_main():
        return function(*args, **kwargs)
    interrupts = _INTERRUPTS
    before = interrupts.are_let_through
    try:
        interrupts.are_let_through = True
        if interrupts.is_waiting:
            interrupts.deliver()
        return function(*args, **kwargs)
    finally:
        interrupts.are_let_through = before


def are_held_off() -> bool:
    """Returns whether no interrupt can come in this thread."""
    return not _is_main() or bool(_INTERRUPTS.depth and not _INTERRUPTS.are_let_through)


def stay() -> None:
    """Keeps the handler installed until `leave`: for a context of the user's, whose clean-up is to be whole."""
    if _is_main():
        _INTERRUPTS.depth += 1


def leave() -> None:
    """Undoes one `stay`, inside of `held_off`."""
    if _is_main():
        _INTERRUPTS.depth -= 1
