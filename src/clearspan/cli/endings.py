"""How a command ends that cannot do what was asked: a message on standard error, and a code that says whose fault."""

from collections.abc import Sequence
from typing import NoReturn

import typer

from clearspan.errors import InvalidArgumentError, UnknownPointError

USAGE, FAILURE = 2, 1
"""The codes of wrong use, and of all else that fails."""


def fail(message: object, code: int) -> NoReturn:
    """Ends the command with a message on standard error."""
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(message, err=True)
    raise typer.Exit(code)


def misused(
    what: str,
    *,
    expected: str | None = None,
    got: str | None = None,
    nearest: Sequence[str] = (),
    fix: str | None = None,
) -> NoReturn:
    """Ends the command because it was used wrongly, with the facts of a library's error."""
    fail(InvalidArgumentError(what, expected=expected, got=got, nearest=nearest, fix=fix), USAGE)


def code_of(error: Exception) -> int:
    """Returns the code of a library's error: a name or a value that is wrong is wrong use."""
    return USAGE if isinstance(error, InvalidArgumentError | UnknownPointError) else FAILURE
