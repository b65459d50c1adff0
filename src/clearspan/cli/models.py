"""A model, booted for one command: quietly, and with the library's errors as messages."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import typer

from clearspan.cli.endings import FAILURE, code_of, fail
from clearspan.errors import ClearspanError, NoTokenizerError

if TYPE_CHECKING:
    from clearspan import TransformerBridge

Found = TypeVar("Found")


def measured(model: str, measure: "Callable[[TransformerBridge], Found]", *, verbose: bool = False) -> Found:
    """Returns what is measured of a model; ends the command where that cannot be."""
    with contextlib.nullcontext() if verbose else quiet():
        bridge = _booted(model)
        try:
            return measure(bridge)
        except NoTokenizerError as error:
            fail(f"{error}\n  or: --tokens 5,3,9, with token ids in place of text", FAILURE)
        except ClearspanError as error:
            fail(error, code_of(error))


def _booted(model: str) -> "TransformerBridge":
    from rich.console import Console
    from rich.text import Text

    import clearspan

    try:
        with Console(stderr=True).status(Text(f"loading {model}")):
            return clearspan.boot(model)
    except ClearspanError as error:
        fail(error, FAILURE)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what other libraries say off the terminal; this one's warnings are messages like its errors."""
    from clearspan.hf.logs import silenced

    with silenced(), warnings.catch_warnings():
        warnings.showwarning = _tell
        yield


def _tell(message: Warning | str, category: type[Warning], *_: object) -> None:
    if category.__module__.startswith("clearspan."):
        typer.secho("warning: ", fg="yellow", bold=True, nl=False, err=True)
        typer.echo(message, err=True)
