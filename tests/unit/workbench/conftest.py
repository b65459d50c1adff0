"""Workbenches that serve the embedded model, and pages that ask them."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.pages import Page

import clearspan
from clearspan.workbench import Workbench


@pytest.fixture(scope="module")
def bridge() -> clearspan.TransformerBridge:
    return clearspan.boot("tiny-bigcode")


@pytest.fixture
def opened(bridge: clearspan.TransformerBridge) -> Iterator[Callable[[Path], Workbench]]:
    """Serves workbenches, each of a folder, until the test ends."""
    served: list[tuple[Workbench, threading.Thread]] = []

    def serve(folder: Path) -> Workbench:
        workbench = Workbench(bridge, "tiny-bigcode", folder)
        thread = threading.Thread(target=workbench.serve)
        thread.start()
        served.append((workbench, thread))
        return workbench

    yield serve
    for workbench, thread in served:
        workbench.stop()
        thread.join()


@pytest.fixture
def visit() -> Iterator[Callable[..., Page]]:
    """Opens pages of workbenches, until the test ends."""
    pages: list[Page] = []

    def opened(*given: object) -> Page:
        pages.append(Page(*given))
        return pages[-1]

    yield opened
    for one in pages:
        one.http.close()


@pytest.fixture
def page(opened: Callable[[Path], Workbench], visit: Callable[..., Page], tmp_path: Path) -> Page:
    return visit(opened(tmp_path))
