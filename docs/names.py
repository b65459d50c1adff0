"""Writes the tables of docs/coming-from-transformerlens.md that say, name by name, what is the same in TransformerLens.

python docs/names.py          writes them from docs/names.json

`benchmarks/peers/compare_names.py --keep` makes docs/names.json, in an environment that has TransformerLens.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs/names.json"
PAGE = ROOT / "docs/coming-from-transformerlens.md"
MARKED = re.compile(r"(<!-- generated:names -->\n).*?(<!-- /generated:names -->)", re.DOTALL)

Result = Mapping[str, Any]
"""What the comparison keeps."""


def tables(result: Result) -> str:
    """Returns the tables, with a sentence that says what was compared."""
    rows = [row for section in result["sections"].values() for row in section.values()]
    same, lines, raised = (sum(row[count] for row in rows) for count in ("same", "lines", "raised"))
    models = ", ".join(result["models"])
    return "\n".join(
        [
            f"{len(rows)} names, in {lines} lines of code that ran in both libraries: {same} give the same "
            f"({raised} raise in both).",
            "For the others the reason is here, with one of the lines. All ran on raw and on processed weights of tiny "
            "models",
            f"({models}), the cache's methods with arguments drawn at",
            f"random too. TransformerLens {result['transformer_lens']}, torch {result['torch']}, transformers "
            f"{result['transformers']}.",
            *(line for name, section in result["sections"].items() for line in _table(name, section)),
            "",
        ]
    )


def _table(name: str, section: Result) -> Iterator[str]:
    yield from ("", f"### {name}", "", "| name | in both libraries |", "|---|---|")
    for row, found in section.items():
        yield f"| {_name(row)} | {_outcome(found)} |"


def _name(row: str) -> str:
    parts = row.split(", ")
    return ", ".join(f"`{part}`" for part in parts) if all(map(re.compile(r"[\w.]+").fullmatch, parts)) else f"`{row}`"


def _outcome(found: Result) -> str:
    """Returns whether a name is the same, with the numbers, and how and why it differs where it does."""
    same = f"same in {found['same']} of {found['lines']} lines" if found["differences"] else _all(found["lines"])
    error = f", largest error {found['error']:.0e}".replace("e-0", "e-") if found["error"] else ""
    if not found["same"]:
        same, error = "", ""
    reasons = [
        f"{text} ({there['count']} {'line' if there['count'] == 1 else 'lines'}, such as `{there['line']}`: "
        f"{there['how']})"
        for text, there in found["differences"].items()
    ]
    return ". ".join([part for part in (f"{same}{error}", *(reason.replace("|", "\\|") for reason in reasons)) if part])


def _all(lines: int) -> str:
    return "same" if lines == 1 else f"same in {lines} lines"


if __name__ == "__main__":
    kept = json.loads(KEPT.read_text())
    PAGE.write_text(MARKED.sub(lambda mark: mark[1] + tables(kept) + mark[2], PAGE.read_text()))
