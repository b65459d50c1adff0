import inspect
import textwrap
from html.parser import HTMLParser

import pytest
import torch
from tests.unit.view.test_packing import unpacked

import clearspan
from clearspan.analysis import CausalEffect, ModelFacts, Report, head_scores, logit_lens, predictions
from clearspan.analysis.words import Words
from clearspan.errors import InvalidArgumentError
from clearspan.view import headline, html_page
from clearspan.view.page import _parts


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


def data_of(elements):
    [(_, content)] = elements.of("script", id="data")
    return unpacked(content)


@pytest.fixture(scope="module")
def data(elements):
    return data_of(elements)


def test_nothing_is_fetched(text, elements):
    """No element names a resource, no style imports one, and the policy lets nothing be fetched."""
    for tag, attrs, _ in elements.found:
        assert not {"src", "href", "srcset", "action", "poster", "data", "style"} & set(attrs), (tag, attrs)
        assert tag not in {"link", "iframe", "object", "embed", "img", "base"}
    [(_, style)] = elements.of("style")
    assert "url(" not in style
    assert "@import" not in style
    assert "http://" not in text
    assert "https://" not in text
    [(policy, _)] = elements.of("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy["content"]


def test_there_is_no_plotly_in_the_page(text):
    assert "plotly" not in (text + _parts().drawings).lower()


def test_the_texts_own_markup_stays_text(text, elements):
    assert len(elements.of("script")) == 3
    assert not elements.of("b")
    assert [content.strip() for _, content in elements.of("p", **{"class": "brand"})] == [
        "clearspan report on tiny/<model>"
    ]
    assert "<b>bold</b>" not in text


def test_every_token_is_a_span(elements, report):
    assert len(elements.of("span", **{"class": "token"})) == len(report.tokens)


def test_without_scripts_the_page_says_what_is_missing(elements):
    [(_, said)] = elements.of("p", **{"class": "missing"})
    assert "scripts, which do not run here" in said
    assert "The text and the last prediction follow." in said


def test_data_holds_what_the_page_draws(data, report):
    def near(found, expected, step):
        torch.testing.assert_close(found, expected.double(), rtol=0, atol=step, equal_nan=True)

    near(data["probabilities"], report.predictions.token_probs, 1e-5)
    near(data["guesses"]["probabilities"], report.predictions.top_probs, 1e-5)
    near(data["lens"]["probabilities"], report.lens.top_probs, 1e-5)
    near(data["lens"]["own"], report.lens.final_probs, 1e-5)
    near(data["effect"]["drop"], report.effect.drop, 2e-5)
    near(data["heads"][0]["values"], report.heads.induction, 1e-5)
    near(data["heads"][1]["values"], report.heads.previous_token, 1e-5)
    near(data["attention"]["patterns"], report.patterns.tril(), 1 / 508 + 1e-6)
    said = [[data["words"][i] for i in row] for row in data["lens"]["ids"]]
    assert said[0][:3] == ["<s>", "</script>", "<b>bold</b>"]
    assert data["lens"]["ranks"] == report.lens.final_ranks.tolist()


def test_a_long_text_keeps_its_last_positions(make_report):
    report = make_report([0, 1, 2, 3, 4, 5, 6, 7] * 2)
    # Room for 12 heads of a triangle of 5 positions, which has 15 places.
    data = data_of(Elements(html_page(report, attention_bytes=12 * 15)))
    assert data["attention"]["first"] == 11
    found, expected = data["attention"]["patterns"], report.patterns[..., -5:, -5:].tril().double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1 / 508 + 1e-6)


def test_tokens_that_would_turn_the_line_are_escaped(make_report):
    report = make_report([0, 1, 2])
    hostile = {0: "\u202eevil\u2066", 1: "</script><script>alert(1)</script>", 2: "\"'`&amp;"}
    object.__setattr__(report, "words", type(report.words)(hostile))
    text = html_page(report)
    assert "\u202e" not in text
    assert "\\x202eevil\\x2066" in text
    elements = Elements(text)
    assert len(elements.of("script")) == 3
    assert data_of(elements)["tokens"][1:] == [hostile[1], hostile[2]]


# --- headline --------------------------------------------------------------------------------------------------------


def with_drop(make_report, drop):
    """A report in which replacing the stream costs so many nats, by layer and position."""
    report = make_report([0, 1, 2, 3])
    effect = report.effect
    values = effect.base["log probability"] - torch.tensor(drop)[..., None]
    object.__setattr__(effect, "values", {"log probability": values})
    return report


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        (3.0, "; most of it comes from <b>bold</b> at 2"),
        (0.4, "; it depends most on <b>bold</b> at 2"),
        (0.05, "; no single earlier token decides it"),
    ],
)
def test_the_headline_names_the_token_without_which_the_prediction_falls(make_report, drop, said):
    report = with_drop(make_report, [[9.0, 0.0, 0.0, 8.0], [9.0, 0.0, drop, 8.0], [0.0, -7.0, 0.0, 8.0]])
    assert str(headline(report)) == f"predicts {headline(report).token}, 0.78{said}"


def test_a_text_of_one_token_has_no_cause(make_report):
    assert headline(make_report([0])).cause is None


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_report_is_saved_and_opened(report, tmp_path, monkeypatch):
    report.save(tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == report.to_html() == html_page(report)
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    path = report.show()
    assert opened == [path.as_uri()]
    assert path.read_text(encoding="utf-8") == report.to_html()


def test_a_page_that_cannot_be_written(report, tmp_path):
    with pytest.raises(InvalidArgumentError, match="there is no folder"):
        report.save(tmp_path / "none" / "a.html")
    with pytest.raises(InvalidArgumentError, match="expected: Report"):
        clearspan.open_report("report")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("count", "most"), [(50, 250_000), (488, 2_500_000)])
def test_pages_are_small(count, most):
    bridge = clearspan.boot("tiny-bigcode")
    ids = bridge.to_tokens(inspect.getsource(textwrap))[:, :count]
    size = len(html_page(report_without_effect(bridge, ids)).encode())
    assert size <= most, size


def report_without_effect(bridge, ids):
    """A report whose causal effect is random: it takes as much room, and finding it takes long."""
    layers, count = bridge.cfg.n_layers, ids.shape[1]
    _, cache = bridge.run_with_cache(ids, [f"blocks.{layer}.attn.hook_pattern" for layer in range(layers)])
    found, lens = predictions(bridge, ids), logit_lens(bridge, ids)
    shown = torch.cat([ids[0], found.top_ids.flatten(), lens.top_ids.flatten()]).unique().tolist()
    return Report(
        ModelFacts(bridge.cfg.model_name, "GPTBigCode", 0, layers, bridge.cfg.n_heads, 256, 512, 4096),
        str(bridge.to_string(ids[0])),
        tuple(ids[0].tolist()),
        Words({token: bridge.text.word(token) for token in shown}),
        found,
        lens,
        head_scores(bridge),
        CausalEffect(
            {"log probability": -torch.rand(layers, count, 1)},
            {"layer": tuple(range(layers)), "position": tuple(range(count))},
            {"log probability": torch.tensor([-0.5])},
            targets=(int(found.top_ids[-1, 0]),),
        ),
        torch.stack([cache["pattern", layer][0] for layer in range(layers)]),
    )
