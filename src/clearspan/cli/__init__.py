"""The `clearspan` command: parses, calls the library, prints. A module for each command.

Whatever is heavy (torch, plotly, the library itself) is imported inside a command, so that help answers at once.
"""

from importlib.metadata import version as version_of
from typing import Annotated

import typer

from clearspan.cli import adapt, circuit, generate, heads, patch, report, verify, zoo
from clearspan.cli.open import open_workbench

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
    help="See through any Hugging Face transformer and reach into it.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"clearspan {version_of('clearspan')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """See through any Hugging Face transformer and reach into it."""


for _command in (
    report.report,
    heads.heads,
    patch.patch,
    circuit.circuit,
    generate.generate,
    verify.verify,
    adapt.adapt,
    zoo.zoo,
):
    app.command()(_command)
app.command("open")(open_workbench)
