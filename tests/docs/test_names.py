"""The tables of names are made from what the comparison with TransformerLens found."""

import json
import runpy
from pathlib import Path

MAKE = runpy.run_path(str(Path(__file__).parents[2] / "docs/names.py"))


def test_the_tables():
    row = {"lines": 12, "same": 10, "raised": 1, "error": 4.7e-7}
    differs = {"count": 2, "line": "bridge.W_gate", "how": "an error | here", "label": "GPT-2"}
    result = {
        "transformer_lens": "4.3.0",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "models": ["GPT-2", "Llama"],
        "sections": {
            "Weights": {
                "W_in, W_gate": {**row, "differences": {"It raises.": differs}},
                "QK": {**row, "same": 12, "differences": {}},
            },
            "Parameters": {
                "cache.to(...)": {"lines": 1, "same": 1, "raised": 1, "error": 0.0, "differences": {}},
                "cache.at(...)": {
                    "lines": 1,
                    "same": 0,
                    "raised": 0,
                    "error": 0.0,
                    "differences": {"Why.": {**differs, "count": 1}},
                },
            },
        },
    }
    lines = MAKE["tables"](result).splitlines()
    assert lines[0] == "4 names, in 26 lines of code that ran in both libraries: 23 give the same (3 raise in both)."
    assert lines[4:] == [
        "",
        "### Weights",
        "",
        "| name | in both libraries |",
        "|---|---|",
        "| `W_in`, `W_gate` | same in 10 of 12 lines, largest error 5e-7. It raises. (2 lines, such as "
        "`bridge.W_gate`: an error \\| here) |",
        "| `QK` | same in 12 lines, largest error 5e-7 |",
        "",
        "### Parameters",
        "",
        "| name | in both libraries |",
        "|---|---|",
        "| `cache.to(...)` | same |",
        "| `cache.at(...)` | Why. (1 line, such as `bridge.W_gate`: an error \\| here) |",
    ]


def test_the_page_is_current_and_explains_every_difference():
    result = json.loads(MAKE["KEPT"].read_text())
    assert MAKE["tables"](result) in MAKE["PAGE"].read_text(), "run: python docs/names.py"
    rows = [row for section in result["sections"].values() for row in section.values()]
    assert all(row["same"] + sum(each["count"] for each in row["differences"].values()) == row["lines"] for row in rows)
    assert not any("not explained" in row["differences"] for row in rows)
