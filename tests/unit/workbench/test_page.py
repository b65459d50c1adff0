"""The workbench's page as its user meets it, in Chromium."""

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.browser import chromium
from tests.pages import OTHER, TEXT, Page

from clearspan.workbench import Workbench
from clearspan.workbench.sessions import Session
from clearspan.workbench.views import Answer, PatchingView, Prompt

pytestmark = pytest.mark.browser
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


class Tab:
    """A tab that is open, with all that it complained of and asked for."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page.set_default_timeout(15_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.base = address.partition("/?")[0]
        self.page.goto(address)
        self.page.wait_for_selector("textarea")

    def write(self, clean: str, corrupted: str = "") -> None:
        self.page.get_by_label("Text", exact=False).first.fill(clean)
        self.page.get_by_label("Corrupted text", exact=False).fill(corrupted)
        self.page.locator(".inspector .bars li").first.wait_for()

    def go(self, view: str) -> None:
        self.page.get_by_role("tab", name=view).click()

    def button(self, name: str) -> Any:
        return self.page.locator("button", has_text=re.compile(f"^{re.escape(name)}$"))

    def likeliest(self) -> str:
        return self.page.locator(".inspector .bars li").first.inner_text()

    def said(self) -> str:
        """What the map says to a screen reader."""
        return self.page.locator("main .scroller").get_attribute("aria-label")

    def place(self, row: float, column: float, width: float = 72) -> tuple[float, float]:
        """Where a cell of the map lies on the page, counted in cells from its last row and column."""
        box = self.page.locator("main .heatmap canvas").bounding_box()
        return box["x"] + box["width"] - width * (column + 0.5), box["y"] + box["height"] - 27 * (row + 0.5)


@pytest.fixture
def tab(browser: Any, page: Page) -> Iterator[Callable[..., Tab]]:
    """Opens tabs of the workbench; at the end none has complained, or asked for anything elsewhere."""
    tabs: list[Tab] = []

    def show(workbench: Workbench | None = None, **options: Any) -> Tab:
        tabs.append(Tab(browser, (workbench or page.workbench).address, **options))
        return tabs[-1]

    yield show
    for one in tabs:
        assert one.complaints == []
        assert all(url.startswith((one.base, "data:", "blob:")) for url in one.requests)
        one.page.close()


def test_a_text_is_read_and_a_cell_of_its_lens_is_looked_into(tab) -> None:
    one = tab()
    one.write(TEXT)
    assert [token.inner_text().strip() for token in one.page.locator("header .token").all()][1:3] == ["import", "·os"]
    assert one.likeliest().split() == ["·os", "0.533"]
    one.page.locator("main .heatmap canvas").wait_for()
    one.page.mouse.click(*one.place(0, 2, width=128))
    assert "after ·os at 2, 4: , 0.736" in one.said()
    assert one.likeliest().split() == [",", "0.736"]
    assert "token=" not in one.page.url


def test_an_edit_is_read_and_an_alternative_taken(tab) -> None:
    one = tab()
    one.write(TEXT)
    one.page.locator(".inspector .link").nth(2).click()
    expect(one.page.locator("textarea").first).to_have_value("import os\nimport sys")
    one.page.locator("header .token", has_text="·sys").wait_for()
    one.write("def f(self):")
    one.page.locator("header .token", has_text="def").wait_for()


def test_a_chip_changes_what_is_shown_and_off_is_as_before(tab, page: Page) -> None:
    one = tab()
    one.write(TEXT)
    likeliest = one.page.locator(".inspector .bars li").first
    expect(likeliest).to_contain_text("0.533")
    one.button("head L0H0").click()
    expect(likeliest).to_contain_text("0.291")
    one.button("L0H0 = 0").click()
    expect(likeliest).to_contain_text("0.533")
    one.button("L0H0 = 0").click()
    expect(likeliest).to_contain_text("0.291")
    assert sum(job.view.kind == "text" for job in page.workbench.worker.jobs.values()) == 2


def test_patching_waits_stops_and_goes_on(tab, page: Page) -> None:
    one, held = tab(), threading.Event()
    one.write(TEXT, OTHER)
    one.go("Patching")
    page.workbench.worker.ask(lambda _: held.wait(30))
    try:
        one.button("Patch").click()
        one.button("Cancel").click()
    finally:
        held.set()
    one.page.locator("main .controls").get_by_role("button", name="Go on").click()
    one.page.locator("main .heatmap canvas").wait_for()
    one.page.mouse.click(*one.place(4, 2))
    assert re.search(r"layer 0, position 2 ·re\. \+\S+ logits; share 1\.000", one.said())
    assert one.page.locator(".plan").inner_text().startswith("25 cells in 1 batch")


class BrokenOff:
    """Breaks a view off after its first step, and keeps what was shown."""

    begun = None

    def tell(self, stage: str, done: int, total: int) -> None:
        if done:
            raise InterruptedError

    def show(self, answer: Answer) -> None:
        self.answer = answer


def test_a_map_that_was_broken_off_goes_on_from_the_history(tab, opened, tmp_path: Path, bridge) -> None:
    clean, corrupted = (Prompt(tuple(bridge.to_tokens(text)[0].tolist()), text) for text in (TEXT, OTHER))
    osid, re_id = clean.tokens[2], corrupted.tokens[2]
    watch, session = BrokenOff(), Session(tmp_path / "begun", bridge)
    with pytest.raises(InterruptedError):
        PatchingView(clean, corrupted, osid, re_id, memory=1).run(bridge, watch)
    session.keep(PatchingView(clean, corrupted, osid, re_id), watch.answer, 0.0, is_finished=False)
    workbench = opened(session.folder)
    one = tab(workbench)
    one.page.locator(".history .link").first.click()
    one.page.locator("main .heatmap canvas").wait_for()
    one.page.mouse.click(*one.place(0, 0))
    expect(one.page.locator("main .scroller")).to_have_attribute("aria-label", re.compile("share"))
    left = int((~watch.answer.tensors["done"]).sum())
    assert [job.total for job in workbench.worker.jobs.values() if job.view.kind == "patching"] == [left]
    assert 0 < left < 25


def test_dragging_over_the_map_chooses_a_region(tab) -> None:
    one = tab()
    one.write(TEXT, OTHER)
    one.go("Patching")
    one.button("Patch").click()
    one.page.locator("main .heatmap canvas").wait_for()
    one.page.mouse.move(*one.place(3, 2))
    one.page.mouse.down()
    one.page.mouse.move(*one.place(1, 1))
    one.page.mouse.up()
    assert "layers 1 to 3, positions 2 to 3" in one.page.locator("main .controls").inner_text()
    one.button("Patch").click()
    one.page.locator(".plan", has_text="6 cells").wait_for()


def test_every_view_is_drawn_and_its_script_shown(tab) -> None:
    one = tab()
    one.write(TEXT, OTHER)
    for view, drawn in [
        ("Attention", ".thumbs canvas"),
        ("Direct attribution", ".sides li"),
        ("Generation", "main .strip .token"),
    ]:
        one.go(view)
        one.page.locator(drawn).first.wait_for()
        one.button("Copy as Python").click()
        assert one.page.locator(".script").inner_text().startswith("import clearspan\n")
    one.go("Model")
    one.page.get_by_label("Find").fill("hook_pattern")
    assert one.page.locator(".points tr").count() == 5


def test_the_history_and_the_desk_are_there_in_a_second_tab(tab) -> None:
    one = tab()
    one.write(TEXT, OTHER)
    one.go("Attention")
    one.button("MLP of layer 0").click()
    one.page.locator(".history li", has_text="attention").nth(1).wait_for()
    one.page.wait_for_timeout(600)  # the desk is kept a moment after the last change
    two = tab()
    two.page.locator(".history li", has_text="attention").nth(1).wait_for()
    assert two.page.locator("textarea").first.input_value() == TEXT
    assert two.page.locator(".chips li").inner_text().split("\n")[0] == "L0 mlp_out = 0"


def test_what_is_typed_is_text(tab) -> None:
    one = tab()
    one.write("<img src=x onerror=alert(1)><script>alert(2)</script>")
    assert one.page.locator("header img, header script").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_themes(tab, scheme: str) -> None:
    one = tab(viewport={"width": 400, "height": 800}, color_scheme=scheme)
    one.write(TEXT, OTHER)
    for view in ("Lens", "Attention", "Direct attribution", "Patching", "Generation", "Model"):
        one.go(view)
        one.page.wait_for_timeout(150)
        assert one.page.evaluate("document.documentElement.scrollWidth") == 400, view
    ground = one.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(251, 250, 246)", "dark": "rgb(21, 24, 28)"}[scheme]


def test_a_text_that_cannot_be_read_says_why(tab) -> None:
    one = tab()
    one.write(TEXT, "import os")
    one.go("Patching")
    assert "The texts have 5 and 3 tokens" in one.page.get_by_role("alert").inner_text()
