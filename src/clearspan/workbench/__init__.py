"""The workbench: a page in the browser for one model, served on this machine alone (`clearspan[workbench]`)."""

import webbrowser
from collections.abc import Callable
from pathlib import Path

from clearspan.bridge import boot
from clearspan.workbench.server import Workbench

__all__ = ["Workbench", "open_workbench"]


def open_workbench(
    model: str,
    *,
    port: int = 0,
    folder: str | Path | None = None,
    browser: bool = True,
    tell: Callable[[str], None] = print,
) -> None:
    """Serves the workbench of a model until Ctrl-C.

    Args:
        model: The embedded model, a checkpoint folder, or a hub id.
        port: Of the server, on 127.0.0.1; 0 for a free one.
        folder: Where the session is kept; by default a folder of the user's for each model's weights.
        browser: Whether the page is opened in the browser.
        tell: Called with the address, once it can be opened, and the session's folder.

    Raises:
        ClearspanError: The model cannot be booted.
        OSError: The port is taken, or the folder cannot be written.
    """
    workbench = Workbench(boot(model), model, None if folder is None else Path(folder), port)
    tell(f"{workbench.address}\nsession: {workbench.session.folder}\nCtrl-C ends it; what is finished stays.")
    if browser:
        webbrowser.open(workbench.address)
    workbench.serve()
