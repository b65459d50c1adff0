"""Handover: a function that hands out items while it runs is made into one that is asked for them, one by one."""

import contextlib
import contextvars
import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from clearspan.errors import InvalidArgumentError
from clearspan.interrupts import let_through
from clearspan.scopes import HERE, Scope

Item = TypeVar("Item")


class _Abandoned(BaseException):
    """Ends the function at the point where it handed out its last item."""


@dataclass(frozen=True)
class _Handed(Generic[Item]):
    """An item."""

    item: Item


@dataclass(frozen=True)
class _Ended:
    """The end of the items, and what the function raised, if it did."""

    error: BaseException | None


@dataclass(frozen=True)
class _Turn:
    """The function's turn, and what it is asked from."""

    scope: Scope | None = field(default_factory=HERE.get)


@dataclass(frozen=True)
class _Modes:
    """What torch keeps by thread and the function's numbers depend on, as it is where the handover is made."""

    grad: bool = field(default_factory=torch.is_grad_enabled)
    inference: bool = field(default_factory=torch.is_inference_mode_enabled)
    autocast: tuple[tuple[str, torch.dtype], ...] = field(
        default_factory=lambda: tuple(
            (device, torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda", "mps")
            if torch.is_autocast_enabled(device)
        )
    )
    stream: "torch.cuda.Stream | None" = field(
        default_factory=lambda: torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    )

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Sets them in this thread while the context is open."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for device, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype))
            if self.stream is not None:
                stack.enter_context(torch.cuda.stream(self.stream))
            yield


class Handover(Iterator[Item]):
    """Runs a function in a thread of its own, and only while the caller waits for an item.

    The two take turns, so that they may share what no two threads may use at a time. The function runs under the torch
    modes and context variables of the thread that made the handover.

    Args:
        function: Called with what hands an item out: `function(hand)`.

    Example:
        >>> def count(hand):
        ...     for number in range(3):
        ...         hand(number)
        >>> list(Handover(count))
        [0, 1, 2]
    """

    def __init__(self, function: Callable[[Callable[[Item], None]], None]) -> None:
        self._function = function
        self._turns: queue.SimpleQueue[_Turn | None] = queue.SimpleQueue()
        self._items: queue.SimpleQueue[_Handed[Item] | _Ended] = queue.SimpleQueue()
        self._modes = _Modes()
        self._is_over = False
        self._process = os.getpid()
        context = contextvars.copy_context()
        # A daemon, so that a handover left open does not keep the interpreter from ending.
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="clearspan-handover", daemon=True)

    def __next__(self) -> Item:
        """Has the function run until it hands an item out, and returns that.

        Raises:
            StopIteration: The function has returned.
            BaseException: What the function raised.
        """
        if self._is_over:
            raise StopIteration
        if self._process != os.getpid():
            raise InvalidArgumentError(
                "a stream goes on in another process than the one that it was made in",
                reason="a forked process has not the thread that generates",
                fix="make it in the process that reads it",
            )
        if self._thread.ident is None:
            self._thread.start()
        self._turns.put(_Turn())
        try:
            answer = let_through(self._items.get)
        except BaseException:  # an interrupt of the thread that waits: the other one must not run by itself
            self.close()
            raise
        if isinstance(answer, _Handed):
            return answer.item
        self._is_over = True
        if answer.error is None:
            raise StopIteration
        if isinstance(answer.error, StopIteration):
            raise RuntimeError("the function that hands out items raised StopIteration") from answer.error
        raise answer.error

    def close(self) -> None:
        """Ends the function where it is, or at the next item that it would hand out; returns when it has ended."""
        self._is_over = True
        if self._thread.ident is not None and self._process == os.getpid():
            self._turns.put(None)
            self._thread.join()

    def _run(self) -> None:
        try:
            self._wait()
            with self._modes():
                self._function(self._hand)
        except _Abandoned:
            return
        except BaseException as error:  # noqa: BLE001 - it is raised where the items are asked for
            self._items.put(_Ended(error))
        else:
            self._items.put(_Ended(None))

    def _hand(self, item: Item) -> None:
        self._items.put(_Handed(item))
        self._wait()

    def _wait(self) -> None:
        turn = self._turns.get()
        if turn is None:
            raise _Abandoned
        HERE.set(turn.scope)  # whoever asks, the function goes on inside of what it is asked from
