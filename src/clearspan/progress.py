"""Progress: how far long work is, as a bar on the terminal or told to a function."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from clearspan.errors import InvalidArgumentError

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)` after each step of a stage."""


def silent(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


@contextlib.contextmanager
def shown(progress: bool | Progress) -> Iterator[Progress]:
    """Yields the function that long work calls after each step.

    Args:
        progress: True shows a bar on standard error, which is gone at the end, and shows nothing where that is no
            terminal. False shows nothing. A function is called as `progress(stage, done, total)`.

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
    console = Console(stderr=True)
    if not (progress and console.is_terminal):
        yield silent
        return
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)
