"""A circuit in the terminal: how faithful it is, and its edges, those that matter most first."""

from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from clearspan.results import Columns, number, size

from .cells import BAR, bar, print_part, table

MEANING = {
    "faithfulness": "what the circuit alone restores: 0 as corrupted, 1 as clean",
    "completeness": "what all other edges restore without it",
    "score": "approximate change of the metric with the edge patched",
    "effect": "faithfulness that the circuit loses without the edge",
}


def show_edges(
    title: str, shares: Mapping[str, float], edges: Columns, console: Console, *, top: int = 20, full: bool = False
) -> None:
    """Prints a circuit.

    Args:
        title: What was found, in one line.
        shares: Faithfulness and completeness.
        edges: `sender`, `receiver` and numbers. The last number ranks the edges.
        console: Where. No line is wider than it.
        top: How many edges are shown.
        full: Whether all are shown.
    """
    console.print(Text(title))
    for name, share in shares.items():
        console.print(Text.assemble((f"{name:12}  ", "bold"), f"{share:z.3f}  ", (MEANING[name], "dim")))
    *_, by = names = [name for name in edges if name not in ("sender", "receiver")]
    rows = sorted(zip(*edges.values(), strict=True), key=lambda row: -size(float(row[-1])))
    shown = rows if full else rows[:top]
    left = len(rows) - len(shown)
    found = table("edge", *names, "", right=names)
    most = max((abs(float(row[-1])) for row in rows), default=0.0)
    for sender, receiver, *values in shown:
        length = bar(abs(float(values[-1])) / most if most else 0.0, BAR, "cyan" if float(values[-1]) > 0 else "red")
        found.add_row(Text(f"{sender} → {receiver}"), *(number(float(value)) for value in values), length)
    more = f"; {left} more: --full" if left else ""
    console.print()
    print_part(console, "Edges", f"by {by}: {MEANING[by]}{more}", found)
