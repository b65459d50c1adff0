"""A `Report` or a `Verification` in the terminal: tables that fit its width."""

import math
from collections.abc import Iterable, Sequence

from rich.cells import set_cell_size
from rich.color import Color, blend_rgb
from rich.color_triplet import ColorTriplet
from rich.columns import Columns
from rich.console import Console
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

from clearspan.analysis import Head, Report, strongest
from clearspan.plots import visible
from clearspan.verification import Verification
from clearspan.verification.report import GROUPS

MOST_POSITIONS = 64
BAR = 14
WHITE, GREY = ColorTriplet(255, 255, 255), ColorTriplet(98, 110, 120)
BLUE, RED, GREEN = ColorTriplet(22, 105, 170), ColorTriplet(178, 60, 36), ColorTriplet(20, 122, 120)


def show(report: Report, console: Console) -> None:
    """Prints the report: predictions, logit lens, strongest heads and causal effect.

    A text longer than 64 tokens shows its last 64; a model with more layers than the width has room for shows some of
    them, the first and the last among them.
    """
    positions = range(max(0, len(report.tokens) - MOST_POSITIONS), len(report.tokens))
    console.print(_facts(report))
    if positions.start:
        console.print(f"  Showing the last {len(positions)} of {len(report.tokens)} positions.", style="dim")
    for title, note, body in (
        (
            "Predictions",
            "how likely each token was, and what the model expects after it",
            _tokens(report, positions, console.width),
        ),
        ("Logit lens", "likeliest token at each depth; bold: the model's own", _lens(report, positions, console.width)),
        ("Strongest heads", "attention on repeated random tokens, from 0 to 1", _heads(report)),
        ("Causal effect", _effect_note(report), _effect(report, positions, console.width)),
    ):
        console.print()
        console.print(Text.assemble((title, "bold"), "  ", (note, "dim")))
        console.print(Padding(body, (0, 0, 0, 2)))


def _facts(report: Report) -> Text:
    model = report.model
    sizes = f"{model.parameters:,} parameters, {model.layers} layers x {model.heads} heads, width {model.d_model}"
    return Text.assemble((model.name, "bold cyan"), f"  {model.architecture}, {sizes}")


