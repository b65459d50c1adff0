"""Tokens as HTML, each on a ground as strong as its value."""

import html
import math
from collections.abc import Sequence

from .charts import DIVERGING, MONOSPACE, SEQUENTIAL
from .labels import visible


def color_at(share: float, colors: Sequence[str]) -> str:
    """Returns the colour at a share, from 0 to 1, of the way through colours `#rrggbb`.

    Example:
        >>> color_at(0.5, ("#000000", "#ffffff"))
        '#808080'
    """
    place = min(max(share, 0.0), 1.0) * (len(colors) - 1)
    before = min(int(place), len(colors) - 2)
    pair = zip(_channels(colors[before]), _channels(colors[before + 1]), strict=True)
    return "#" + "".join(f"{round(low + (high - low) * (place - before)):02x}" for low, high in pair)


def shaded_tokens(
    tokens: Sequence[str], values: Sequence[float], *, bound: float, sequential: bool, marked: int | None = None
) -> str:
    """Returns tokens in a line of HTML, with white space visible; the value shows under the pointer.

    Args:
        tokens: Their texts.
        values: One for each; NaN for none.
        bound: The value at which the colours end.
        sequential: Whether colours run from 0 up, and not from both sides of 0.
        marked: The token that has a frame.

    Example:
        >>> shaded_tokens(["<b>"], [1.0], bound=1.0, sequential=True).count("&lt;b&gt;")
        1
    """
    spans = [
        _span(token, value, bound, sequential, place == marked)
        for place, (token, value) in enumerate(zip(tokens, values, strict=True))
    ]
    return f'<span style="font-family:{html.escape(MONOSPACE)};white-space:pre-wrap">{"".join(spans)}</span>'


def _span(token: str, value: float, bound: float, sequential: bool, is_marked: bool) -> str:
    share = value / bound if bound else 0.0
    style = "border-radius:2px;padding:1px 0"
    if not math.isnan(value):
        ground = color_at(share, SEQUENTIAL) if sequential else color_at((share + 1) / 2, DIVERGING)
        red, green, blue = _channels(ground)
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
        style += f";background:{ground};color:{'#ffffff' if is_dark else '#1b1b1b'}"
    if is_marked:
        style += ";outline:2px solid #b0432a"
    return f'<span style="{style}" title="{value:.4g}">{html.escape(visible(token))}</span>'


def _channels(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
