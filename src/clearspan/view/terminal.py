"""A `Report` in the terminal: on one screen what matters of it, or all of it, in tables that fit the width."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

from rich.console import Console, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from clearspan.analysis import Report
from clearspan.checks import check_choice, check_counts
from clearspan.plots import id_label, visible
from clearspan.results import counted
from clearspan.text import BROKEN

from .cells import BAR, BLUE, GREEN, RED, bar, chunks, ground, print_part, probability, signed, table, token
from .heads import head_tables

Part = Literal["predictions", "lens", "heads", "effect"]
PARTS: tuple[Part, ...] = get_args(Part)
"""What a report in the terminal has, in order."""
DEPTHS = 12
"""Rows that depths of the lens take, where they are folded."""


def show(report: Report, console: Console, *, parts: Sequence[Part] = PARTS, top: int = 8, full: bool = False) -> None:
    """Prints predictions, logit lens, strongest heads and causal effect.

    Folded, it is what matters: the tokens that were least expected, the layers at which the lens settles on what the
    model says in the end, and the strongest heads and causes. A text of any length takes one screen.

    Args:
        report: What is shown.
        console: Where. No line is wider than it.
        parts: Which of `PARTS`.
        top: Rows of each folded table.
        full: Whether every position and every layer is shown instead.

    Raises:
        InvalidArgumentError: There is no such part, or `top` is no count.
    """
    check_counts(top=top)
    for part in parts:
        check_choice(PARTS, part=part)
    console.print(_facts(report))
    console.print(_predicted(report, console.width))
    for part in dict.fromkeys(parts):
        console.print()
        title, note, bodies = _part(report, part, console.width, None if full else top)
        print_part(console, title, note, *bodies)
    console.print()
    console.print(_legend(parts, full), style="dim")


def _part(report: Report, part: Part, width: int, top: int | None) -> tuple[str, str, Iterable[RenderableType]]:
    """Returns the title of a part, what its columns are, and its tables; `top` is None where nothing is folded."""
    before = f"log P({visible(report.target, 20)}) = {report.effect.log_prob:z.3f}"
    effects, attention = f"nats lost from {before} by mean ablation", "attention on repeated random tokens, from 0 to 1"
    match part, top:
        case "predictions", None:
            note = "how likely each token was, and what the model expects after it"
            return "Predictions", note, [_tokens(report, width)]
        case "predictions", int():
            note = "how likely each was after those before it, and what was expected there"
            return "Least expected tokens", note, [_surprising(report, width, top)]
        case "lens", None:
            return "Logit lens", "likeliest token at each depth; bold: the model's own", _lens(report, width)
        case "lens", int():
            note = "from which depth on positions predict what the model says in the end"
            return "Logit lens", note, [_settled(report, width)]
        case "heads", _:
            return "Strongest heads" if top else "All heads", attention, head_tables(report.heads, width, top)
        case "effect", None:
            return "Causal effect", effects, _effect(report, width)
        case "effect", int():
            return "Causal effect", effects, [_causes(report, top)]
        case _:
            raise AssertionError(part)


def _facts(report: Report) -> Text:
    model = report.model
    sizes = f"{model.parameters:,} parameters, {model.layers} layers x {model.heads} heads, width {model.d_model}"
    return Text.assemble((visible(model.name), "bold cyan"), f"  {model.architecture}, {sizes}")


def _predicted(report: Report, width: int) -> Text:
    """Returns one line on the prediction that the report explains."""
    at = report.predicted_at
    read = f"{counted(len(report.tokens), 'token')}; after {at} "
    found = Text.assemble(read, _token(report, report.token_ids[at], 14), ("  →  ", "dim"), _guesses(report, at, 5))
    found.truncate(width, overflow="ellipsis")
    return found


def _legend(parts: Sequence[Part], full: bool) -> str:
    """Returns what signs mean, of those that are shown."""
    heads = "L3H1: head 1 of layer 3" if "heads" in parts else ""
    effect = "+: makes the target likelier" if "effect" in parts else ""
    others = filter(None, (heads, effect, "" if full else "--full: everything"))
    return "pos: position   p: probability   ·: space   ⏎: line break   ⇥: tab\n" + "   ".join(others)


def _guesses(report: Report, position: int, count: int) -> Text:
    """Returns the likeliest tokens after a position, with their probabilities."""
    found = report.predictions
    pairs = zip(found.top_ids[position].tolist(), found.top_probs[position].tolist(), strict=True)
    guesses = [
        Text.assemble(_token(report, i, 12), (f" {probability(prob)}", "dim")) for i, prob in list(pairs)[:count]
    ]
    return Text("  ").join(guesses)


def _named(report: Report, position: int) -> tuple[str, Text]:
    return str(position), _token(report, report.token_ids[position], 14)


def _token(report: Report, token_id: int, cells: int, style: str | Style = "") -> Text:
    """Returns a token as its text; to what is part of a character, and looks like others, its id is added."""
    text = report.words[token_id]
    return token(text + id_label(token_id) if BROKEN in text else text, cells, style)


# --- predictions -----------------------------------------------------------------------------------------------------


def _surprising(report: Report, width: int, top: int) -> RenderableType:
    """Returns the tokens that had the least probability, the least first."""
    probs = report.predictions.token_probs.tolist()
    known = sorted((position for position, prob in enumerate(probs) if prob == prob), key=probs.__getitem__)
    if not known:
        return Text("there is no token before which others are", style="dim")
    found = table("pos", "token", "p", "expected", right=("pos", "p"))
    for position in known[:top]:
        expected = _guesses(report, position - 1, _count(width))
        found.add_row(*_named(report, position), probability(probs[position]), expected)
    return found


def _tokens(report: Report, width: int) -> Table:
    found = table("pos", "token", "p", "next", right=("pos", "p"))
    for position, prob in enumerate(report.predictions.token_probs.tolist()):
        own = "" if math.isnan(prob) else Text(f" {probability(prob)} ", style=ground(prob, BLUE))
        found.add_row(*_named(report, position), own, _guesses(report, position, _count(width)))
    return found


def _count(width: int) -> int:
    """Returns how many guesses there is room for."""
    return max(1, (width - 34) // 22)


# --- logit lens ------------------------------------------------------------------------------------------------------


def _settled(report: Report, width: int) -> Table:
    """Returns how many positions settle at each depth, and what the lens reads at the one that is explained.

    Of a deep model each row is several depths, and what is read is that at the last of them.
    """
    lens, at, names = report.lens, report.predicted_at, report.depths
    counts = lens.settled.bincount(minlength=len(names)).tolist()
    found = table("depth", "settled", "", f"after {at}", "p", "rank of its own", right=("settled", "p"))
    for some in _runs(len(names), DEPTHS):
        last, count = some[-1], sum(counts[depth] for depth in some)
        name = names[last] if len(some) == 1 else f"{names[some[0]]} to {names[last].removeprefix('layer ')}"
        read = _token(report, int(lens.top_ids[last, at]), max(6, min(16, width - 76)))
        rank = int(lens.final_ranks[last, at])
        read.stylize("bold" if rank == 0 else "")
        prob = probability(float(lens.top_probs[last, at]))
        found.add_row(name, str(count or "·"), bar(count / len(report.tokens), BAR), read, prob, str(rank))
    return found


def _runs(count: int, most: int) -> list[range]:
    """Returns the numbers below a count in runs, no more than `most`; the first run may be the shortest."""
    size = math.ceil(count / most)
    return [range(max(0, stop - size), stop) for stop in range(count, 0, -size)][::-1]


def _lens(report: Report, width: int) -> Iterator[Table]:
    """Yields tables of as many depths as the width has room for."""
    lens, names = report.lens, report.depths
    room = width - 24
    cell = min(10, max(len(names[-1]), room // len(names) - 2))
    ids, probs, ranks = lens.top_ids.tolist(), lens.top_probs.tolist(), lens.final_ranks.tolist()
    for depths in chunks(len(names), max(1, room // (cell + 2))):
        found = table("pos", "token", *(names[d] for d in depths), right=("pos",))
        for p in range(len(report.tokens)):
            cells = [
                _token(report, ids[d][p], cell, ground(probs[d][p], BLUE) + Style(bold=ranks[d][p] == 0))
                for d in depths
            ]
            found.add_row(*_named(report, p), *cells)
        yield found


# --- causal effect ---------------------------------------------------------------------------------------------------


def _causes(report: Report, top: int) -> RenderableType:
    """Returns the positions whose strongest layer matters most, the strongest first."""
    drop = report.effect.drop[:, : report.predicted_at + 1]
    layers = drop.abs().nan_to_num().max(0).indices.tolist()
    values = [drop[layer, position].item() for position, layer in enumerate(layers)]
    known = [position for position, value in enumerate(values) if abs(value) >= 0.005]
    if not known:
        return Text("no position changes it by 0.005 nats", style="dim")
    found = table("pos", "token", "strongest at", "nats", "", right=("pos", "nats"))
    strongest_first = sorted(known, key=lambda position: -abs(values[position]))
    bound = abs(values[strongest_first[0]])
    for position in strongest_first[:top]:
        value, layer = values[position], report.depths[1 + layers[position]]
        length = bar(abs(value) / bound, BAR, "red" if value > 0 else "green")
        found.add_row(*_named(report, position), layer, f"{value:+z.2f}", length)
    return found


def _effect(report: Report, width: int) -> Iterator[Table]:
    """Yields tables of as many layers as the width has room for."""
    drop, bound, names = report.effect.drop, report.effect.bound, report.depths[1:]
    for layers in chunks(len(names), max(1, (width - 24) // (len(names[-1]) + 2))):
        found = table("pos", "token", *(names[layer] for layer in layers), right=("pos", *names))
        for p in range(len(report.tokens)):
            values = drop[:, p].tolist()
            found.add_row(*_named(report, p), *(signed(values[layer], bound, RED, GREEN) for layer in layers))
        yield found
