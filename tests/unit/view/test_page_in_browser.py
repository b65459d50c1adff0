"""The report's page as a reader meets it, in Chromium."""

import itertools

import pytest
import torch
from tests.browser import chromium

import clearspan
from clearspan.analysis import report as report_of
from clearspan.plots import visible

pytestmark = pytest.mark.browser

CODE = """class Box:
    def __init__(self, width):
        self.width = width

    def area(self):
        return self."""


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def found():
    return report_of(clearspan.boot("tiny-bigcode"), CODE, progress=False)


@pytest.fixture(scope="module")
def address(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    found.save(path)
    return path.as_uri()


class Opened:
    """A page that is open, with all that it complained of and asked for."""

    def __init__(self, browser, address, **options):
        self.page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("#paths svg circle", state="attached")

    def token(self, at, section="text"):
        return self.page.locator(f"#{section} .token").nth(at)

    def places(self, section, name):
        """Positions of the tokens that a section marks."""
        tokens = self.page.locator(f"#{section} .token")
        return tokens.evaluate_all(
            "(all, name) => all.flatMap((one, i) => (one.classList.contains(name) ? [i] : []))", name
        )

    def said(self, section):
        """What a section's first map says to a screen reader."""
        return self.page.locator(f"#{section} .scroller").first.get_attribute("aria-label")

    def choose(self, layer, head, **others):
        """Opens the page's address with a selection, and waits until it is drawn."""
        places = {"layer": layer, "head": head, **others}
        self.page.evaluate(f"location.hash = '{'&'.join(f'{axis}={at}' for axis, at in places.items())}'")
        name = f"layer {layer} head {head}"
        script = "name => document.querySelector('#attention .scroller').ariaLabel.includes(name)"
        self.page.wait_for_function(script, arg=name)

    @property
    def hash(self):
        return self.page.evaluate("location.hash")


@pytest.fixture(scope="module")
def page(browser, address):
    return Opened(browser, address, color_scheme="light")


@pytest.fixture
def opened(page, address):
    """The page as it is when it opens; at the end it has complained of nothing and asked for nothing."""
    page.page.keyboard.press("Escape")
    page.page.locator("h1").hover()
    yield page
    assert page.complaints == []
    assert {request.partition("#")[0] for request in page.requests} == {address}


def test_the_page_opens_on_the_last_prediction(opened, found):
    last = len(found.tokens) - 1
    assert opened.page.locator("#text .token").count() == len(found.tokens)
    assert opened.places("text", "target") == [last]
    assert opened.page.locator("#text .bars code").first.text_content() == found.target
    assert opened.page.locator("noscript").count() == 0
    assert opened.hash == ""


def test_pointing_at_a_token_lights_it_up_everywhere_until_the_pointer_leaves(opened, found):
    last = len(found.tokens) - 1
    opened.token(5).hover()
    assert opened.places("text", "at") == opened.places("attention", "at") == [5]
    assert opened.places("attention", "target") == [5]
    assert "at 5," in opened.said("lens")
    assert "at 5," in opened.said("effect")
    assert "at 5 to" in opened.said("attention")
    assert opened.page.locator("#attention .mark").count() == 2
    opened.page.locator("h1").hover()
    assert opened.places("text", "at") == []
    assert opened.places("text", "target") == [last]
    assert opened.hash == ""


def test_a_click_makes_a_token_the_target_and_the_address_keeps_it(opened, found):
    opened.token(5).click()
    opened.page.locator("h1").hover()
    assert opened.places("text", "target") == [5]
    assert opened.hash == "#target=5&position=5"
    ids, words = found.predictions.top_ids[5].tolist(), found.words
    shown = opened.page.locator("#text .bars code").all_text_contents()
    assert shown[0] == words[ids[0]].replace(" ", "·").replace("\n", "⏎")


def test_an_address_with_a_selection_opens_on_it(browser, address):
    one = Opened(browser, f"{address}#target=7&layer=2&head=5&position=3")
    assert one.places("text", "target") == [7]
    assert one.places("text", "at") == [3]
    assert "layer 2 head 5" in one.said("attention")
    assert one.page.locator("#attention select").first.input_value() == "2"
    assert one.hash == "#target=7&layer=2&head=5&position=3"
    one.page.evaluate("location.hash = '#layer=1&target=99999'")
    one.page.wait_for_function("document.querySelector('#attention select').value === '1'")
    assert one.places("text", "at") == []
    assert one.complaints == []
    one.page.close()


def test_the_arrow_keys_move_the_selection_and_escape_clears_it(opened, found):
    last = len(found.tokens) - 1
    opened.page.locator("#text .strip").focus()
    opened.page.keyboard.press("ArrowLeft")
    assert opened.places("text", "target") == [last]
    opened.page.keyboard.press("ArrowLeft")
    assert opened.places("text", "target") == [last - 1]
    opened.page.locator("#lens .scroller").focus()
    for key in ("ArrowUp", "ArrowLeft"):
        opened.page.keyboard.press(key)
    assert opened.places("text", "target") == [last - 2]
    assert "layer=3" in opened.hash
    opened.page.locator("#attention .thumbs button").nth(3).focus()
    opened.page.keyboard.press("ArrowRight")
    assert "head=4" in opened.hash
    opened.page.keyboard.press("Escape")
    assert opened.hash == ""
    assert opened.places("text", "target") == [last]


def test_a_cell_says_what_it_is_and_a_click_on_a_head_shows_its_attention(opened, found):
    heads = opened.page.locator("#heads .scroller").first
    box = heads.bounding_box()
    heads.hover(position={"x": box["width"] - 20, "y": box["height"] - 10})
    layer, head = found.model.layers - 1, found.model.heads - 1
    score = float(found.heads.induction[layer, head])
    assert opened.page.locator("#heads .note-card").text_content().strip() == f"L{layer}H{head}: {score:.3f}"
    heads.click(position={"x": box["width"] - 20, "y": box["height"] - 10})
    assert f"layer {layer} head {head}" in opened.said("attention")
    assert opened.page.locator("#attention .thumbs [aria-pressed=true]").text_content() == f"L{layer}H{head}"


def test_the_attention_of_a_cell_is_the_reports(opened, found):
    opened.choose(1, 2, target=9, position=4)
    assert opened.said("attention").endswith(f"attention {float(found.patterns[1, 2, 9, 4]):.2f}")
    drop = float(found.effect.drop[1, 4])
    sign = "\N{MINUS SIGN}" if drop < 0 else "+"
    assert opened.said("effect").endswith(f"costs {sign}{abs(drop):.3f} nats")


def test_the_graph_has_edges_of_at_least_the_attention_asked_for(opened):
    edges = opened.page.locator("#paths .edges path:not(.faint)")
    before = edges.count()
    opened.page.locator("#paths input").fill("0.8")
    titles = opened.page.locator("#paths .edges path:not(.faint) title").all_text_contents()
    assert 0 < len(titles) < before
    assert all(float(title.rpartition(" ")[2]) >= 0.8 for title in titles)


def test_drawings_are_named_and_reached_by_the_keyboard(opened):
    unnamed = "all => all.filter(one => !one.getAttribute('aria-label')).length"
    drawings = opened.page.locator(".scroller, .strip, #views svg")
    assert drawings.count() == 9
    assert drawings.evaluate_all(unnamed) == 0
    assert drawings.evaluate_all("all => all.filter(one => one.tabIndex !== 0).length") == 0


CONTRAST = """(section) => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => rgb.slice(0, 3)
    .map((c) => (c <= 10 ? c / 3294 : ((c / 255 + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const ground = channels(getComputedStyle(one).backgroundColor);
      if (ground[3] !== 0) return ground;
    }
  };
  const texts = [...document.querySelectorAll(`${section} *`)].filter((one) =>
    [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) && one.getClientRects().length);
  return texts.map((one) => {
    const style = getComputedStyle(one);
    const ink = channels(one instanceof SVGElement ? style.fill : style.color);
    const [high, low] = [luminance(ink), luminance(behind(one))].sort((a, b) => b - a);
    return [(high + 0.05) / (low + 0.05), one.outerHTML.slice(0, 90)];
  }).filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_all_text_is_read_well_and_nothing_is_wider_than_the_page(browser, address, found, width, theme):
    one = Opened(browser, address, viewport={"width": width, "height": 800}, color_scheme=theme)
    for section in ("lens", "effect", "heads", "attention"):
        one.page.locator(f"#{section} .scroller").first.hover()
        assert one.page.locator(f"#{section} .note-card").count() == 1
        assert one.page.evaluate("document.documentElement.scrollWidth") <= width
    assert one.page.evaluate(CONTRAST, "main") == []
    if width == 1280:
        for layer, head in itertools.product(range(found.model.layers), range(found.model.heads)):
            one.choose(layer, head, target=20)
            assert one.page.evaluate(CONTRAST, "#attention .strip") == []
    assert one.complaints == []
    one.page.close()


def test_the_drawings_follow_the_theme(opened):
    picture = "document.querySelector('#heads canvas').toDataURL()"
    light = opened.page.evaluate(picture)
    opened.page.emulate_media(color_scheme="dark")
    opened.page.wait_for_function("light => document.querySelector('#heads canvas').toDataURL() !== light", arg=light)
    opened.page.emulate_media(color_scheme="light")
    opened.page.wait_for_function("light => document.querySelector('#heads canvas').toDataURL() === light", arg=light)


@pytest.mark.parametrize("token_ids", [[0], [0, 1, 2, 3, 2, 4, 5, 6, 7]], ids=["one", "markup"])
def test_tokens_are_written_as_they_are(browser, make_report, tmp_path, token_ids):
    report = make_report(token_ids)
    report.patterns[1] = torch.nan  # a layer without attention
    report.save(tmp_path / "report.html")
    one = Opened(browser, (tmp_path / "report.html").as_uri())
    assert one.page.locator("#text .token").all_text_contents() == [visible(token) for token in report.tokens]
    one.choose(1, 0, target=0)
    assert one.complaints == []
    one.page.close()


def test_without_scripts_the_page_shows_the_text_and_says_what_is_missing(browser, address, found):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator(".missing").is_visible()
    assert page.locator(".token").count() == len(found.tokens)
    context.close()
