"""`clearspan report`: what a model does with one text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clearspan.cli.endings import misused
from clearspan.cli.inputs import names, one_of, read
from clearspan.cli.models import measured
from clearspan.cli.options import MODEL, AsJson, File, Full, Text, Tokens, Verbose, utf8
from clearspan.cli.outputs import check_out, csv_of, deliver, json_of

if TYPE_CHECKING:
    from clearspan.analysis import Report
    from clearspan.view.terminal import Part

_DATA = {"predictions": "tokens", "lens": "logit_lens", "heads": "head_scores", "effect": "causal_effect"}
"""By the name of a part, what it is called in the JSON."""


def report(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=MODEL + " By default tiny-bigcode.", show_default=False)
    ] = None,
    text: Text = None,
    model_option: Annotated[str | None, typer.Option("--model", "-m", help="The same as MODEL.")] = None,
    text_option: Annotated[str | None, typer.Option("--text", "-t", callback=utf8, help="The same as TEXT.")] = None,
    file: File = None,
    tokens: Tokens = None,
    position: Annotated[
        int, typer.Option("--position", "-p", help="Explain the prediction after this position; negative from the end.")
    ] = -1,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", callback=utf8, help="Explain this token there, and not the likeliest; with its space."
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", help="Some of predictions, lens, heads and effect, as lens,heads.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many rows each table shows.")] = 8,
    full: Full = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write a page (.html), all numbers (.json), or with --only one table (.csv)."),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show what a model does with a text, or with token ids.

    The tokens that it least expected, where its logit lens settles, its strongest attention heads and the causes of
    its last prediction, on one screen; with --full at every position and layer, and with --out as an interactive page
    that opens without a network.

    Example: `clearspan report tiny-bigcode "import os" --top 5`
    """
    if model_option is not None and text is None:
        model, text = None, model
    name = one_of("model", model, model_option) or "tiny-bigcode"
    given = read(one_of("text", text, text_option), file, tokens)
    parts = _parts(only)
    _check_out(out, parts)
    from clearspan import analysis

    found = measured(
        name, lambda bridge: analysis.report(bridge, given, position=position, target=target), verbose=verbose
    )
    data = {key: value for key, value in found.to_dict().items() if only is None or key in _kept(parts)}
    forms = {".html": lambda: _page(found), ".json": lambda: json_of(data), ".csv": lambda: _table(found, parts[0])}
    deliver(forms, out, lambda: _show(found, parts, top, full), as_json=as_json)


def _show(found: "Report", parts: "list[Part]", top: int, full: bool) -> None:
    from rich.console import Console

    from clearspan.view import show

    show(found, Console(), parts=parts, top=top, full=full)


def _check_out(out: Path | None, parts: "list[Part]") -> None:
    check_out(out, "report", [".html", ".json", ".csv"])
    suffix = "" if out is None else out.suffix.lower()
    if suffix == ".csv" and len(parts) > 1:
        misused("a report is several tables, and .csv has one", fix="--only lens, or another part")


def _parts(only: str | None) -> "list[Part]":
    from clearspan.points import nearest
    from clearspan.view import PARTS

    if only is None:
        return list(PARTS)
    known: dict[str, Part] = {part: part for part in PARTS}
    for name in (asked := names(only)):
        if name not in known:
            misused(
                f"--only {only}: a report has no part {name!r}", expected=", ".join(PARTS), nearest=nearest(name, PARTS)
            )
    if not asked:
        misused("--only names no part", expected=", ".join(PARTS))
    return [known[name] for name in asked]


def _kept(parts: "list[Part]") -> set[str]:
    return {"model", "text", *(_DATA[part] for part in parts)}


def _page(found: "Report") -> str:
    from clearspan.view import html_page

    return html_page(found)


def _table(found: "Report", part: "Part") -> str:
    tables = {"predictions": found.predictions, "lens": found.lens, "heads": found.heads, "effect": found.effect}
    return csv_of(tables[part])
