import base64
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from plotly.offline import get_plotlyjs

from clearspan.view import html_page


class Elements(HTMLParser):
    """Every element's tag, attributes and the text directly in it."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), []))

    def handle_data(self, data):
        if self.found:
            self.found[-1][2].append(data)

    def of(self, tag, **attrs):
        return [
            (a, "".join(text)) for t, a, text in self.found if t == tag and all(a.get(k) == v for k, v in attrs.items())
        ]


@pytest.fixture(scope="module")
def text(report):
    return html_page(report)


@pytest.fixture(scope="module")
def elements(text):
    return Elements(text)


@pytest.fixture(scope="module")
def data(elements):
    [(_, content)] = elements.of("script", id="data")
    return json.loads(content)


def test_nothing_is_fetched(text, elements):
    """No element names a resource, no style imports one; what Plotly's own source mentions is not asked for."""
    for tag, attrs, _ in elements.found:
        assert not {"src", "href", "srcset", "action", "poster", "data"} & set(attrs), (tag, attrs)
        assert tag not in {"link", "iframe", "object", "embed", "img", "base"}
    styles = "".join(content for _, content in elements.of("style"))
    assert "url(" not in styles
    assert "@import" not in styles
    ours = text.replace(get_plotlyjs(), "")
    assert "http://" not in ours
    assert "https://" not in ours


def test_plotly_is_in_the_page(text):
    assert get_plotlyjs() in text


def test_the_texts_own_markup_stays_text(text, elements):
    assert len(elements.of("script")) == 4
    assert all(re.fullmatch(r"[01]\.\d{3}\s*", content) for _, content in elements.of("b"))
    assert [content.strip() for _, content in elements.of("h1")] == ["tiny/<model>"]
    assert "<b>bold</b>" not in text


def test_every_token_is_a_span_that_knows_its_place(elements, report):
    spans = [a for a, _ in elements.of("span", **{"class": "token"})]
    assert [int(a["data-token"]) for a in spans] == list(range(len(report.tokens)))


def test_data_holds_the_figures_and_the_predictions(data, report):
    assert set(data["figures"]) == {"lens", "induction", "previous", "pattern", "effect"}
    label, probability, guesses = data["tokens"][2]
    assert label == "<b>bold</b>"
    assert probability == pytest.approx(float(report.predictions.token_probs[2]), abs=5e-5)
    assert [p for _, p in guesses] == pytest.approx(report.predictions.top_probs[2].tolist(), abs=5e-5)


def unpacked(elements, report, size):
    [(_, content)] = elements.of("script", id="packed")
    shares = torch.frombuffer(bytearray(base64.b64decode(content)), dtype=torch.uint16).to(torch.float32) / 65535
    return shares.reshape(*report.patterns.shape[:2], size, size)


def test_all_attention_is_in_the_page(elements, data, report):
    size = data["attention"]["size"]
    assert size == len(report.tokens)
    torch.testing.assert_close(unpacked(elements, report, size), report.patterns, rtol=0, atol=1e-5)


def test_a_long_text_keeps_its_last_positions(make_report):
    report = make_report([0, 1, 2, 3, 4, 5, 6, 7] * 2)
    # Room for 12 heads of 5 x 5 positions, two bytes each, as base64.
    text = html_page(report, attention_bytes=12 * 25 * 2 * 4 // 3)
    assert "The last 5 of 16 positions are shown" in text
    torch.testing.assert_close(unpacked(Elements(text), report, 5), report.patterns[..., -5:, -5:], rtol=0, atol=1e-5)
