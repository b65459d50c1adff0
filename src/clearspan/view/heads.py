"""Scores of heads in the terminal: the strongest by each score, side by side, or all of them."""

from collections.abc import Iterator

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from clearspan.analysis import strongest
from clearspan.effects import Effects

from .cells import BAR, BLUE, bar, chunks, ground, print_part, table


def show_head_scores(found: Effects, console: Console, *, top: int = 10, full: bool = False) -> None:
    """Prints the heads with the highest scores.

    Args:
        found: Scores from 0 to 1, by layer and head.
        console: Where. No line is wider than it.
        top: How many heads of each score.
        full: Whether all heads of every layer are shown.
    """
    title = "All heads" if full else "Strongest heads"
    print_part(console, title, found.what, *head_tables(found, console.width, None if full else top))


def head_tables(found: Effects, width: int, top: int | None) -> Iterator[RenderableType]:
    """Yields the strongest heads by each score, side by side; where `top` is None, a grid of all heads for each."""
    if top is not None:
        yield Columns([_bars(found, score, top) for score in found.values], padding=(0, 3))
        return
    for score in found.values:
        yield from _grid(found, score, width)


def _bars(found: Effects, score: str, top: int) -> Table:
    one = table(_titled(score), "", "score", right=("score",))
    for head in strongest(found.mean(score), top):
        one.add_row(str(head), bar(head.score, BAR), f"{head.score:z.3f}")
    return one


def _grid(found: Effects, score: str, width: int) -> Iterator[Table]:
    """Yields tables of as many heads as the width has room for."""
    names, means = [f"H{head}" for head in found.labels["head"]], found.mean(score).tolist()
    title = _titled(score)
    for some in chunks(len(names), max(1, (width - 4 - len(title)) // 6)):
        one = table(title, *(names[head] for head in some), right=names)
        for layer, values in zip(found.labels["layer"], means, strict=True):
            one.add_row(f"L{layer}", *(_share(values[head]) for head in some))
        yield one


def _titled(score: str) -> str:
    return score.replace("_", " ")


def _share(value: float) -> Text:
    return Text("" if value != value else f"{value:z.2f}", style=ground(value, BLUE))
