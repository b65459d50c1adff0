"""Notebooks, each made of one source: a Python file of cells, or a page of Markdown with examples.

In a Python file `# %%` begins a cell of code, `# %% [markdown]` one of text, in comments, and `# %% [check]` code that
is run by the tests and left out of the notebook. In a page, text is text, and the lines after `>>>` are code.

`python docs/notebooks.py` executes all notebooks and writes them, or those whose names it is given. It needs the
dependency group dev, and Chromium or Chrome to draw the figures.
"""

import base64
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from doctest import DocTestParser, Example
from pathlib import Path
from typing import Literal

import kaleido
import nbformat
import plotly.graph_objects as go
from nbclient import NotebookClient

HOME = Path(__file__).parent / "notebooks"
SOURCES = tuple(sorted(HOME.glob("*.py")))
Kind = Literal["code", "markdown", "check"]
KINDS: Mapping[str, Kind] = {"": "code", "[markdown]": "markdown", "[check]": "check"}
PLOTLY = "application/vnd.plotly.v1+json"
WIDTH, PIXELS = 760, 1.2
"""Of a still picture: its width, and how many pixels a unit of it has."""


@dataclass(frozen=True)
class Cell:
    """A cell of a notebook, or code that checks those before it.

    Attributes:
        kind: What it is.
        text: Its source.
        raises: Whether it shows an error.
    """

    kind: Kind
    text: str
    raises: bool = False


def cells(source: Path) -> list[Cell]:
    """Returns the cells of a source.

    Raises:
        ValueError: A mark in a Python file names no kind of cell, or something stands before the first mark.
    """
    found = _of_page(source.read_text()) if source.suffix == ".md" else _of_percent(source.read_text())
    return [Cell(cell.kind, cell.text.strip("\n"), cell.raises) for cell in found if cell.text.strip()]


def _of_percent(text: str) -> list[Cell]:
    before, *parts = re.split(r"^# %% *(.*)\n", text, flags=re.MULTILINE)
    marks, bodies = parts[::2], parts[1::2]
    if before.strip() or not set(marks) <= KINDS.keys():
        raise ValueError(f"expected '# %%', '# %% [markdown]' or '# %% [check]', got {[before, *marks]}")
    uncommented = [re.sub(r"^# ?", "", body, flags=re.MULTILINE) for body in bodies]
    return [
        Cell(KINDS[mark], plain if KINDS[mark] == "markdown" else body)
        for mark, body, plain in zip(marks, bodies, uncommented, strict=True)
    ]


def _of_page(text: str) -> list[Cell]:
    """Returns the cells of a page: code ends a cell where it shows something, as a cell shows its last value alone."""
    found: list[Cell] = []
    for prose, block in re.findall(r"(.*?)(?:^```python\n(.*?)^```\n|\Z)", text, flags=re.MULTILINE | re.DOTALL):
        examples = [part for part in DocTestParser().parse(block) if isinstance(part, Example)]
        shown = prose if examples or not block else f"{prose}```python\n{block}```\n"
        found.append(Cell("markdown", re.sub(r"\]\((?!https?://|#)", "](../", shown)))  # links from the folder below
        code = ""
        for number, example in enumerate(examples, start=1):
            code += example.source
            if example.want or number == len(examples):
                found.append(Cell("code", code, example.exc_msg is not None))
                code = ""
    return found


def notebook_of(source: Path) -> Path:
    """Returns the notebook of a source, which lies in the folder of notebooks."""
    return HOME / f"{source.stem}.ipynb"


def notebook(source: Path) -> nbformat.NotebookNode:
    """Returns the notebook of a source, not yet executed."""
    make = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    shown = [cell for cell in cells(source) if cell.kind != "check"]
    made = [make[cell.kind](cell.text, id=f"{number:02}") for number, cell in enumerate(shown)]
    for node, cell in zip(made, shown, strict=True):
        if cell.raises:
            node.metadata["tags"] = ["raises-exception"]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def executed(made: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Returns a notebook with outputs: figures as pictures, and without what is said on stderr."""
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    client = NotebookClient(made, timeout=600, record_timing=False, resources={"metadata": {"path": str(HOME)}})
    done = client.execute()
    done.metadata["language_info"] = {"name": "python"}  # without the version that ran
    for cell in done.cells:
        if cell.cell_type == "code":
            cell.outputs = [_still(output) for output in cell.outputs if not _is_noise(output)]
    return done


def _is_noise(output: nbformat.NotebookNode) -> bool:
    """Whether an output is what was said on stderr, or the empty place of a bar that is gone."""
    return output.get("name") == "stderr" or output.get("data") == {"text/plain": ""}


def _still(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Returns an output, a figure as a picture on a white ground."""
    if PLOTLY not in output.get("data", {}):
        return output
    figure = go.Figure(output.data[PLOTLY]).update_layout(paper_bgcolor="white", plot_bgcolor="white")
    layout = output.data[PLOTLY]["layout"]
    size = {"width": layout.get("width", WIDTH), "height": layout.get("height")}
    drawn = base64.b64encode(figure.to_image("png", scale=PIXELS, **size)).decode()
    output.data = nbformat.NotebookNode({"image/png": drawn})
    return output


if __name__ == "__main__":
    named = sys.argv[1:]
    kaleido.start_sync_server()  # one browser for all figures
    for source in SOURCES:
        if not named or source.stem in named:
            nbformat.write(executed(notebook(source)), notebook_of(source))
    kaleido.stop_sync_server()
