"""Writes which model types of transformers are served, and how: docs/architectures.md, and the README's count.

python docs/architectures.py --run    verifies all model types first, and keeps the result in docs/zoo.json
python docs/architectures.py          writes the pages from what is kept
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clearspan import zoo

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs/zoo.json"
PAGE = ROOT / "docs/architectures.md"
README = ROOT / "README.md"
MARKED = re.compile(r"(<!-- generated:zoo -->\n).*?(<!-- /generated:zoo -->)", re.DOTALL)

Result = Mapping[str, Any]
"""What `clearspan zoo --json` prints."""

OUTCOMES = {
    "passes": 'every check of `bridge.verify("full")` holds',
    "pinned": "every check holds but for those that fail in transformers itself, without this library",
    "fails": "a check fails",
    "unsupported": "`boot` refuses it",
    "not built": "there is no tiny model to verify",
}
SUBLAYERS = ("positions", "norms", "attn", "mlp")
"""The parts that have a column of their own; the others are mixers and second sublayers."""


def page(result: Result) -> str:
    """Returns the text of docs/architectures.md."""
    lines = [
        "# Architectures",
        "",
        f"The model types that transformers {result['transformers']} maps to a causal language model. Of each, a tiny "
        "random model is",
        "built with a layer of every kind that its config can have, and verified. `clearspan zoo --type NAME` does it "
        "again.",
        "",
        *_counts(result),
        "",
        "| model type | class | adapted | attention | positions | norms | MLP | other sublayers | result |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(_line, result["rows"]),
        *_reasons(result),
    ]
    return "\n".join(lines) + "\n"


def count(result: Result) -> str:
    """Returns the README's sentence: how many model types pass, and how many of them by structure."""
    rows = result["rows"]
    right = [row for row in rows if row["outcome"] in ("passes", "pinned")]
    ways = Counter(row["adapted"] for row in right)
    pinned = sum(row["outcome"] == "pinned" for row in right)
    return (
        f"{len(right)} of the {len(rows)} model types that transformers {result['transformers']} maps to a causal "
        f"language model pass,\n{ways['by hand']} adapted by hand and {ways['by structure']} by structure; {pinned} of "
        "them but for checks that fail in transformers itself.\n"
    )


def _counts(result: Result) -> Iterator[str]:
    found = Counter(row["outcome"] for row in result["rows"])
    yield "| result | model types | what it means |"
    yield "|---|---|---|"
    for outcome, meaning in OUTCOMES.items():
        if found[outcome]:
            yield f"| {outcome} | {found[outcome]} | {meaning} |"


def _line(row: Mapping[str, Any]) -> str:
    parts = row["parts"]
    others = "; ".join(f"{name}: {kinds}" for name, kinds in parts.items() if name not in SUBLAYERS)
    shown = [parts.get(name, "") for name in ("attn", "positions", "norms", "mlp")]
    adapted = "" if row["adapted"] == "not" else row["adapted"]
    cells = [f"`{row['model_type']}`", f"`{row['architecture']}`", adapted, *shown, others, row["outcome"]]
    return f"| {' | '.join(cells)} |"


def _reasons(result: Result) -> Iterator[str]:
    """Yields the reasons of the rows that do not simply pass, each once with the model types that it holds of."""
    holders: dict[str, list[str]] = {}
    for row in result["rows"]:
        for reason in _why(row):
            holders.setdefault(reason, []).append(f"`{row['model_type']}`")
    if holders:
        yield from ("", "Why a model type does not simply pass:", "")
    for reason, model_types in holders.items():
        yield f"- {', '.join(model_types)}: {reason}."


def _why(row: Mapping[str, Any]) -> Iterator[str]:
    for group, checks in row["failures"].items():
        yield f"{len(checks)} of the checks of {group} fail, such as {checks[0]}"
    for reason in dict.fromkeys(row["pinned"].values()):
        yield f"pinned: {reason}"
    yield from row["reason"].splitlines()[:1]


def kept(found: zoo.Zoo) -> str:
    """Returns the text of docs/zoo.json: a result without how long it took and how large errors were."""
    result = found.to_dict()
    del result["seconds"]
    for row in result["rows"]:
        del row["seconds"]
        row["failures"] = {group: [_without_error(one) for one in checks] for group, checks in row["failures"].items()}
        row["pinned"] = {_without_error(one): reason for one, reason in row["pinned"].items()}
    return json.dumps(result, indent=1) + "\n"


def _without_error(check: str) -> str:
    return re.sub(r" \(error [^)]*\)$", "", check)


if __name__ == "__main__":
    if "--run" in sys.argv[1:]:
        KEPT.write_text(kept(zoo.check_all()))
    last = json.loads(KEPT.read_text())
    PAGE.write_text(page(last))
    README.write_text(MARKED.sub(lambda mark: mark[1] + count(last) + mark[2], README.read_text()))