def _table(*columns: str, right: Iterable[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    return table


def _tokens(report: Report, positions: range, width: int) -> Table:
    count = max(1, (width - 34) // 19)
    table = _table("pos", "token", "p", "next", right=("pos", "p"))
    found = report.predictions
    probs, ids, top = found.token_probs.tolist(), found.top_ids.tolist(), found.top_probs.tolist()
    for p in positions:
        guesses = Text("  ").join(
            Text.assemble(visible(report.words[i], 12), (f" {prob:z.2f}", "dim"))
            for i, prob in zip(ids[p][:count], top[p], strict=False)
        )
        own = "" if math.isnan(probs[p]) else Text(f" {probs[p]:z.2f} ", style=_ground(probs[p], BLUE))
        table.add_row(str(p), _token(report, p), own, guesses)
    return table


def _token(report: Report, position: int) -> Text:
    return Text(visible(report.tokens[position], 14))  # as text: in a string Rich would read `[b]` as markup


def _ground(share: float, color: ColorTriplet) -> Style:
    """Returns a style for a share from 0 to 1: dim, plain, then a ground that can be seen on black and on white."""
    if share < 0.15:
        return Style(dim=share < 0.05)
    ground = blend_rgb(GREY, color, min(share, 1.0))
    return Style(color=Color.from_triplet(WHITE), bgcolor=Color.from_triplet(ground))


def _some(count: int, room: int) -> list[int]:
    """Returns `room` of `count` indices at even distances, the first and the last among them; all if they fit."""
    if count <= room:
        return list(range(count))
    return [round(i * (count - 1) / (room - 1)) for i in range(room)]


def _lens(report: Report, positions: range, width: int) -> Table:
    lens, names = report.lens, report.depths
    room = width - 24
    cell = min(10, max(len(names[-1]), room // len(names) - 2))
    depths = _some(len(names), max(2, room // (cell + 2)))
    table = _table("pos", "token", *(names[d] for d in depths), right=("pos",))
    ids, probs, ranks = lens.top_ids.tolist(), lens.top_probs.tolist(), lens.final_ranks.tolist()
    for p in positions:
        cells = [
            Text(
                set_cell_size(visible(report.words[ids[d][p]], cell), cell),
                style=_ground(probs[d][p], BLUE) + Style(bold=ranks[d][p] == 0),
            )
            for d in depths
        ]
        table.add_row(str(p), _token(report, p), *cells)
    return table


def _heads(report: Report) -> Columns:
    scores = {"induction": report.heads.induction, "previous token": report.heads.previous_token}
    return Columns([_bars(name, strongest(score)) for name, score in scores.items()], padding=(0, 3))


def _bars(name: str, heads: Sequence[Head]) -> Table:
    table = _table(name, "", "", right=("",))
    for head in heads:
        filled = round(BAR * head.score)
        bar = Text.assemble(("━" * filled, "cyan"), ("━" * (BAR - filled), "bright_black"))
        table.add_row(str(head), bar, f"{head.score:z.3f}")
    return table


def _effect_note(report: Report) -> str:
    return f"nats lost from log P({visible(report.target)}) = {report.effect.log_prob:z.3f} by mean ablation"


def _effect(report: Report, positions: range, width: int) -> Table:
    drop, bound, names = report.effect.drop, report.effect.bound, report.depths[1:]
    layers = _some(len(drop), max(2, (width - 24) // (len(names[-1]) + 2)))
    table = _table("pos", "token", *(names[layer] for layer in layers), right=("pos",))
    for p in positions:
        values = drop[:, p].tolist()
        table.add_row(str(p), _token(report, p), *(_nats(values[layer], bound) for layer in layers))
    return table


def _nats(value: float, bound: float) -> Text:
    if abs(value) < 0.005:
        return Text("   ·", style="dim")
    return Text(f" {value:+z.2f} ", style=_ground(abs(value) / bound, RED if value > 0 else GREEN))


def show_verification(found: Verification, console: Console) -> None:
    """Prints the result of `bridge.verify`."""
    console.print(
        Text.assemble(
            (found.model or found.architecture, "bold"),
            f"  {found.architecture}, {found.dtype}, {found.level}: {found.forwards} forward passes",
        )
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("", "checks", "hold", "largest error"):
        table.add_column(title, justify="right" if title in ("hold", "largest error") else "left", no_wrap=True)
    table.add_column("what it shows")
    for group, held, count, error in found.groups():
        mark = Text("✓", style="green") if held == count else Text("✗", style="bold red")
        largest = "" if error is None else f"{error:.1e}"
        table.add_row(mark, group, f"{held}/{count}", largest, Text(GROUPS[group], style="dim"))
    console.print(Padding(table, (1, 0, 1, 2)))
    for check in found.unavailable:
        console.print(Text.assemble(("not checked ", "yellow"), (check.group, "bold"), f"  {check.what}"))
    for what in found.unexplained:
        console.print(Text.assemble(("warning ", "yellow"), what))
    for what in found.not_exercised:
        console.print(Text.assemble(("not exercised ", "yellow"), what))
    for check in found.failures:
        error = "" if check.error is None else f"  error {check.error:.1e}, allowed {check.tolerance:.1e}"
        console.print(Text.assemble(("failed ", "bold red"), (check.group, "bold"), f"  {check.what}{error}"))
        console.print(Padding(Text(check.explanation), (0, 0, 1, 2)))
    console.print(
        Text("every point reads and writes as it should", style="green")
        if found.passed
        else Text(f"{len(found.failures)} of {len(found.checks)} checks failed", style="bold red")
    )
