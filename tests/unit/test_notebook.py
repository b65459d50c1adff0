"""What objects show in a notebook: executed by a kernel, converted to a page, cleaned as untrusted output is."""

import base64
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from tests.zoo import build

import clearspan
from clearspan import analysis
from clearspan.circuits import Circuit, edge_attribution
from clearspan.effects import Effects
from clearspan.interventions import Patch
from clearspan.sweep import LogitDifference, Sweep, grid

MOST_BYTES = 60_000
TEXT = "def area(width, height):\n    return width *"
HOSTILE = "</td><script>alert(1)</script>&<b>\x00\x1b"

# What JupyterLab leaves of output that is not trusted (sanitizer.ts of its apputils), as far as it is used here.
TAGS = {"b", "caption", "details", "div", "img", "p", "pre", "span", "style", "summary", "table", "tbody", "td", "th"}
TAGS |= {"thead", "tr"}
ATTRIBUTES = {"alt", "class", "src", "style", "title"}
PROPERTIES = {"background", "background-color", "border-collapse", "border-radius", "border-spacing", "color", "font"}
PROPERTIES |= {"font-family", "font-size", "margin", "max-width", "outline", "padding", "text-align", "white-space"}
EMPTY = {"img"}


class Checked(HTMLParser):
    """Reads a fragment, and keeps its images; anything that is not plain or not closed fails."""

    def __init__(self, fragment):
        super().__init__()
        self.open, self.pictures, self.words = [], [], []
        self.feed(fragment)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert tag in TAGS
        for name, value in attributes:
            assert name in ATTRIBUTES
            if name == "style":
                named = [part.split(":")[0].strip() for part in value.split(";") if part.strip()]
                assert set(named) <= PROPERTIES
            if name == "src":
                head, data = value.split(",", 1)
                assert head == "data:image/svg+xml;base64"
                self.pictures.append(base64.b64decode(data).decode())
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def checked(shown):
    """Returns the pictures of what an object shows, after looking at all of it."""
    fragment = shown if isinstance(shown, str) else shown._repr_html_()
    assert len(fragment.encode()) <= MOST_BYTES
    outside = re.sub(r"http://www\.w3\.org/2000/svg", "", fragment)
    read = Checked(fragment)
    for page in (outside, *read.pictures):
        assert "<script" not in page.lower()
        assert not re.search(r"(?<!xmlns=\")https?://", page)
        assert not re.search(r"\son\w+=", page)
    for picture in read.pictures:
        ElementTree.fromstring(picture)
    return read.pictures


@pytest.fixture(scope="module")
def bridge():
    return clearspan.boot("tiny-bigcode")


@pytest.fixture(scope="module")
def pair(bridge):
    metric = LogitDifference.between(bridge, " os", " re")
    return bridge, "import os\nimport", "import re\nimport", metric


@pytest.fixture(scope="module")
def sweep(pair):
    bridge, clean, corrupted, metric = pair
    cells = grid("resid_pre", Patch(), layer=range(5), position=range(5))
    return Sweep(bridge, corrupted, cells, metric, sources={"clean": clean})


def test_what_is_looked_at_most_is_a_picture_with_a_table(bridge, pair, sweep):
    shown = [
        analysis.logit_lens(bridge, TEXT),
        analysis.lens_readings(bridge, TEXT),
        analysis.predictions(bridge, TEXT),
        analysis.head_scores(bridge),
        analysis.direct_logit_attribution(bridge, TEXT, " he"),
        sweep.run(),
        edge_attribution(*pair),
        edge_attribution(*pair).top(12),
        Circuit.of(bridge, ["embed->L3H1.q", "L3H1->L4H3.q", "L4H3->logits"]),
    ]
    for one in shown:
        assert len(checked(one)) == 1
        assert "<table" in one._repr_html_()
    assert len(checked(analysis.report(bridge, TEXT))) == 2
    assert checked(analysis.max_activating_examples(bridge, [TEXT], "blocks.0.mlp.hook_post", index=[4, 9])) == []


