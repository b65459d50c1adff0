import pytest

from clearspan.plots import plotly_text, positions, visible


@pytest.mark.parametrize(
    ("token", "shown"),
    [("\n  x", "⏎··x"), ("\t\r", "⇥␍"), ("", "∅"), ("\x00", "\\x00"), ("\u200b", "\\x200b"), ("é", "é")],
)
def test_white_space_and_control_characters_are_visible(token, shown):
    assert visible(token) == shown


def test_a_long_token_is_cut_to_the_width():
    assert visible("return_value", 6) == "retur…"
    assert visible("return", 6) == "return"


def test_markup_is_text_in_a_figure():
    assert plotly_text("<a href='x'>&lt;") == "&lt;a·href='x'&gt;&amp;lt;"


def test_positions_are_unique():
    assert positions(["a", "a", " "]) == ["0 a", "1 a", "2 ·"]
