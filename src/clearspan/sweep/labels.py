"""Labels: which token stands at each position, for the axes of a finding."""

from collections.abc import Iterable, Mapping

from clearspan.bridge import TransformerBridge
from clearspan.inputs import Batch

POSITION_AXES = ("position", "key_position", "query_position")
_WIDTH = 24
"""Characters of a token that are shown."""


def position_texts(
    bridge: TransformerBridge, batch: Batch, axes: Mapping[str, Iterable[object]]
) -> dict[str, tuple[str, ...]]:
    r"""Returns a text for each place on the axes of positions: `3 import` where all rows that have it have that token.

    Args:
        bridge: The model, whose tokenizer reads the tokens; without one they are written as ids.
        batch: The rows.
        axes: Places on each axis by name; a position counts among a row's real tokens. Several at once are a tuple.

    Returns:
        By axis, one text a place, with white space visible; none for an axis where rows have no token in common.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> batch = bridge.to_batch(["import os", "import re"])
        >>> position_texts(bridge, batch, {"layer": range(2), "position": [1, 2, (0, 1)]})
        {'position': ('1 import', '2', '0, 1 <|endoftext|>import')}
    """
    if batch.tokens is None:
        return {}
    rows = [[row[column] for column in own] for row, own in zip(batch.tokens.tolist(), batch.real_columns, strict=True)]

    def text_of(place: object) -> str:
        own = place if isinstance(place, tuple) else (place,)
        return f"{plain(place)} {''.join(map(token_at, own))}".rstrip()

    def plain(place: object) -> str:
        return ", ".join(map(str, place if isinstance(place, tuple) else (place,)))

    def token_at(position: object) -> str:
        if not isinstance(position, int):
            return ""
        found = {row[position] for row in rows if -len(row) <= position < len(row)}
        return bridge.text.label(found.pop(), _WIDTH) if len(found) == 1 else ""

    places = {axis: tuple(axes[axis]) for axis in POSITION_AXES if axis in axes}
    found = {axis: tuple(map(text_of, own)) for axis, own in places.items()}
    return {axis: texts for axis, texts in found.items() if texts != tuple(map(plain, places[axis]))}
