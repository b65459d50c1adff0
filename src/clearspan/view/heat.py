"""Effects in the terminal: heat tables, each number on a ground as strong as its size."""

import itertools
from collections.abc import Iterator, Sequence

from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clearspan.effects import Draws, Effects

from .cells import BLUE, RED, chunks, cut, print_part, signed, table

LEAST = 0.05
"""The share of the full colour that a row needs somewhere, to be kept where tables are folded."""


def show_effects(
    found: Effects, console: Console, *, title: str = "Effects", draws: Draws = "change", full: bool = False
) -> None:
    """Prints the effects of the first metric: a heat table for each place on all axes but the last two.

    An axis whose places have texts, such as tokens, runs down.

    Args:
        found: On one axis or more.
        console: Where. No line is wider than it.
        title: What the effects are of.
        draws: As in `Effects.plot`.
        full: Whether rows with next to nothing in them are kept.
    """
    values, (*others, down, across) = _drawn(found, draws), ["", *found.axes]
    if not down or (across in found.texts and down not in found.texts):
        values, down, across = values.unsqueeze(-2).mT if not down else values.mT, across, down
    rows = found.labels[down] if down in found.texts else [f"{down} {place}" for place in found.labels[down]]
    columns = [f"{across} {place}" for place in found.labels[across]] if across else ["change"]
    bound = 1.0 if draws == "share" else values.abs().nan_to_num().max().item()
    blocks = values.reshape(-1, len(rows), len(columns))
    others = [axis for axis in others if axis]
    for at, block in zip(itertools.product(*(found.labels[axis] for axis in others)), blocks, strict=True):
        kept = range(len(rows)) if full else _kept(block, LEAST * bound)
        note = f"{down} down" + (f", {across} across" if across else "")
        if len(kept) < len(rows):
            note += f"; {len(rows) - len(kept)} of {len(rows)} rows, all near 0, left out"
        tables = _tables(block[list(kept)], [rows[row] for row in kept], columns, bound, console.width)
        places = [f"{axis} {place}" for axis, place in zip(others, at, strict=True)]
        console.print()
        print_part(console, ", ".join(places) or title, note, *tables)


def _drawn(found: Effects, draws: Draws) -> Float[Tensor, "*place"]:
    match draws:
        case "share":
            return found.normalised()
        case "value":
            return found.mean()
        case "change":
            return found.change().nanmean(-1)


def _kept(block: Float[Tensor, "down across"], least: float) -> list[int]:
    """Returns the rows in which something is not next to nothing."""
    return [row for row, values in enumerate(block) if (values.abs() > least).any()]


def _tables(
    block: Float[Tensor, "down across"], rows: Sequence[str], columns: Sequence[str], bound: float, width: int
) -> Iterator[Table]:
    """Yields tables of as many columns as the width has room for."""
    labels = [cut(row, 20) for row in rows]
    room = width - 4 - max((label.cell_len for label in labels), default=0)
    cell = max(6, *(cut(column, 20).cell_len for column in columns))
    for some in chunks(len(columns), max(1, room // (cell + 2))):
        names = [columns[column] for column in some]
        found = table("", *names, right=names)
        for label, values in zip(labels, block[:, some].tolist(), strict=True):
            found.add_row(label, *(signed(value, bound, BLUE, RED) for value in values))
        yield found
