"""Whose turn it is: a model does one run at a time, whichever bridge, thread or context it is of.

A run owns its model, not the thread that does it: code that a run calls (hook functions, and what autograd's threads
call back) is inside of it, and goes on. Everything else waits, but for a bare `hf_model(...)`, to which a run is
invisible.
"""

import collections
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from clearspan.errors import ModelBusyError, UnwritableError
from clearspan.interrupts import are_held_off, held_off, let_through
from clearspan.modes import Modes
from clearspan.scopes import HERE, Scope, adopted, called_in, is_inside

if TYPE_CHECKING:
    from clearspan.hf.recording import Recording
    from clearspan.hf.taps import Taps
    from clearspan.points import HookPoint, Listener

Result = TypeVar("Result")

PATIENCE = 30.0
"""Seconds that a run waits while the one before it is inside a hook function, unless told otherwise."""


class Run(Scope):
    """One run, and what belongs to it alone.

    Attributes:
        owner: Whose it is: the passage of the taps that do it.
        batch: The whole sequence of the run, or a generation's prompt, as a `Batch`; None if it is not known.
        steps: Numbers of the forwards that come, where it is a generation; or None.
        recording: Where values are kept, or None.
        refuse_writes: Why a write must not happen, or None.
        writers: The listeners that have written, with their points.
    """

    def __init__(self, owner: object, batch: Any, steps: Iterator[int] | None) -> None:
        super().__init__()
        self.owner = owner
        self.batch = batch
        self.steps = steps
        self.recording: Recording | None = None
        self.refuse_writes: str | None = None
        self.writers: list[tuple[HookPoint, Listener]] = []

    def forget(self) -> None:
        """Lets go of everything, when it is over."""
        self.owner = self.batch = self.steps = self.recording = None
        self.writers.clear()


class Call(Scope):
    """The call of a hook function, or other code to which a model is the plain one: no listener, no cache sees it.

    Attributes:
        turns: The turns of the model.
        name: The hook point's name.
        since: When it began, by `time.monotonic`.
    """

    def __init__(self, turns: "Turns", name: str, outer: Scope | None = None) -> None:
        super().__init__(outer)
        self.turns = turns
        self.name = name
        self.since = time.monotonic()


class _Waiting:
    """Someone who waits: `released` is held until the turn is theirs."""

    def __init__(self, turn: Scope) -> None:
        self.turn = turn
        self.released = threading.Lock()
        self.released.acquire()


