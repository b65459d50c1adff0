import io

import pytest
from rich.console import Console

from clearspan.view import show


def printed(report, width=120):
    out = io.StringIO()
    show(report, Console(file=out, width=width))
    return out.getvalue()


def test_every_part_is_printed(report):
    text = printed(report)
    for title in ("Predictions", "Logit lens", "Strongest heads", "Causal effect"):
        assert title in text
    assert "tiny/<model>" in text
    assert "1,234,567 parameters" in text


def test_tokens_are_text_and_not_markup(report):
    text = printed(report)
    assert "[red]x" in text
    assert "</script>" in text
    assert "⏎····" in text


def test_the_strongest_head_comes_first(report):
    best = int(report.heads.induction.argmax())
    rows = printed(report).split("induction", 1)[1].splitlines()
    assert rows[1].split()[0] == f"L{best // 4}H{best % 4}"


def test_effects_have_a_sign_and_two_decimals(report):
    assert f"{float(report.effect.drop[0, 0]):+.2f}" in printed(report)


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_line_is_wider_than_the_console(make_report, width):
    text = printed(make_report(list(range(8)), layers=40), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…  …" not in text
    assert "layer 0" in text
    assert "layer 39" in text


def test_a_long_text_shows_its_last_positions(make_report):
    text = printed(make_report([0] + [4] * 99))
    assert "Showing the last 64 of 100 positions." in text
    assert "\n   36 " in text.replace("    36", "   36")
    assert "  35  [red]x" not in text
