"""What the notebooks claim holds, and each is made of its source as it is now."""

import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

NOTEBOOKS = runpy.run_path(str(Path(__file__).parents[2] / "docs/notebooks.py"))
MOST_BYTES = 300_000


@pytest.fixture(params=NOTEBOOKS["SOURCES"], ids=lambda source: source.stem)
def source(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.mark.slow
def test_what_the_notebook_claims(source, monkeypatch):
    module = ModuleType("__notebook__")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look up their types
    parts = NOTEBOOKS["cells"](source)
    for number, cell in enumerate(parts):
        if cell.kind != "markdown":
            exec(compile(cell.text, f"{source.name}, cell {number}", "exec"), module.__dict__)
    assert any(cell.kind == "check" for cell in parts)


def test_the_notebook_is_current(source):
    kept = json.loads(NOTEBOOKS["notebook_of"](source).read_text())
    shown = [(cell["cell_type"], "".join(cell["source"])) for cell in kept["cells"]]
    made = [(cell.kind, cell.text) for cell in NOTEBOOKS["cells"](source) if cell.kind != "check"]
    assert shown == made, f"run: python docs/notebooks.py {source.stem}"


def test_the_notebook_is_small_and_says_nothing_of_a_machine(source):
    text = NOTEBOOKS["notebook_of"](source).read_text()
    assert len(text) < MOST_BYTES
    assert not re.search(r"/(?:home|root|tmp|work|usr|Users)/", text)
    assert '"output_type": "error"' not in text


def test_there_is_no_notebook_without_a_source():
    folder = NOTEBOOKS["HOME"]
    assert set(folder.glob("*.ipynb")) == {NOTEBOOKS["notebook_of"](source) for source in NOTEBOOKS["SOURCES"]}


def test_links_of_a_notebook_lead_somewhere(source):
    for cell in NOTEBOOKS["cells"](source):
        if cell.kind == "markdown":
            for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", cell.text):
                assert (NOTEBOOKS["HOME"] / target).exists(), target


def test_a_page_with_examples_becomes_cells(tmp_path):
    page = tmp_path / "page.md"
    examples = ">>> x = 1\n>>> for y in (x,):\n...     print(y)\n1\n>>> x / 0\nTraceback (most recent call last):\n"
    examples += "ZeroDivisionError: division by zero\n>>> x = 2\n"
    page.write_text(f"# [Title](a.md)\n\n```python\n{examples}\n```\n\nText.\n\n```python\ny = 2\n```\n")
    assert [(cell.kind, cell.text, cell.raises) for cell in NOTEBOOKS["cells"](page)] == [
        ("markdown", "# [Title](../a.md)", False),
        ("code", "x = 1\nfor y in (x,):\n    print(y)", False),
        ("code", "x / 0", True),
        ("code", "x = 2", False),
        ("markdown", "Text.\n\n```python\ny = 2\n```", False),
    ]
    made = NOTEBOOKS["notebook"](page)
    assert [cell.cell_type for cell in made.cells] == ["markdown", "code", "code", "code", "markdown"]
    assert made.cells[2].metadata["tags"] == ["raises-exception"]


def test_a_mark_that_names_no_kind_of_cell_is_refused(tmp_path):
    path = tmp_path / "source.py"
    path.write_text("# %% [markdwon]\n# Text\n")
    with pytest.raises(
        ValueError, match=r"expected '# %%', '# %% \[markdown\]' or '# %% \[check\]', got \['', '\[markdwon\]'\]"
    ):
        NOTEBOOKS["cells"](path)
