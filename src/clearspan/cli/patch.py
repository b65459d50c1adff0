"""`clearspan patch`: activation patching between two prompts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clearspan.cli.inputs import both_answers, names, numbers
from clearspan.cli.models import measured
from clearspan.cli.options import Answers, AsJson, Clean, Corrupted, Full, Model, Verbose
from clearspan.cli.outputs import check_out, csv_of, deliver, json_of, page

if TYPE_CHECKING:
    from clearspan import TransformerBridge
    from clearspan.effects import Draws, Effects


def patch(
    model: Model,
    clean: Clean,
    corrupted: Corrupted,
    answers: Answers,
    points: Annotated[
        str, typer.Option("--points", help="Short names of hook points: resid_pre, attn_out, mlp_out, z, q, ...")
    ] = "resid_pre",
    by: Annotated[
        str, typer.Option("--by", help="What a cell is: one place on each of these axes, as layer,head.")
    ] = "layer,position",
    layers: Annotated[str | None, typer.Option("--layers", help="Which, as 0-3,5,-1; by default all.")] = None,
    positions: Annotated[str | None, typer.Option("--positions", help="Which; by default all.")] = None,
    heads: Annotated[str | None, typer.Option("--heads", help="Which, with --by layer,head; by default all.")] = None,
    noising: Annotated[
        bool, typer.Option("--noising", help="Put corrupted values into the clean run, and not the reverse.")
    ] = False,
    full: Full = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write all numbers: .json, .csv, or .html as a coloured table.")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    r"""Patch activations of the clean run into the corrupted one, cell by cell.

    The table has the share of the way from the run that is changed (0) to the other (1) that each cell restores.

    Example: `clearspan patch tiny-bigcode $'import os\nimport' $'import re\nimport' --answers ' os, re'`
    """
    both = both_answers(answers)
    places = numbers("layers", layers) | numbers("positions", positions) | numbers("heads", heads)
    check_out(out, "patching", [".json", ".csv", ".html"])

    def sweep(bridge: "TransformerBridge") -> "Effects":
        from clearspan.patching import activation_patching
        from clearspan.sweep import LogitDifference

        which, axes = names(points), names(by)
        return activation_patching(
            bridge,
            clean,
            corrupted,
            LogitDifference.between(bridge, *both),
            which[0] if len(which) == 1 else which,
            axes,  # pyright: ignore[reportArgumentType]: what is no axis is an error there
            direction="noising" if noising else "denoising",
            **places,  # pyright: ignore[reportArgumentType]: places on axes alone
        )

    found = measured(model, sweep, verbose=verbose)
    forms = {
        ".json": lambda: json_of(found.to_json()),
        ".csv": lambda: csv_of(found),
        ".html": lambda: page(found.title, found.to_html(draws=_draws(found))),
    }
    deliver(forms, out, lambda: _show(found, points, full), as_json=as_json)


def _show(found: "Effects", title: str, full: bool) -> None:
    from rich.console import Console

    from clearspan.results import number
    from clearspan.view import show_effects

    ((source, its),) = found.sources.items()
    (name, base), (own,) = next(iter(found.base.items())), its.values()
    low, high = number(base.mean().item()), number(own.mean().item())
    unit, draws = found.units[name], _draws(found)
    other = {"clean": "corrupted", "corrupted": "clean"}[source]
    scale = f"0: no change, 1: as in the {source} run" if draws == "share" else f"change in {unit}"
    typer.echo(f"{name.replace('_', ' ')}: {low} {unit} in the {other} run, {high} in the {source} run")
    typer.echo(f"each cell: the {other} run with one value of the {source} run ({scale})")
    show_effects(found, Console(), title=title, draws=draws, full=full)


def _draws(found: "Effects") -> "Draws":
    """Returns what a table shows: shares of the way to the other run, or changes where both runs measure the same."""
    return "share" if found.normalised().isfinite().any() else "change"
