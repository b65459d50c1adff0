"""`clearspan adapt`: an adapter for a model's class, written from the structure of the model."""

import contextlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clearspan.cli.endings import FAILURE, fail
from clearspan.cli.models import quiet
from clearspan.cli.options import Model, Verbose
from clearspan.cli.outputs import check_out, write

if TYPE_CHECKING:
    from clearspan.architectures import AdapterSource
    from clearspan.structure import Structure
    from clearspan.verification import Verification


def adapt(
    model: Model,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the adapter here; else it is printed.")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Derive one even if the class has an adapter.")] = False,
    verbose: Verbose = False,
) -> None:
    """Write an adapter for a model's class, from the structure of the model.

    What was found, and how it is known, goes to stderr, with the parts whose inside is not shown. The adapter that was
    written is verified on the model's own weights. Exits 1 if a check fails.
    """
    check_out(out, "adapter", [".py"])
    with contextlib.nullcontext() if verbose else quiet():
        structure, text, found = _adapted(model, anyway=anyway)
    typer.echo(structure.report(), err=True)
    for part in structure.unshown():
        typer.echo(f"not shown: {part}", err=True)
    typer.echo(_said_of(found), err=True)
    for check in found.failures:
        typer.echo(f"failed: {check.group}: {check.what}", err=True)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write({".py": lambda: text}, out)
    if not found.passed:
        raise typer.Exit(FAILURE)


def _adapted(model: str, *, anyway: bool) -> "tuple[Structure, str, Verification]":
    """Returns a model's structure, the text of its adapter, and what verifying that adapter found."""
    import clearspan
    from clearspan.errors import ClearspanError, DerivedWarning
    from clearspan.structure import Structure, adapter_of, derive, source

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DerivedWarning)
            bridge = clearspan.boot(model)
        known, hf_model = bridge.adapter.source, bridge.hf_model
        is_derived = isinstance(known, Structure)
        if not is_derived and not anyway:
            fail(_said_of_adapter(bridge.cfg.architecture, known), FAILURE)
        structure = known if is_derived else derive(hf_model)
        written = adapter_of(source(structure, hf_model))
        found = clearspan.boot(hf_model, adapter=written).verify("quick")
        return structure, source(structure, hf_model, checked=_said_of(found), replaces=not is_derived), found
    except ClearspanError as error:
        fail(error, FAILURE)


def _said_of_adapter(architecture: str, known: "AdapterSource") -> str:
    from clearspan.architectures import name_of

    where = f"\n  where: {known.__module__}" if isinstance(known, type) else ""
    return f"{architecture} has an adapter already: {name_of(known)}{where}\n  fix: --anyway derives one all the same"


def _said_of(found: "Verification") -> str:
    """Returns a sentence on what verifying found."""
    count = len(found.checks)
    if found.passed:
        return f"All {count} checks of `bridge.verify()` hold for it on this model."
    groups = ", ".join(dict.fromkeys(check.group for check in found.failures))
    return f"{len(found.failures)} of {count} checks of `bridge.verify()` fail for it on this model: {groups}."
