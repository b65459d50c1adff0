"""Progress: how far long work is, as a bar on the terminal or in a notebook, or told to a function."""

import contextlib
import html
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from clearspan.errors import InvalidArgumentError

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)` after each step of a stage; the total is 0 where it is not known."""

T = TypeVar("T")
PAUSE = 0.1
"""Seconds between two pictures of a notebook's bar: each is a message to the browser."""


def silent(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


@contextlib.contextmanager
def shown(progress: bool | Progress) -> Iterator[Progress]:
    """Yields the function that long work calls after each step.

    Args:
        progress: True shows a bar in a notebook or on standard error, which is gone at the end, and shows nothing where
            that is no terminal. False shows nothing. A function is called as `progress(stage, done, total)`.

    Raises:
        InvalidArgumentError: It is none of these.

    Example:
        >>> with shown(print) as tell:
        ...     tell("training", 1, 2)
        training 1 2
    """
    if callable(progress):
        yield progress
        return
    if not isinstance(progress, bool):
        raise InvalidArgumentError(
            f"progress={progress!r} shows nothing",
            expected="True, False, or a function called as progress(stage, done, total)",
        )
    with _bar() if progress else contextlib.nullcontext(silent) as tell:
        yield tell


def told(tell: Progress, stage: str, parts: Iterable[T]) -> Iterator[T]:
    """Yields parts of the work, and tells after each how many are done.

    Example:
        >>> list(told(print, "runs", "ab"))
        runs 1 2
        runs 2 2
        ['a', 'b']
    """
    every = list(parts)
    for done, part in enumerate(every, start=1):
        yield part
        tell(stage, done, len(every))


def _bar() -> contextlib.AbstractContextManager[Progress]:
    """Returns the bar of where this runs: a notebook, a terminal, or neither."""
    kernel = sys.modules.get("ipykernel.zmqshell")
    if kernel is not None and kernel.ZMQInteractiveShell.initialized():
        return _in_notebook()
    from rich.console import Console

    console = Console(stderr=True)
    return _on_terminal(console) if console.is_terminal else contextlib.nullcontext(silent)


@contextlib.contextmanager
def _on_terminal(console: "Console") -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total or None)


@contextlib.contextmanager
def _in_notebook() -> Iterator[Progress]:
    """Yields a function that draws an HTML bar below the cell, where rich needs ipywidgets; it is empty at the end."""
    bar = _NotebookBar(sys.modules["IPython.display"])
    try:
        yield bar
    finally:
        bar.clear()


@dataclass
class _NotebookBar:
    """A bar in a cell's output.

    Attributes:
        display: The module `IPython.display`, which a kernel has loaded.
        handle: What redraws the output; None before the first step.
        drawn: When it was drawn last.
    """

    display: Any
    handle: Any = None
    drawn: float = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Draws the bar, but for steps that follow the one before at once."""
        now = time.monotonic()
        if now - self.drawn >= PAUSE or done == total:
            size = f' value="{done}" max="{total}"' if total else ""
            count = f"{done}/{total}" if total else str(done)
            text = f"{stage} {count}"
            self._draw({"text/plain": text, "text/html": f"<progress{size}></progress> {html.escape(text)}"})
            self.drawn = now

    def clear(self) -> None:
        """Empties the output."""
        if self.handle is not None:
            self._draw({"text/plain": ""})

    def _draw(self, shown: dict[str, str]) -> None:
        if self.handle is None:
            self.handle = self.display.display(shown, raw=True, display_id=True)
        else:
            self.handle.update(shown, raw=True)
