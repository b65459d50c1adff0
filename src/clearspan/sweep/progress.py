"""A bar that shows how far a sweep is."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress


@contextlib.contextmanager
def progress_bar(what: str, total: int, *, is_shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how many more are done; the bar is on the terminal, and gone at the end.

    Where standard error is no terminal, nothing is shown.
    """
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (is_shown and console.is_terminal)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)
