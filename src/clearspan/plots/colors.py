"""Colours: scales of values, of lines, and of the two themes; and how well one is read on another."""

from collections.abc import Sequence
from dataclasses import dataclass

SEQUENTIAL = ("#f1f0ea", "#b9cfd9", "#5d96b5", "#215f86", "#0f3350")
DIVERGING = ("#1f6f78", "#8dbdb9", "#f1f0ea", "#e3a184", "#b0432a")
SERIES = ("#215f86", "#b0432a", "#1f6f78", "#8a6d1d", "#6b4c86", "#4d5a5f")
"""Colours of lines, in their order."""


@dataclass(frozen=True)
class Theme:
    """Colours of a picture.

    Attributes:
        ground: Behind all.
        ink: Of text.
        muted: Of text that matters less.
        rule: Of axes and thin lines.
        series: Of lines and bars, in their order.
    """

    ground: str
    ink: str
    muted: str
    rule: str
    series: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1b1b1b", "#5f5c54", "#d5d2c8", SERIES)
DARK = Theme(
    "#111111", "#e8e6df", "#a5a298", "#45433d", ("#7fb8dc", "#f09a80", "#6cc4c9", "#d9bd62", "#c3a3de", "#b4c1c6")
)


def color_at(share: float, colors: Sequence[str]) -> str:
    """Returns the colour at a share, from 0 to 1, of the way through colours `#rrggbb`.

    Example:
        >>> color_at(0.5, ("#000000", "#ffffff"))
        '#808080'
    """
    place = min(max(share, 0.0), 1.0) * (len(colors) - 1)
    before = min(int(place), len(colors) - 2)
    pair = zip(channels(colors[before]), channels(colors[before + 1]), strict=True)
    return "#" + "".join(f"{round(low + (high - low) * (place - before)):02x}" for low, high in pair)


def contrast(color: str, other: str) -> float:
    """Returns the contrast of two colours, from 1 to 21, as WCAG 2 defines it; small text needs 4.5.

    Example:
        >>> round(contrast("#000000", "#ffffff"))
        21
    """
    low, high = sorted(map(_luminance, (color, other)))
    return (high + 0.05) / (low + 0.05)


def ink_on(ground: str) -> str:
    """Returns black or white, whichever is read better on a ground: at least 4.5 to 1 on any."""
    return max("#000000", "#ffffff", key=lambda ink: contrast(ink, ground))


def channels(color: str) -> tuple[int, int, int]:
    """Returns red, green and blue of a colour `#rrggbb`, each from 0 to 255."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def _luminance(color: str) -> float:
    shares = [channel / 255 for channel in channels(color)]
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