def test_models_parts_caches_and_plans_are_tables(bridge, pair, sweep):
    _, cache = bridge.run_with_cache(TEXT)
    circuit = Circuit.of(bridge, [])
    shown = [bridge, bridge.blocks[0], bridge.blocks[0].attn, bridge.hook_dict["blocks.0.attn.hook_q"], bridge.points()]
    shown += [bridge.hook_dict, cache, bridge.plan_cache((1, 8)), sweep, sweep.plan(), bridge.verify(), circuit.graph]
    for one in shown:
        assert checked(one) == []
        assert "<table" in one._repr_html_()
        assert len(repr(one)) <= 3000
        assert len(repr(one).splitlines()) < 40
    assert "verify" in bridge._repr_html_()
    assert "print(...)" in repr(bridge.hook_dict)
    assert str(bridge.hook_dict).count("\n") > repr(bridge.hook_dict).count("\n")
    assert checked(circuit) == []


def test_an_autoencoder_on_a_point_shows_its_own_points(bridge):
    class Halves(torch.nn.Module):
        cfg = type("Cfg", (), {"hook_name": "blocks.2.hook_resid_post"})

        def encode(self, value):
            return torch.cat([value.relu(), (-value).relu()], -1)

        def decode(self, acts):
            return acts[..., :256] - acts[..., 256:]

    with bridge.saes(Halves()):
        name = "blocks.2.hook_resid_post.hook_sae_acts_post"
        checked(bridge.hook_dict[name])
        assert name in Checked(bridge.hook_dict[name]._repr_html_()).words[1]


def test_what_is_large_stays_small():
    torch.manual_seed(0)
    axes = {"layer": tuple(range(48)), "neuron": tuple(range(1000))}
    many = Effects({"score": torch.randn(48, 1000, 1)}, axes)
    (picture,) = checked(many)
    assert "each cell: the largest of 1 layer x 11 neuron, among 48 x 1000" in many._repr_html_()
    assert picture.count("<text") < 100
    named = {"line": tuple("abcd"), "x": tuple(float(x) for x in range(5000))}
    checked(Effects({"score": torch.randn(4, 5000, 1)}, named))
    deep = {"layer": tuple(range(9)), "head": tuple(range(9)), "position": tuple(range(9))}
    assert "the largest over position" in checked(Effects({"score": torch.randn(9, 9, 9, 1)}, deep))[0]


def test_a_cache_of_a_deep_model_is_small():
    bridge = clearspan.boot(build("llama", num_hidden_layers=48))
    assert len(bridge.hook_dict) > 1000
    _, cache = bridge.run_with_cache(torch.arange(4)[None])
    for one in (cache, bridge.hook_dict, bridge.points(), bridge):
        checked(one)
        assert len(repr(one)) <= 3000
        assert len(repr(one).splitlines()) < 40


def test_hostile_tokens_are_text():
    values = torch.randn(2, 3, 1)
    axes, texts = {"layer": (0, 1), "position": (0, 1, 2)}, {"position": (HOSTILE, "&amp;", "<i>")}
    found = Effects({HOSTILE: values}, axes, texts=texts, what=HOSTILE)
    (picture,) = checked(found)
    read = [text.text for text in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert {"&amp;", "<i>"} <= set(read)
    assert "<script" not in found._repr_html_()
    checked(Effects({HOSTILE: values[:, 0]}, {HOSTILE: ("<b>", HOSTILE)}))


# --- a real notebook -------------------------------------------------------------------------------------------------

CELLS = (
    "import clearspan\nfrom clearspan import analysis\nbridge = clearspan.boot('tiny-bigcode')\nbridge",
    f"analysis.report(bridge, {TEXT!r})",
    "bridge.verify()",
    "analysis.head_scores(bridge)",
    "from clearspan.progress import shown\nwith shown(True) as tell:\n"
    "    tell('halves <b>', 1, 2)\n    tell('halves <b>', 2, 2)",
    "with shown(True) as tell:\n    tell('texts', 5, 0)\n    1 / 0",
)


class Heard(NotebookClient):
    """A client that keeps what a kernel displays, also what is later replaced."""

    displayed = ()

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] in ("display_data", "update_display_data"):
            self.displayed = (*self.displayed, (cell_index, msg["content"]["data"]))
        return super().process_message(msg, cell, cell_index)


