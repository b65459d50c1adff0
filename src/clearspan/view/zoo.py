"""What came of the zoo, in the terminal: a row for each model type."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from clearspan.zoo import Row, Zoo

_STYLES = {"passes": "green", "pinned": "yellow", "fails": "bold red", "unsupported": "red", "not built": "yellow"}


def show_zoo(found: Zoo, console: Console) -> None:
    """Prints a table of model types, and in a last line how many of them pass."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("type", "outcome", "adapted", "checks"):
        table.add_column(title, no_wrap=True, justify="right" if title == "checks" else "left")
    table.add_column("why", overflow="fold")
    for row in found.rows:
        outcome = Text(row.outcome, style=_STYLES[row.outcome])
        adapted = "" if row.adapted == "not" else row.adapted
        table.add_row(row.model_type, outcome, adapted, str(row.checks or ""), escape(_why(row)))
    console.print(table)
    right = found.count("passes", "pinned")
    text = (
        f"{right} of {len(found.rows)} model types of transformers {found.transformers} pass, "
        f"{found.count('pinned')} of them but for what is pinned ({found.level}, {found.seconds:z.0f} s)"
    )
    console.print(Text(text, style="green" if found.passed else "bold red"))


def _why(row: Row) -> str:
    """Returns the first fact of why a row does not simply pass, in one line."""
    failures = [f"{group}: {checks[0]}" + _more(checks) for group, checks in row.failures.items()]
    pinned = dict.fromkeys(row.pinned.values())
    return "; ".join([*failures, *pinned, *row.reason.splitlines()[:1]])


def _more(checks: tuple[str, ...]) -> str:
    return f" and {len(checks) - 1} more" if len(checks) > 1 else ""
