"""`clearspan open`: a model looked into in the browser."""

from pathlib import Path
from typing import Annotated

import typer

from clearspan.cli.endings import FAILURE, code_of, fail
from clearspan.cli.options import Model


def open_workbench(
    model: Model,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="By default a free one.")] = 0,
    session: Annotated[
        Path | None, typer.Option("--session", help="Where answers are kept; by default a folder for each model.")
    ] = None,
) -> None:
    """Look into a model in the browser: lens, attention, attribution, patching, generation.

    The page is served on this machine alone. What was finished stays in the session's folder.

    Example: `clearspan open tiny-bigcode`
    """
    from clearspan.errors import ClearspanError

    try:
        from clearspan import workbench
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed\n  fix: pip install 'clearspan[workbench]'", FAILURE)
    try:
        workbench.open_workbench(model, port=port, folder=session, browser=browser, tell=typer.echo)
    except ClearspanError as error:
        fail(error, code_of(error))
    except OSError as error:
        fail(error, FAILURE)
