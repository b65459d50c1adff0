"""Parts of a still picture: SVG that stands alone, light or dark as the page around it is."""

import base64
import html
import math
from collections.abc import Iterable, Sequence
from typing import Literal

from .colors import DARK, LIGHT, Theme

FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,DejaVu Sans Mono,monospace"
SIZE = 11
"""Of letters, in pixels."""
LETTER = 6.7
"""The width of one, in pixels."""

Kind = Literal["ink", "muted", "black", "white"]
Anchor = Literal["start", "middle", "end"]


def drawing(width: float, height: float, parts: Iterable[str]) -> str:
    """Returns an SVG picture of some parts, on a ground of its own.

    Its colours follow `prefers-color-scheme`, which in an image is the colour scheme of the element that shows it.
    """
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:z.0f}" height="{height:z.0f}" '
            f'viewBox="0 0 {width:z.0f} {height:z.0f}" font-family="{FONT}" font-size="{SIZE}">',
            f"<style>{_rules(LIGHT)}@media(prefers-color-scheme:dark){{{_rules(DARK)}}}</style>",
            '<rect class="ground" width="100%" height="100%"/>',
            *parts,
            "</svg>",
        ]
    )


def _rules(theme: Theme) -> str:
    """Returns a theme as style rules, by the classes that parts have."""
    lines = (f".line{n}{{stroke:{color}}}.fill{n}{{fill:{color}}}" for n, color in enumerate(theme.series))
    return (
        f".ground{{fill:{theme.ground}}}.ink{{fill:{theme.ink}}}.muted{{fill:{theme.muted}}}"
        f".rule{{stroke:{theme.rule}}}.black{{fill:#000}}.white{{fill:#fff}}.box{{fill:{theme.ground};stroke:{theme.muted}}}{''.join(lines)}"
    )


def label(
    x: float,
    y: float,
    text: str,
    *,
    anchor: Anchor = "start",
    kind: Kind = "ink",
    is_upright: bool = False,
) -> str:
    """Returns a line of text.

    Args:
        x: Of its start, middle or end.
        y: Of its middle.
        text: Shown as it is.
        anchor: Which of them `x` is.
        kind: Its colour: the theme's, or black or white, on a ground that is the same in both.
        is_upright: Whether it runs from the bottom to the top.
    """
    turn = f' transform="rotate(-90 {x + 3.8:z.1f} {y:z.1f})"' if is_upright else ""
    end = "" if anchor == "start" else f' text-anchor="{anchor}"'
    across, down = (3.8, 0) if is_upright else (0, 3.8)  # from the middle of letters to the line that they stand on
    where = f'x="{x + across:z.1f}" y="{y + down:z.1f}"'
    return f'<text class="{kind}" {where}{end}{turn}>{html.escape(printable(text))}</text>'


def headings(left: float, axis: str, unit: str) -> tuple[str, float]:
    """Returns the name of an axis above its labels, and the unit above what is to the right of them; and their width.

    Args:
        left: Where labels end.
        axis: What they are of.
        unit: What values are.
    """
    axis, unit = cut(axis, 40), cut(unit, 80)
    start = max(left, 20 + LETTER * len(axis))
    drawn = label(6, 11, axis, kind="muted") + label(start, 11, unit, kind="muted")
    return drawn, start + LETTER * len(unit) + 8


def image(x: float, y: float, width: float, height: float, data: bytes) -> str:
    """Returns a PNG stretched over a rectangle, its pixels kept sharp."""
    return (
        f'<image x="{x:z.1f}" y="{y:z.1f}" width="{width:z.1f}" height="{height:z.1f}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{base64.b64encode(data).decode()}"/>'
    )


def rule(x1: float, y1: float, x2: float, y2: float, *, kind: str = "rule", dashes: str = "") -> str:
    """Returns a thin straight line."""
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path class="{kind}" fill="none" d="M{x1:z.1f} {y1:z.1f}L{x2:z.1f} {y2:z.1f}"{dashed}/>'


def printable(text: str) -> str:
    r"""Returns a text without the characters that XML forbids, each shown by its number.

    Example:
        >>> printable("a\x00b")
        'a\\x00b'
    """
    return "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in text)


def cut(text: str, letters: int) -> str:
    """Returns a text of at most so many letters, the last one a mark where some were left out."""
    return text if len(text) <= letters else text[: letters - 1] + "…"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Returns round numbers in a range, evenly apart.

    Example:
        >>> ticks(0.0, 1.0)
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def every(labels: Sequence[str], room: float, needed: float) -> range:
    """Returns the places of labels that are shown, where each has `room` and needs more: every second, third, ..."""
    return range(0, len(labels), max(1, math.ceil(needed / room)))
