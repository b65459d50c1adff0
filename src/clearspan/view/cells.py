"""What tables in the terminal are made of: tokens, numbers and bars that keep to a width and hold nothing hostile."""

import math
from collections.abc import Iterable

from rich.color import Color, blend_rgb
from rich.color_triplet import ColorTriplet
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

from clearspan.plots import visible

BAR = 14
"""Cells of a whole bar."""
WHITE, GREY = ColorTriplet(255, 255, 255), ColorTriplet(98, 110, 120)
BLUE, RED, GREEN = ColorTriplet(22, 105, 170), ColorTriplet(178, 60, 36), ColorTriplet(20, 122, 120)


def table(*columns: str, right: Iterable[str] = ()) -> Table:
    """Returns an empty table without lines; some of its columns are set to the right."""
    found = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        found.add_column(Text(column), justify="right" if column in right else "left", no_wrap=True)
    return found


def print_part(console: Console, title: str, note: str, *bodies: RenderableType) -> None:
    """Prints what a part of a page is called, and its tables below that, set in."""
    console.print(Text.assemble((title, "bold"), "  ", (note, "dim")))
    for body in bodies:
        console.print(Padding(body, (0, 0, 0, 2), expand=False))


def token(text: str, cells: int, style: str | Style = "") -> Text:
    r"""Returns a token that takes so many cells of the terminal at most, with white space visible.

    A wide character counts as the two cells that it takes.

    Example:
        >>> token("[b]\n", 9).plain, token("東京都", 5).plain
        ('[b]⏎', '東京…')
    """
    return cut(visible(text), cells, style)


def cut(text: str, cells: int, style: str | Style = "") -> Text:
    """Returns a text, in which Rich reads no markup, cut to so many cells of the terminal."""
    found = Text(text, style=style)
    found.truncate(cells, overflow="ellipsis")
    return found


def plain(text: str) -> Text:
    r"""Returns a text as it is, lines and tabs included; what would steer the terminal is written out.

    Example:
        >>> plain("a\x1b[31m\nb").plain
        'a\\x1b[31m\nb'
    """
    return Text("".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text))


def probability(share: float) -> str:
    """Returns a probability to two decimals, a small one to four, so that none but 0 itself reads as 0.

    Example:
        >>> [probability(share) for share in (1.0, 0.256, 0.00042, 1e-9, 0.0)]
        ['1.00', '0.26', '0.0004', '<0.0001', '0.00']
    """
    if 0 < share < 0.00005:
        return "<0.0001"
    return f"{share:z.4f}" if 0 < share < 0.00995 else f"{share:z.2f}"


def signed(value: float, bound: float, up: ColorTriplet, down: ColorTriplet) -> Text:
    """Returns a change with its sign, on a ground as strong as its share of a bound; a dot for next to nothing.

    Args:
        value: The change; NaN for none.
        bound: What has the full colour.
        up: The colour of what is more than 0.
        down: Of what is less.
    """
    if math.isnan(value):
        return Text("")
    if abs(value) < 0.005:
        return Text("· ", style="dim")
    return Text(f"{value:+z.2f} ", style=ground(abs(value) / max(bound, 1e-9), up if value > 0 else down))


def ground(share: float, color: ColorTriplet) -> Style:
    """Returns a style for a share from 0 to 1: dim, plain, then a ground that can be seen on black and on white."""
    if not share >= 0.15:
        return Style(dim=not share >= 0.05)
    blended = blend_rgb(GREY, color, min(share, 1.0))
    return Style(color=Color.from_triplet(WHITE), bgcolor=Color.from_triplet(blended))


def bar(share: float, cells: int, style: str | Style = "cyan") -> Text:
    """Returns a bar of so many cells where the share is 1; what is more than nothing has a cell."""
    share = 0.0 if math.isnan(share) else min(max(share, 0.0), 1.0)
    filled = max(round(cells * share), int(share > 0))
    return Text.assemble(("━" * filled, style), " " * (cells - filled))


def chunks(count: int, size: int) -> list[range]:
    """Returns the numbers below a count in runs of a size, the last one being as long as what is left.

    Example:
        >>> chunks(5, 2)
        [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [range(start, min(start + size, count)) for start in range(0, count, max(1, size))]
