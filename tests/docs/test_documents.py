"""What the documents show is run, and what they list is what there is."""

import doctest
import importlib
import pkgutil
import re
import runpy
from pathlib import Path

import pytest

import clearspan
from clearspan.architectures import ADAPTERS

ROOT = Path(__file__).parents[2]
MODULES = [name for _, name, _ in pkgutil.walk_packages(clearspan.__path__, "clearspan.")]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", ["clearspan", *MODULES])
def test_examples_in_docstrings(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert results.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_in_pages(page):
    results = doctest.testfile(str(page), module_relative=False, optionflags=FLAGS)
    assert results.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_project(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_table_of_architectures_is_current():
    generate = runpy.run_path(str(ROOT / "docs/generate.py"))
    readme = (ROOT / "README.md").read_text()
    assert generate["with_architectures"](readme) == readme
    assert all(f"| `{name}` |" in readme for name in ADAPTERS)


def test_the_page_of_hook_points_is_complete():
    bridge = clearspan.boot("tiny-bigcode")
    listed = dict(re.findall(r"^\| `([^`]+)` \| ([a-z_0-9 ]+) \|", (ROOT / "docs/hook-points.md").read_text(), re.M))
    expected = {re.sub(r"blocks\.\d+", "blocks.{l}", point.name): " ".join(point.axes) for point in bridge.index}
    assert {name: axes.strip() for name, axes in listed.items()} == expected
