"""What transformers says while it works: progress bars, a report of what it loaded, and lines of log."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps progress bars of transformers, and lines of log below an error, off the terminal while the context is open.

    It acts on the whole process, which is for a command to do, and not for a library.
    """
    from transformers.utils import logging as own

    shows_bars, level = own.is_progress_bar_enabled(), logging.root.manager.disable
    own.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
        if shows_bars:
            own.enable_progress_bar()
