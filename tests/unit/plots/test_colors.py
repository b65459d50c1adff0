import pytest

from clearspan.plots.colors import DARK, DIVERGING, LIGHT, SEQUENTIAL, color_at, contrast, ink_on

READABLE = 4.5


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_text_is_readable_and_lines_are_seen_in_both_themes(theme):
    for color in (theme.ink, theme.muted, *theme.series):
        assert contrast(color, theme.ground) >= READABLE


@pytest.mark.parametrize("colors", [SEQUENTIAL, DIVERGING])
def test_ink_is_readable_on_every_value(colors):
    grounds = [color_at(number / 500, colors) for number in range(501)]
    assert min(contrast(ink_on(ground), ground) for ground in grounds) >= READABLE


def test_contrast_is_that_of_the_guideline():
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)
    assert contrast("#ffffff", "#ffffff") == 1
