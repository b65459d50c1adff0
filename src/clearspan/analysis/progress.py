"""How long work tells its caller how far it is; what is drawn of that is the caller's."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)` after each step of a stage."""


def silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""
