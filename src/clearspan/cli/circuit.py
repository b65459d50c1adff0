"""`clearspan circuit`: the edges through which a model tells two prompts apart."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clearspan.cli.inputs import both_answers
from clearspan.cli.models import measured
from clearspan.cli.options import Answers, AsJson, Clean, Corrupted, Full, Model, Verbose
from clearspan.cli.outputs import check_out, deliver, json_of, page, rows_of

if TYPE_CHECKING:
    from clearspan import TransformerBridge
    from clearspan.circuits import Circuit, Edge
    from clearspan.results import Columns
    from clearspan.sweep import LogitDifference


@dataclass(frozen=True)
class _Found:
    """A circuit and how it was found.

    Attributes:
        circuit: The edges.
        title: What was found, in one line.
        columns: One row for each edge.
        faithfulness: How far it goes from the corrupted run (0) to the clean run (1).
        completeness: How far all other edges go.
        effects: How wide edges are drawn, where their exact effects are known.
    """

    circuit: "Circuit"
    title: str
    columns: "Columns"
    faithfulness: float
    completeness: float
    effects: "dict[Edge, float] | None"

    def to_json(self) -> dict[str, object]:
        """Returns it as plain data; `circuit` is what `Circuit.from_json` reads."""
        return {
            "title": self.title,
            "faithfulness": self.faithfulness,
            "completeness": self.completeness,
            "edges": rows_of(self.columns),
            "circuit": json.loads(self.circuit.to_json()),
        }


def circuit(
    model: Model,
    clean: Clean,
    corrupted: Corrupted,
    answers: Answers,
    target: Annotated[
        float, typer.Option("--target", help="Seek the circuit that keeps this faithfulness, between 0 and 1.")
    ] = 0.9,
    edges: Annotated[
        int | None, typer.Option("--edges", min=1, help="Seek none: take so many edges of the largest scores.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the integrated gradients (EAP-IG).")] = 5,
    top: Annotated[int, typer.Option("--top", min=1, help="How many edges are shown.")] = 20,
    full: Full = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write it: .json, .csv, or drawn, as .svg or .html.")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    r"""Find the circuit through which a model tells two prompts apart.

    Edges are scored by gradients (edge attribution patching). The circuit is sought among them by exact runs, until no
    edge can be dropped from it; or it is the --edges best ones. Its faithfulness is measured exactly either way.

    Example: `clearspan circuit tiny-bigcode $'import os\nimport' $'import re\nimport' --answers ' os, re'`
    """
    both = both_answers(answers)
    check_out(out, "circuit", [".json", ".csv", ".svg", ".html"])

    def find(bridge: "TransformerBridge") -> _Found:
        from clearspan.sweep import LogitDifference

        metric = LogitDifference.between(bridge, *both)
        if edges is None:
            return _discovered(bridge, clean, corrupted, metric, target, steps)
        return _best(bridge, clean, corrupted, metric, edges, steps)

    found = measured(model, find, verbose=verbose)
    forms = {
        ".json": lambda: json_of(found.to_json()),
        ".csv": lambda: _csv(found.columns),
        ".svg": lambda: found.circuit.to_svg(found.effects),
        ".html": lambda: page(found.title, found.circuit.to_svg(found.effects)),
    }
    deliver(forms, out, lambda: _show(found, top, full), as_json=as_json)


def _show(found: _Found, top: int, full: bool) -> None:
    from rich.console import Console

    from clearspan.view import show_edges

    shares = {"faithfulness": found.faithfulness, "completeness": found.completeness}
    show_edges(found.title, shares, found.columns, Console(), top=top, full=full)


def _discovered(
    bridge: "TransformerBridge", clean: str, corrupted: str, metric: "LogitDifference", target: float, steps: int
) -> _Found:
    from clearspan.circuits import discover_circuit

    found = discover_circuit(bridge, clean, corrupted, metric, target=target, steps=steps)
    edges = f"circuit of {found.circuit.n_edges} of {found.circuit.graph.n_edges} edges for {found.metric}"
    title = f"{edges}, found by {found.scores.method} and {found.n_circuits} exact runs"
    columns, effects = found.columns(), dict(found.effects)
    return _Found(found.circuit, title, columns, found.faithfulness, found.completeness, effects)


def _best(
    bridge: "TransformerBridge", clean: str, corrupted: str, metric: "LogitDifference", edges: int, steps: int
) -> _Found:
    from clearspan.circuits import Circuit, edge_attribution, evaluate_circuits

    scores = edge_attribution(bridge, clean, corrupted, metric, steps=steps)
    best = Circuit.of_scores(scores, n_edges=edges)
    measured = evaluate_circuits(bridge, clean, corrupted, metric, best)
    columns = {
        "sender": [edge.sender.name for edge in best],
        "receiver": [edge.receiver.name for edge in best],
        "score": [scores.score(edge) for edge in best],
    }
    title = f"circuit of the {best.n_edges} of {best.graph.n_edges} edges that {scores.method} scores highest"
    return _Found(best, title, columns, measured.faithfulness.item(), measured.completeness.item(), None)


def _csv(columns: "Columns") -> str:
    import pandas

    return str(pandas.DataFrame(dict(columns)).to_csv(index=False))
