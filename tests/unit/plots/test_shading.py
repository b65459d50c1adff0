import math
import re

import pytest

from clearspan.plots import DIVERGING, SEQUENTIAL
from clearspan.plots.shading import color_at, shaded_tokens


def grounds(page):
    return re.findall(r"background:(#[0-9a-f]{6})", page)


@pytest.mark.parametrize("colors", [SEQUENTIAL, DIVERGING])
def test_colours_are_met_where_they_lie_and_end_at_the_ends(colors):
    for number, color in enumerate(colors):
        assert color_at(number / (len(colors) - 1), colors) == color
    assert color_at(-1, colors) == colors[0]
    assert color_at(2, colors) == colors[-1]


def test_between_two_colours_every_channel_is_between():
    assert color_at(0.25, ("#000000", "#4080c0")) == "#102030"


def test_values_are_colours_from_0_or_from_both_sides_of_it():
    assert grounds(shaded_tokens("abc", [0.0, 1.0, 2.0], bound=2, sequential=True)) == [
        SEQUENTIAL[0],
        SEQUENTIAL[2],
        SEQUENTIAL[4],
    ]
    assert grounds(shaded_tokens("abc", [-2.0, 0.0, 2.0], bound=2, sequential=False)) == [
        DIVERGING[0],
        DIVERGING[2],
        DIVERGING[4],
    ]


def test_ink_is_light_on_dark_ground():
    page = shaded_tokens("ab", [0.0, 1.0], bound=1, sequential=True)
    assert re.findall(r";color:(#\w+)", page) == ["#000000", "#ffffff"]


def test_no_value_has_no_ground_and_no_bound_has_the_lowest():
    assert grounds(shaded_tokens("ab", [math.nan, 0.0], bound=0, sequential=True)) == [SEQUENTIAL[0]]


def test_tokens_are_text_with_visible_space_and_one_is_framed():
    page = shaded_tokens(["<b>", "\n x"], [1.0, 0.5], bound=1, sequential=True, marked=1)
    assert re.findall(r'title="([^"]*)">([^<]*)<', page) == [("1", "&lt;b&gt;"), ("0.5", "⏎·x")]
    assert page.index("outline:") > page.index("&lt;b&gt;")
    assert page.count("outline:") == 1