@pytest.fixture(scope="module")
def executed():
    cells = [nbformat.v4.new_code_cell(text) for text in CELLS]
    client = Heard(nbformat.v4.new_notebook(cells=cells), timeout=300, allow_errors=True)
    notebook = client.execute()
    errors = [output.ename for cell in notebook.cells for output in cell.outputs if output.output_type == "error"]
    assert errors == ["ZeroDivisionError"]
    return notebook, client.displayed


def test_a_notebook_survives_the_way_to_a_page(executed):
    notebook, _ = executed
    outputs = [output for cell in notebook.cells[:4] for output in cell.outputs]
    fragments = [output.data["text/html"] for output in outputs if output.output_type == "execute_result"]
    assert [len(checked(one)) for one in fragments] == [0, 2, 0, 1]
    page, _ = HTMLExporter().from_notebook_node(notebook)
    assert page.count('src="data:image/svg+xml;base64,') == 3
    assert page.count("clearspan-still") >= 4


def test_a_bar_is_shown_in_a_notebook_and_gone_at_the_end(executed):
    notebook, displayed = executed
    drawn = [data for cell, data in displayed if cell == 4]
    assert drawn[0]["text/html"] == '<progress value="1" max="2"></progress> halves &lt;b&gt; 1/2'
    assert drawn[-1] == {"text/plain": ""}
    assert [output.data for output in notebook.cells[4].outputs] == [{"text/plain": ""}]
    assert [data for cell, data in displayed if cell == 5][-1] == {"text/plain": ""}, "also after an error"
    assert any("verify" in str(data) for cell, data in displayed if cell == 2)


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium or Chrome")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright's Python package is not installed")
    settings = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=settings)
        yield browser
        browser.close()


@pytest.mark.browser
@pytest.mark.parametrize(("theme", "ground"), [("light", (255, 255, 255)), ("dark", (17, 17, 17))])
@pytest.mark.parametrize("width", [1280, 400])
def test_pictures_are_as_dark_as_the_page_and_within_it(executed, chromium, theme, ground, width):
    notebook, _ = executed
    page_text, _ = HTMLExporter(theme=theme).from_notebook_node(notebook)
    page = chromium.new_page(viewport={"width": width, "height": 800}, java_script_enabled=False)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.set_content(re.sub(r"<script.*?</script>", "", page_text, flags=re.DOTALL))
    pictures = page.query_selector_all(".clearspan-still img")
    assert len(pictures) == 3
    for picture in pictures:
        picture.scroll_into_view_if_needed()
        assert picture.bounding_box()["width"] <= width
        assert corner(chromium, picture.screenshot()) == ground
    assert [url for url in asked if not url.startswith("data:")] == []
    page.close()


PIXEL = """async data => {
    const image = new Image();
    image.src = "data:image/png;base64," + data;
    await image.decode();
    const drawn = new OffscreenCanvas(image.width, image.height).getContext("2d");
    drawn.drawImage(image, 0, 0);
    return [...drawn.getImageData(2, image.height - 3, 1, 1).data].slice(0, 3);
}"""


def corner(chromium, picture):
    """Returns the colour of a PNG's pixel a little inside of its lower left corner."""
    page = chromium.new_page()
    found = page.evaluate(PIXEL, base64.b64encode(picture).decode())
    page.close()
    return tuple(found)
