"""Fragments of HTML that a notebook shows: headings, tables, and pictures, without a script.

What a fragment is made of stays where notebooks are not trusted and pages are cleaned: plain elements, inline styles of
plain properties, pictures as images. Text has the colour that the page gives it; a picture has its own ground.
"""

import base64
import html
from collections.abc import Sequence

from .chart import Chart
from .charts import MONOSPACE
from .marks import cut, printable

MOST_BYTES = 60_000
"""Of a fragment. What would make it larger is left out, and it says so."""
MOST_OF_A_PICTURE = 32_000
MOST_LETTERS = 100
"""Of a cell of a table."""

_DARK_PAGES = (
    "[data-jp-theme-light=false]",
    ".vscode-dark",
    ".vscode-high-contrast",
    "[theme=dark]",
    "[data-theme=dark]",
)
_STYLE = f"<style>:is({','.join(_DARK_PAGES)}) .clearspan-still img{{color-scheme:dark}}</style>"
"""Tells pictures of the pages that are dark without saying so by `color-scheme`: JupyterLab, VS Code, Colab, Sphinx."""


def fragment(*parts: str) -> str:
    """Returns parts as one fragment of at most `MOST_BYTES`.

    Example:
        >>> fragment(heading("a < b")).count("<b>a &lt; b</b>")
        1
    """
    shown, left, size = [], 0, 400
    for part in filter(None, parts):
        size += len(part.encode())
        shown, left = ([*shown, part], left) if size <= MOST_BYTES else (shown, left + 1)
    rest = paragraph("the rest is too large for a notebook's cell") if left else ""
    return f'<div class="clearspan-still">{_STYLE}{"".join(shown)}{rest}</div>'


def heading(text: str) -> str:
    """Returns a first line."""
    return f'<p style="margin:4px 0"><b>{_escaped(cut(text, 400))}</b></p>'


def paragraph(text: str) -> str:
    """Returns a line; nothing for no text."""
    return f'<p style="margin:4px 0;font-size:12px">{_escaped(cut(text, 600))}</p>' if text else ""


def still(chart: Chart, alternative: str) -> str:
    """Returns a chart as an image, and what it leaves out in words.

    Args:
        chart: What is drawn.
        alternative: What it shows, in words, for those who do not see it.
    """
    picture = chart.svg()
    if len(picture) > MOST_OF_A_PICTURE:
        return paragraph("too large a picture for a notebook's cell: .plot() draws it")
    data = base64.b64encode(picture.encode()).decode()
    shown = f'<img alt="{_escaped(alternative)}" style="max-width:100%" src="data:image/svg+xml;base64,{data}">'
    return shown + paragraph(chart.note)


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]], are_numbers: Sequence[bool]) -> str:
    """Returns a table of texts; nothing where it has no column.

    Args:
        columns: Their names.
        rows: A text for each column.
        are_numbers: Whether each column is of numbers, which are set to the right.
    """
    if not columns:
        return ""
    sides = ["right" if is_number else "left" for is_number in are_numbers]

    def line(kind: str, cells: Sequence[str]) -> str:
        texts = zip(cells, sides, strict=True)
        drawn = (
            f'<{kind} style="text-align:{side};padding:2px 8px">{_escaped(cut(text, MOST_LETTERS))}</{kind}>'
            for text, side in texts
        )
        return f"<tr>{''.join(drawn)}</tr>"

    style = f"border-collapse:collapse;font-size:12px;font-family:{html.escape(MONOSPACE)}"
    body = "".join(line("td", row) for row in rows)
    return f'<table style="{style}"><thead>{line("th", columns)}</thead><tbody>{body}</tbody></table>'


def folded(name: str, part: str) -> str:
    """Returns a part that opens where its name is clicked; nothing for no part."""
    return f'<details><summary style="font-size:12px">{_escaped(name)}</summary>{part}</details>' if part else ""


def _escaped(text: str) -> str:
    return html.escape(printable(text))
