"""The `clearspan` command: parses, calls the library, prints.

Whatever is heavy (torch, plotly, the library itself) is imported inside a command, so that help answers at once.
"""

import json
from collections.abc import Callable
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer

if TYPE_CHECKING:
    from clearspan import TransformerBridge
    from clearspan.analysis import Report
    from clearspan.architectures import AdapterSource
    from clearspan.structure import Structure
    from clearspan.verification import Verification

Found = TypeVar("Found")
USAGE, FAILURE = 2, 1

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
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


@app.command()
def report(
    model: Annotated[
        str, typer.Option("--model", "-m", help="The embedded model, a checkpoint folder, or a hub id.")
    ] = "tiny-bigcode",
    text: Annotated[str | None, typer.Option("--text", "-t", help="The text to read.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A UTF-8 file to read instead.")] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Token ids to read instead, as 5,3,9: no tokenizer is needed.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write one self-contained HTML page here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Show what a model does with a text, or with token ids.

    Predictions, logit lens, attention heads and causal effects: in the terminal,
    and with --out as an interactive page that opens without a network.
    """
    read = _read(text, file, tokens)
    _check_out(out, "report.html")
    from clearspan import analysis

    found = _measured(model, lambda bridge: analysis.report(bridge, read))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), allow_nan=False))
    else:
        from rich.console import Console

        from clearspan.view import show

        show(found, Console())
    if out is not None:
        _write(found, out)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="The embedded model, a checkpoint folder, or a hub id.")],
    full: Annotated[bool, typer.Option("--full", help="Write in every layer, not in one of each kind.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Check that every hook point of a model reads and writes as it should.

    On the model's own weights: nothing is left out, parity with the unbridged model,
    identities between points and weights, attention, writes, padding, gradients,
    generation, processing. Exits 1 if a check fails.
    """
    found = _measured(model, lambda bridge: bridge.verify("full" if full else "quick"))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), allow_nan=False))
    else:
        from rich.console import Console

        from clearspan.view import show_verification

        show_verification(found, Console())
    if not found.passed:
        raise typer.Exit(FAILURE)


