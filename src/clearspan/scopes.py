"""What the code of one context (`contextvars`) is inside of: stretches with hooks, runs, calls of hook functions."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

Result = TypeVar("Result")


class Scope:
    """A stretch of code in one context.

    Attributes:
        outer: The scope around it, or None.
        is_open: Whether it has not ended.
        thread: The thread that opened it.
    """

    def __init__(self, outer: "Scope | None" = None) -> None:
        self.outer = HERE.get() if outer is None else outer
        self.is_open = True
        self.thread = threading.current_thread()

    def is_within(self, scope: "Scope") -> bool:
        """Returns whether it is, or is inside of, a scope that has not ended."""
        here: Scope | None = self
        while here is not None:
            if here is scope:
                return scope.is_open
            here = here.outer
        return False

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is going on in another context."""
        return self.is_open and self.thread.is_alive() and not is_inside(self)


HERE: ContextVar[Scope | None] = ContextVar("clearspan", default=None)
"""The innermost scope of the present context."""


def is_inside(scope: Scope) -> bool:
    """Returns whether the present context is inside of a scope."""
    here = HERE.get()
    return here is not None and here.is_within(scope)


def is_foreign() -> bool:
    """Returns whether the present thread is none of Python's making, such as one of autograd's: it knows no scope."""
    return isinstance(threading.current_thread(), threading._DummyThread)


def end(scope: Scope) -> None:
    """Ends a scope. Others may have been opened in it, and still go on."""
    scope.is_open = False
    here = HERE.get()
    while here is not None and not here.is_open:
        here = here.outer
    HERE.set(here)


def called_in(scope: Scope | None, function: Callable[..., Result], *args: Any) -> Result:
    """Calls a function inside of a scope."""
    before = HERE.get()
    try:
        HERE.set(scope)
        return function(*args)
    finally:
        HERE.set(before)  # One call and nothing else: no interrupt can come before it.


@contextlib.contextmanager
def adopted(scope: Scope | None) -> Iterator[None]:
    """While the context is open, code of another thread is inside of a scope."""
    before = HERE.get()
    try:
        HERE.set(scope)
        yield
    finally:
        HERE.set(before)
