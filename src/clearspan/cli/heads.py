"""`clearspan heads`: what kind of attention each head pays."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clearspan.cli.inputs import read_if_given
from clearspan.cli.models import measured
from clearspan.cli.options import AsJson, File, Full, Model, Text, Tokens, Verbose
from clearspan.cli.outputs import check_out, csv_of, deliver, json_of, page

if TYPE_CHECKING:
    from clearspan import TransformerBridge
    from clearspan.effects import Effects


def heads(
    model: Model,
    text: Text = None,
    file: File = None,
    tokens: Tokens = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many heads of each kind are shown.")] = 10,
    full: Full = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write all scores: .json, .csv, or .html as coloured tables.")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show which heads attend to previous tokens, to duplicates, or by induction.

    On a text, scores are the share of a head's attention that is on the pattern. Without one, they are measured on
    random tokens that are repeated, where nothing but the repetition can be predicted.

    Example: `clearspan heads tiny-bigcode --top 3`
    """
    given = read_if_given(text, file, tokens)
    check_out(out, "heads", [".json", ".csv", ".html"])
    found = measured(model, lambda bridge: _scores(bridge, given), verbose=verbose)
    forms = {
        ".json": lambda: json_of(found.to_json()),
        ".csv": lambda: csv_of(found),
        ".html": lambda: page(found.title, "".join(found.to_html(score) for score in found.values)),
    }
    deliver(forms, out, lambda: _show(found, top, full), as_json=as_json)


def _show(found: "Effects", top: int, full: bool) -> None:
    from rich.console import Console

    from clearspan.view import show_head_scores

    show_head_scores(found, Console(), top=top, full=full)


def _scores(bridge: "TransformerBridge", given: str | list[int] | None) -> "Effects":
    """Returns scores on random tokens, or on a text by every pattern that has a name."""
    from clearspan.analysis import detect_heads, head_scores
    from clearspan.analysis.heads import PATTERNS
    from clearspan.effects import Effects

    if given is None:
        what = "each head on repeated random tokens, in attention from 0 to 1"
        return replace(head_scores(bridge), what=what)
    found = {name: detect_heads(bridge, given, name) for name in PATTERNS}
    first = next(iter(found.values()))
    what = "share of each head's attention on the pattern, from 0 to 1"
    return Effects({name: one.of() for name, one in found.items()}, first.axes, what=what, span=(0, 1), row="text")