@app.command()
def adapt(
    model: Annotated[str, typer.Argument(help="The embedded model, a checkpoint folder, or a hub id.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the adapter here; else it is printed.")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Derive one even if the class has an adapter.")] = False,
) -> None:
    """Write an adapter for a model's class, from the structure of the model.

    What was found, and how it is known, goes to stderr, with the parts whose inside
    is not shown. The adapter that was written is verified on the model's own weights. Exits 1 if a check fails.
    """
    _check_out(out, "adapter.py")
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
        _write_bytes(text.encode("utf-8"), out)
        typer.echo(f"wrote {out}", err=True)
    if not found.passed:
        raise typer.Exit(FAILURE)


@app.command()
def zoo(
    model_types: Annotated[
        list[str] | None, typer.Option("--type", "-t", help="A model type, once for each; by default all.")
    ] = None,
    level: Annotated[str, typer.Option("--level", help="How much is verified: quick or full.")] = "full",
    processes: Annotated[
        int | None, typer.Option("--processes", "-p", min=1, help="Processes; by default one for each CPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Verify a tiny random model of each type of model that transformers has.

    Each has a layer of every kind that its config can have. Nothing is downloaded.
    Exits 1 if a check fails that is not known to be transformers' own fault.
    """
    if level not in ("quick", "full"):
        _fail(f"--level {level}: give quick or full", USAGE)
    from clearspan.errors import ClearspanError
    from clearspan.zoo import check_all

    try:
        found = check_all(model_types or None, level, processes=processes)
    except ClearspanError as error:
        _fail(str(error), USAGE)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), allow_nan=False))
    else:
        from rich.console import Console

        from clearspan.view import show_zoo

        show_zoo(found, Console())
    if not found.passed:
        raise typer.Exit(FAILURE)


@app.command("open")
def open_page(
    model: Annotated[str, typer.Argument(help="The embedded model, a checkpoint folder, or a hub id.")],
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="By default a free one.")] = 0,
    session: Annotated[
        Path | None, typer.Option("--session", help="Where answers are kept; by default a folder for each model.")
    ] = None,
) -> None:
    """Look into a model in the browser: lens, attention, attribution, patching, generation.

    The page is served on this machine alone. What was finished stays in the session's folder.
    """
    from clearspan.errors import ClearspanError

    try:
        from clearspan.workbench import open_workbench
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed\n  fix: pip install 'clearspan[workbench]'", FAILURE)
    try:
        open_workbench(model, port=port, folder=session, browser=browser, tell=typer.echo)
    except (ClearspanError, OSError) as error:
        _fail(str(error), FAILURE)


def _adapted(model: str, *, anyway: bool) -> "tuple[Structure, str, Verification]":
    """Returns a model's structure, the text of its adapter, and what verifying that adapter found."""
    import warnings

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
            _fail(_said_of_adapter(bridge.cfg.architecture, known), FAILURE)
        structure = known if is_derived else derive(hf_model)
        written = adapter_of(source(structure, hf_model))
        found = clearspan.boot(hf_model, adapter=written).verify("quick")
        return structure, source(structure, hf_model, checked=_said_of(found), replaces=not is_derived), found
    except ClearspanError as error:
        _fail(str(error), FAILURE)


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


def _check_out(out: Path | None, example: str) -> None:
    """Ends the command where a file cannot be written."""
    if out is not None and not out.parent.is_dir():
        _fail(f"--out {out}: there is no folder {out.parent}", USAGE)
    if out is not None and out.is_dir():
        _fail(f"--out {out} is a folder; name a file, for instance {out / example}", USAGE)


def _read(text: str | None, file: Path | None, tokens: str | None) -> str | list[int]:
    """Returns the text, or the token ids, of whichever of the options was given."""
    if sum(given is not None for given in (text, file, tokens)) != 1:
        _fail("give one of --text, --file and --tokens", USAGE)
    if tokens is not None:
        return _ids(tokens)
    text = text if file is None else _decoded(file)
    assert text is not None, "one of the three is given"
    if not text:
        _fail("the text is empty" if file is None else f"{file} is empty", USAGE)
    return text


def _ids(tokens: str) -> list[int]:
    """Returns the token ids of a list with commas or spaces between them."""
    parts = tokens.replace(",", " ").split()
    if not parts or not all(part.isascii() and part.isdigit() for part in parts):
        _fail(f"--tokens {tokens!r}: give token ids, as 5,3,9", USAGE)
    return [int(part) for part in parts]


def _decoded(file: Path) -> str:
    """Returns a file's text as it is, line endings included."""
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        _fail(f"cannot read {file}: {(error.strerror or str(error)).lower()}", USAGE)
    except UnicodeDecodeError as error:
        _fail(f"cannot read {file}: not UTF-8 text (byte {error.start})", USAGE)


def _measured(model: str, measure: "Callable[[TransformerBridge], Found]") -> Found:
    """Returns what is measured of a model; ends the command where that cannot be."""
    import clearspan
    from clearspan.errors import ClearspanError, NoTokenizerError

    try:
        return measure(clearspan.boot(model))
    except NoTokenizerError as error:
        _fail(f"{error}\n  or: --tokens 5,3,9, with token ids in place of text", FAILURE)
    except ClearspanError as error:
        _fail(str(error), FAILURE)


def _write(found: "Report", out: Path) -> None:
    from clearspan.view import html_page

    page = html_page(found).encode("utf-8")
    _write_bytes(page, out)
    typer.echo(f"wrote {out} ({len(page) / 1e6:z.1f} MB)", err=True)


def _write_bytes(content: bytes, out: Path) -> None:
    try:
        out.write_bytes(content)
    except OSError as error:
        _fail(f"cannot write {out}: {(error.strerror or str(error)).lower()}", FAILURE)


def _fail(message: str, code: int) -> NoReturn:
    """Ends the command with a message on stderr."""
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(message, err=True)
    raise typer.Exit(code)
