"""Numbers as HTML: tokens and tables, each on a ground as strong as its value."""

import html
import itertools
import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from .charts import MONOSPACE, Span, ends
from .colors import DIVERGING, SEQUENTIAL, color_at, ink_on
from .labels import visible


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
    bound = max(bound, 1e-12)
    span, colors = ((0.0, bound), SEQUENTIAL) if sequential else ((-bound, bound), DIVERGING)
    spans = []
    for place, (token, value) in enumerate(zip(tokens, values, strict=True)):
        style = f"border-radius:2px;padding:1px 0{_ground(value, span, colors)}"
        style += ";outline:2px solid #b0432a" if place == marked else ""
        spans.append(f'<span style="{style}" title="{value:.4g}">{html.escape(visible(token))}</span>')
    return f'<span style="font-family:{html.escape(MONOSPACE)};white-space:pre-wrap">{"".join(spans)}</span>'


def shaded_tables(
    values: Tensor, labels: Mapping[str, Sequence[str]], *, caption: str = "", span: Span | None = None
) -> str:
    """Returns values as HTML tables, each cell on a ground as strong as its value.

    The last axis runs from left to right, the one before it down; there is one table for each place on all others.

    Args:
        values: The numbers, of one axis or more.
        labels: Texts of the places on each axis, by name.
        caption: Above the tables.
        span: Where the colours end. By default they run from 0, or as far to both sides of it.

    Example:
        >>> import torch
        >>> page = shaded_tables(torch.tensor([[0.5, -1.0]]), {"layer": ["0"], "head": ["0", "1"]})
        >>> page.count("<td"), "-1.000" in page
        (2, True)
    """
    *others, last = labels
    down = others.pop() if others else ""
    cells = values.detach().double().cpu().reshape(-1, len(labels[down]) if down else 1, len(labels[last]))
    found, colors = ends(cells, span)
    heads = "".join(f"<th>{html.escape(text)}</th>" for text in labels[last])
    style = f"border-collapse:separate;border-spacing:1px;font:12px {html.escape(MONOSPACE)};text-align:right"
    tables = []
    for at, block in zip(itertools.product(*(labels[axis] for axis in others)), cells.tolist(), strict=True):
        name = ", ".join(f"{axis} {text}" for axis, text in zip(others, at, strict=True))
        lines = [f"<tr><th>{html.escape(down)}</th>{heads}</tr>"]
        for text, row in zip(labels[down] if down else [""], block, strict=True):
            drawn = "".join(
                f'<td style="padding:2px 6px{_ground(one, found, colors)}">{_cell(one)}</td>' for one in row
            )
            lines.append(f"<tr><th>{html.escape(text)}</th>{drawn}</tr>")
        heading = f"<caption>{html.escape(name)}</caption>" if name else ""
        tables.append(f'<table style="{style}">{heading}{"".join(lines)}</table>')
    by = html.escape(f"{down} down, {last} across" if down else last)
    return f"<div><p>{html.escape(caption)}<br>{by}</p>{''.join(tables)}</div>"


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:z.3f}"


def _ground(value: float, span: Span, colors: Sequence[str]) -> str:
    """Returns the style of a value's ground and of the ink on it; nothing for NaN."""
    if math.isnan(value):
        return ""
    low, high = span
    ground = color_at((value - low) / (high - low), colors)
    return f";background:{ground};color:{ink_on(ground)}"
