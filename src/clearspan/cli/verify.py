"""`clearspan verify`: whether every hook point of a model reads and writes as it should."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clearspan.cli.endings import FAILURE
from clearspan.cli.models import measured
from clearspan.cli.options import AsJson, Model, Verbose
from clearspan.cli.outputs import check_out, deliver, json_of

if TYPE_CHECKING:
    from clearspan.verification import Verification


def verify(
    model: Model,
    full: Annotated[bool, typer.Option("--full", help="Write in every layer, not in one of each kind.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the result: .json.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Check that every hook point of a model reads and writes as it should.

    On the model's own weights: nothing is left out, parity with the unbridged model, identities between points and
    weights, attention, writes, padding, gradients, generation, processing. Exits 1 if a check fails.
    """
    check_out(out, "verification", [".json"])
    found = measured(model, lambda bridge: bridge.verify("full" if full else "quick"), verbose=verbose)
    deliver({".json": lambda: json_of(found.to_dict())}, out, lambda: _show(found), as_json=as_json)
    if not found.passed:
        raise typer.Exit(FAILURE)


def _show(found: "Verification") -> None:
    from rich.console import Console

    from clearspan.view import show_verification

    show_verification(found, Console())
