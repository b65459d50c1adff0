"""`clearspan zoo`: a tiny model of each type that transformers has, verified."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clearspan.cli.endings import FAILURE, USAGE, fail, misused
from clearspan.cli.options import AsJson
from clearspan.cli.outputs import check_out, deliver, json_of

if TYPE_CHECKING:
    from clearspan.zoo import Zoo


def zoo(
    model_types: Annotated[
        list[str] | None, typer.Option("--type", "-t", help="A model type, once for each; by default all.")
    ] = None,
    level: Annotated[str, typer.Option("--level", help="How much is verified: quick or full.")] = "full",
    processes: Annotated[
        int | None, typer.Option("--processes", "-p", min=1, help="Processes; by default one for each CPU.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the result: .json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Verify a tiny random model of each type of model that transformers has.

    Each has a layer of every kind that its config can have. Nothing is downloaded. Exits 1 if a check fails that is not
    known to be transformers' own fault.
    """
    if level not in ("quick", "full"):
        misused(f"--level {level}", expected="quick or full")
    check_out(out, "zoo", [".json"])
    from clearspan.errors import ClearspanError
    from clearspan.zoo import check_all

    try:
        found = check_all(model_types or None, level, processes=processes)
    except ClearspanError as error:
        fail(error, USAGE)
    deliver({".json": lambda: json_of(found.to_dict())}, out, lambda: _show(found), as_json=as_json)
    if not found.passed:
        raise typer.Exit(FAILURE)


def _show(found: "Zoo") -> None:
    from rich.console import Console

    from clearspan.view import show_zoo

    show_zoo(found, Console())
