"""How a token is written where it is looked at: white space visible, and nothing in it read as markup."""

import html
from collections.abc import Sequence

VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "·"})


def visible(token: str, width: int | None = None) -> str:
    r"""Returns a token with its white space and control characters visible, cut to `width` characters.

    Example:
        >>> visible("\n    return", width=8)
        '⏎····re…'
    """
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in token.translate(VISIBLE)) or "∅"
    return shown if width is None or len(shown) <= width else shown[: width - 1] + "…"


def id_label(token: int) -> str:
    """Returns how a token is written that has no text: a model without a tokenizer has none.

    Example:
        >>> id_label(5)
        '#5'
    """
    return f"#{token}"


def plotly_text(token: str, width: int | None = None) -> str:
    """Returns a token for a Plotly label, in which Plotly would read `<b>` and `&lt;` as markup.

    Example:
        >>> plotly_text("<b>")
        '&lt;b&gt;'
    """
    return html.escape(visible(token, width), quote=False)


def as_plotly(texts: Sequence[str]) -> list[str]:
    """Returns texts that show as they are in Plotly."""
    return [html.escape(text, quote=False) for text in texts]


def positions(tokens: Sequence[str]) -> list[str]:
    """Returns one Plotly category for each position, unique where a token's text occurs twice.

    Example:
        >>> positions(["a", "a"])
        ['0 a', '1 a']
    """
    return as_plotly(numbered(tokens))


def numbered(tokens: Sequence[str]) -> list[str]:
    """Returns each token with its position, which makes it unique.

    Example:
        >>> numbered(["<b>", "a"])
        ['0 <b>', '1 a']
    """
    return [f"{position} {visible(token, 24)}" for position, token in enumerate(tokens)]