class Turns:
    """Whose turn it is on one model. All bridges to the model share one; `turns_of` gives it.

    Attributes:
        patience: Seconds that a run waits while the one before it is inside a hook function.
        opened: The stretches with hooks on the model that are open, in any context.
        taps: Those of all bridges to the model.
    """

    def __init__(self) -> None:
        self.patience = PATIENCE
        self.opened: list[Scope] = []
        self.taps: weakref.WeakSet[Taps] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._owner: Scope | None = None
        self._call: Call | None = None
        self._waiting: collections.deque[_Waiting] = collections.deque()

    # --- where this context is ---------------------------------------------------------------------------------------

    @property
    def is_away(self) -> bool:
        """Whether this context is inside a hook function, to which the model is the plain one."""
        here = HERE.get()
        while here is not None:
            if type(here) is Call and here.turns is self:
                return True
            here = here.outer
        return False

    @property
    def are_quiet(self) -> bool:
        """Whether this context is in a turn of its own, and no interrupt can come."""
        return self._owner is not None and is_inside(self._owner) and are_held_off()

    @property
    def are_a_run(self) -> bool:
        """Whether the turn under way is a run."""
        return isinstance(self._owner, Run)

    def present(self, owner: object) -> Run | None:
        """Returns the run of an owner under way in this context, or None; a hook function is inside its run."""
        here = HERE.get()
        if type(here) is Call and here.turns is self:
            here = here.outer
        return here if type(here) is Run and here.owner is owner else None

    def scope_of_graph(self) -> Scope | None:
        """Returns the scope to which a forward belongs that is made again in a thread of autograd's.

        That thread knows no context, so it is the one stretch with hooks that is open.

        Raises:
            UnwritableError: Several contexts have hooks on the model.
        """
        innermost = self.opened[-1] if self.opened else None
        here, around = innermost, set[Scope]()
        while here is not None:
            around.add(here)
            here = here.outer
        if not around.issuperset(self.opened):
            raise UnwritableError(
                "a forward is made again during backward, in a thread of autograd's",
                reason="several threads have hooks on the model, and the forward may be any of theirs",
                fix="one thread at a time for training with gradient checkpointing and hooks",
            )
        return innermost

    def call(self, name: str, outer: Scope | None, function: Callable[..., Result], *args: Any) -> Result:
        """Calls a hook function, to which the model is the plain one.

        Args:
            name: The hook point's name.
            outer: What it is called from; a backward hook is called from the run of its forward.
            function: The function.
            *args: Its arguments.
        """
        call = Call(self, name, outer)
        if self._owner is None or not call.is_within(self._owner):
            return called_in(call, lambda: let_through(function, *args))
        before = self._call
        try:
            self._call = call
            return called_in(call, lambda: let_through(function, *args))
        finally:
            self._call = before

    # --- taking turns ------------------------------------------------------------------------------------------------

    def taken(self, turn: Scope) -> "Taken":
        """While the context is open, this context alone works on the model; inside of a turn it works on.

        Interrupts wait for its end, but where `let_through` says that they need not. The modes of torch that an
        interrupt can leave behind are set back.

        Args:
            turn: What is to be done.

        Raises:
            ModelBusyError: Another thread's run is inside a hook function that does not return.
        """
        return Taken(self, turn)

    def changing(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which torch hooks come and go, while no run is under way but one that this is in."""
        return contextlib.nullcontext() if self.are_quiet else self.taken(Scope())

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """While the context is open, the model is the plain one here: no listener and no cache sees its forwards."""
        with self.taken(Scope()), adopted(Call(self, "")):
            yield

    def _take(self, turn: Scope) -> None:
        with self._lock:
            if self._owner is None:
                self._owner = turn
                return
            waiting = _Waiting(turn)
            self._waiting.append(waiting)
        started = time.monotonic()
        try:
            while not let_through(waiting.released.acquire, True, min(0.1, self.patience)):
                self._check(started)
        except BaseException:
            with self._lock:
                if waiting in self._waiting:
                    self._waiting.remove(waiting)
                    raise
            self._hand_on()  # it was given in the moment of the interrupt
            raise

    def _hand_on(self) -> None:
        with self._lock:
            if self._waiting:
                following = self._waiting.popleft()
                self._owner = following.turn
                following.released.release()
            else:
                self._owner = None
            self._call = None

    def _check(self, started: float) -> None:
        """Raises if the owner has been in one hook function for as long as a run may wait."""
        owner, call = self._owner, self._call
        if owner is None or call is None or time.monotonic() - max(started, call.since) < self.patience:
            return
        raise ModelBusyError(
            "a run waits for a hook function of another run on the same model",
            where=f"{call.name}, in thread {owner.thread.name!r}",
            got=f"a run in thread {threading.current_thread().name!r} that has waited for {self.patience:g} s",
            reason="runs on one model take turns, and perhaps that function itself waits for this run",
            fix="bridge(...) in the hook function's own thread, or a longer bridge.patience",
        )

    def after_fork(self) -> None:
        """In a forked process, forgets the threads that are not in it."""
        self._lock = threading.Lock()
        self._waiting.clear()
        if self._owner is not None and self._owner.thread is not threading.current_thread():
            self._owner = self._call = None


class Taken(held_off):
    """A turn on a model. A class of its own costs less than a generator, and every run takes one.

    Args:
        turns: The turns of the model.
        turn: What is to be done.
    """

    def __init__(self, turns: Turns, turn: Scope) -> None:
        self._turns = turns
        self._turn = turn

    def __enter__(self) -> None:
        super().__enter__()
        try:
            owner = self._turns._owner
            self._is_inner = owner is not None and is_inside(owner)
            if not self._is_inner:
                self._turns._take(self._turn)
        except BaseException as error:
            super().__exit__(type(error), error, error.__traceback__)
            raise
        self._outer, self._modes = HERE.get(), Modes()
        HERE.set(self._turn)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is not None:
                self._modes.set_back()
            self._turn.is_open = False
            HERE.set(self._outer)
            if not self._is_inner:
                self._turns._hand_on()
        finally:
            super().__exit__(kind, error, at)


_TURNS: "weakref.WeakKeyDictionary[nn.Module, Turns]" = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


def turns_of(model: nn.Module) -> Turns:
    """Returns the turns of a model."""
    with _MAKING:
        return _TURNS.setdefault(model, Turns())


def _after_fork() -> None:
    for turns in list(_TURNS.values()):
        turns.after_fork()


if hasattr(os, "register_at_fork"):  # where there is fork
    os.register_at_fork(after_in_child=_after_fork)
