"""What the documents show is run, and what they list is what there is."""

import doctest
import importlib
import pkgutil
import re
import runpy
from pathlib import Path

import pytest
import torch
from tests.zoo import WITHOUT_VARIANT

import clearspan
from clearspan.architectures import ADAPTERS
from clearspan.points import VOCABULARY

ROOT = Path(__file__).parents[2]
MODULES = [name for _, name, _ in pkgutil.walk_packages(clearspan.__path__, "clearspan.")]
GENERATED = ROOT / "docs/reference"
WRITTEN = (page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent != GENERATED)
PAGES = [ROOT / "README.md", *WRITTEN, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
LONG = {"causal-abstraction.md", "circuits.md", "lenses.md"}  # these train and search, for a quarter of a minute each
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", ["clearspan", *MODULES])
def test_examples_in_docstrings(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert results.failed == 0


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.name in LONG else (), id=page.name) for page in PAGES],
)
def test_examples_in_pages(page):
    results = doctest.testfile(str(page), module_relative=False, optionflags=FLAGS)
    assert results.failed == 0


def test_the_readme_runs_as_it_is_copied():
    """Its blocks have no prompts. One with text below it raises that."""
    text, names = (ROOT / "README.md").read_text(), {}
    for code, said in re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", text, flags=re.DOTALL):
        if said:
            with pytest.raises(clearspan.ClearspanError) as raised:
                exec(code, names)
            assert f"{type(raised.value).__module__}.{type(raised.value).__name__}: {raised.value}\n" == said
        else:
            exec(code, names)
    assert names["cache"]["pattern", 2].shape == (1, 8, 6, 6)
    assert names["cache"]["k", 2].shape == (1, 6, 1, 32)
    assert not torch.equal(names["ablated"], names["logits"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_project(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"])
def test_files_that_are_named_are_there(page):
    """All but those of transformers."""
    text = (ROOT / page).read_text()
    for path in re.findall(r"`([\w./-]+\.py|[\w./-]+/)`", text):
        homes = (ROOT, ROOT / "src/clearspan")
        assert path.startswith("modeling_") or any((home / path).exists() for home in homes), path


def test_the_index_lists_every_page():
    listed = re.findall(r"\]\((.+?)\)", (ROOT / "docs/README.md").read_text())
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= {"README.md", *listed}


def test_no_format_shows_a_minus_zero():
    """A number that rounds to zero has a sign on one processor and none on another: `z` leaves it out."""
    signed = re.compile(r"(?<![%{])\{[^{}%\n]*?:\+?\.\d+f\}")
    for path in (ROOT / "src").rglob("*.py"):
        assert not signed.findall(path.read_text()), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_example_shows_a_minus_zero(page):
    for example in doctest.DocTestParser().get_examples(page.read_text()):
        assert not re.search(r"-0(\.0*)?(?![\d.])", example.want), example.want


REFERENCE = runpy.run_path(str(ROOT / "docs/reference.py"))


def test_the_reference_is_current():
    """It has each public name; `python docs/reference.py` writes it."""
    folder = ROOT / "docs/reference"
    assert {page.name: page.read_text() for page in folder.glob("*.md")} == REFERENCE["pages"]()


@pytest.mark.parametrize("module", REFERENCE["MODULES"])
def test_what_a_module_offers_is_there(module):
    home = importlib.import_module(module)
    assert set(home.__all__) <= set(dir(home))
    assert all(getattr(home, name) is not None for name in home.__all__)


GENERATE = runpy.run_path(str(ROOT / "docs/generate.py"))


@pytest.mark.slow
@pytest.mark.parametrize("page", GENERATE["PAGES"])
def test_generated_parts_are_current(page, verified):
    assert GENERATE["current"](page, verified) == (ROOT / page).read_text(), "run: python docs/generate.py"


def test_the_table_of_points_has_no_empty_cell():
    page = (ROOT / "docs/points-by-architecture.md").read_text()
    rows = re.findall(r"^\| `(hook_|blocks|ln_final)[^|]*\|(.*)\|$", page, re.M)
    assert len(rows) == len(VOCABULARY)
    for _, cells in rows:
        found = cells.split("|")
        assert len(found) == len(ADAPTERS.keys() - WITHOUT_VARIANT)
        for cell in found:
            assert re.fullmatch(r"(✓✓)?( ?\[\d+\])*", cell.strip()), cell
            assert cell.strip()
