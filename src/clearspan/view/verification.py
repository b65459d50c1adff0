"""A `Verification` in the terminal: a table of what was checked, and what to read where a check fails."""

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clearspan.verification import Verification
from clearspan.verification.report import GROUPS


def show_verification(found: Verification, console: Console) -> None:
    """Prints the result of `bridge.verify`."""
    console.print(
        Text.assemble(
            (found.model or found.architecture, "bold"),
            f"  {found.architecture}, {found.dtype}, {found.level}: {found.forwards} forward passes",
        )
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("", "checks", "hold", "largest error"):
        table.add_column(title, justify="right" if title in ("hold", "largest error") else "left", no_wrap=True)
    table.add_column("what it shows")
    for group, held, count, error in found.groups():
        mark = Text("✓", style="green") if held == count else Text("✗", style="bold red")
        largest = "" if error is None else f"{error:.1e}"
        table.add_row(mark, group, f"{held}/{count}", largest, Text(GROUPS[group], style="dim"))
    console.print(Padding(table, (1, 0, 1, 2)))
    for check in found.unavailable:
        console.print(Text.assemble(("not checked ", "yellow"), (check.group, "bold"), f"  {check.what}"))
    for what in found.unexplained:
        console.print(Text.assemble(("warning ", "yellow"), what))
    for what in found.not_exercised:
        console.print(Text.assemble(("not exercised ", "yellow"), what))
    for check in found.failures:
        error = "" if check.error is None else f"  error {check.error:.1e}, allowed {check.tolerance:.1e}"
        console.print(Text.assemble(("failed ", "bold red"), (check.group, "bold"), f"  {check.what}{error}"))
        console.print(Padding(Text(check.explanation), (0, 0, 1, 2)))
    console.print(
        Text("every point reads and writes as it should", style="green")
        if found.passed
        else Text(f"{len(found.failures)} of {len(found.checks)} checks failed", style="bold red")
    )
