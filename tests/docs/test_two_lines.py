"""The script that is written for TransformerLens runs with two lines changed, and prints what the page says."""

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TWO_LINES = runpy.run_path(str(ROOT / "benchmarks/peers/two_lines.py"))


def test_the_script_prints_what_the_page_says(monkeypatch):
    monkeypatch.chdir(ROOT / "src/clearspan")
    with torch.no_grad():  # keeps the script from turning gradients off for the tests after it
        TWO_LINES["compare"](TWO_LINES["printed"](TWO_LINES["after"]()), TWO_LINES["shown"]())


def test_two_lines_are_changed():
    before, after = (TWO_LINES[form]().splitlines() for form in ("before", "after"))
    assert len(before) == len(after)
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 2
    assert not re.search("transformer_lens|boot_transformers", "".join(after))


def test_other_output_is_found():
    shown = TWO_LINES["shown"]()
    TWO_LINES["compare"](shown.replace("6.174", "6.175"), shown)
    with pytest.raises(AssertionError, match=r"clean 6\.474"):
        TWO_LINES["compare"](shown.replace("6.174", "6.474"), shown)
    with pytest.raises(AssertionError, match="after layer 3"):
        TWO_LINES["compare"](shown.replace("' None'", "' name'"), shown)
