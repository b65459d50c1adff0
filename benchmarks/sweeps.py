"""Sweeps of activation patching: the planner beside one forward for each cell, and beside tiles written by hand.

    python benchmarks/sweeps.py [--lengths 32 128] [--rounds 7] [--cells 24] [--full] [--clock cpu]

Random-weight GPTBigCode, 12 layers, d_model 768. The residual stream is patched at each layer and position, and each
head at all positions. One forward for each cell is timed on some cells spread over all, and its time is that of a cell
times the cells; `--full` runs all. It finds the values to patch beforehand, the others find theirs in the time shown.
Every way must give the numbers of the loop, or the exit code is 1.
"""

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import GPTBigCodeForCausalLM

import clearspan
from clearspan.interventions import Patch
from clearspan.sweep import Grid, LogitDifference, Metric, Sweep, grid
from clearspan.sweep.experiment import fingerprint
from hand_written import (
    CORRECT,
    INCORRECT,
    Cell,
    Tokens,
    inputs_of,
    logit_difference,
    patched_heads,
    patched_residuals,
    tiled_residuals,
)
from reference import LAYERS, blocks_of, build, random_tokens
from report import conditions, seconds, table
from timing import Clock, Times, clock_of, parser, timed

TOLERANCE = 1e-5
"""Of the largest difference from the loop over the largest value."""

DECLARED = LogitDifference(CORRECT, INCORRECT)
LOOP, TILES = "one forward for each cell", "tiles by hand"


@dataclass(frozen=True)
class Contest:
    """Ways to fill one grid.

    Attributes:
        title: What is patched.
        plan: What the planner says of it.
        cells: The cells of the grid, the last axis running fastest.
        sample: The cells of the loop.
        loop: The loop over them.
        ways: What fills the grid.
    """

    title: str
    plan: str
    cells: Sequence[Cell]
    sample: Sequence[Cell]
    loop: Callable[[], Tensor]
    ways: Mapping[str, Callable[[], Tensor]]


def swept(bridge: clearspan.TransformerBridge, cells: Grid, metric: Metric, tokens: Tokens, clean: Tokens) -> Sweep:
    """Returns the planner's sweep of a grid."""
    return Sweep(bridge, tokens, cells, metric, sources={"clean": clean})


def residual_contest(
    bridge: clearspan.TransformerBridge, model: GPTBigCodeForCausalLM, length: int, options: argparse.Namespace
) -> Contest:
    """Returns the ways to patch the residual stream by layer and position."""
    tokens, clean = random_tokens(1, length), random_tokens(1, length, seed=1)
    cells = list(itertools.product(range(LAYERS), range(length)))
    sample = cells if options.full else spread(cells, options.cells)
    laid = grid("resid_pre", Patch(), layer=range(LAYERS), position=range(length))
    layers, positions = options.tile

    def planned(metric: Metric) -> Tensor:
        return swept(bridge, laid, metric, tokens, clean).run(progress=False).mean()

    return Contest(
        f"residual stream, {LAYERS} layers x {length} positions",
        str(swept(bridge, laid, DECLARED, tokens, clean).plan()).partition("\n")[0],
        cells,
        sample,
        partial(patched_residuals, model, tokens, inputs_of(model, blocks_of(model), clean), sample),
        {
            TILES: lambda: tiled_residuals(model, tokens, clean, layers, positions),
            "planner, a metric that declares its position": lambda: planned(DECLARED),
            "planner, a plain function": lambda: planned(logit_difference),
        },
    )


def head_contest(
    bridge: clearspan.TransformerBridge, model: GPTBigCodeForCausalLM, length: int, options: argparse.Namespace
) -> Contest:
    """Returns the ways to patch each head at all positions."""
    tokens, clean = random_tokens(1, length), random_tokens(1, length, seed=1)
    n_heads = model.config.n_head
    cells = list(itertools.product(range(LAYERS), range(n_heads)))
    sample = cells if options.full else spread(cells, options.cells)
    laid = grid("z", Patch(), layer=range(LAYERS), head=range(n_heads))
    outputs = inputs_of(model, [block.attn.c_proj for block in blocks_of(model)], clean)
    sweep = partial(swept, bridge, laid, DECLARED, tokens, clean)
    return Contest(
        f"heads, {LAYERS} layers x {n_heads}, at all of {length} positions",
        str(sweep().plan()).partition("\n")[0],
        cells,
        sample,
        partial(patched_heads, model, tokens, outputs, sample),
        {"planner, a metric that declares its position": lambda: sweep().run(progress=False).mean()},
    )


def spread(cells: Sequence[Cell], count: int) -> list[Cell]:
    """Returns so many cells, evenly from all."""
    return [cells[index * len(cells) // count] for index in range(min(count, len(cells)))]


def errors(contest: Contest) -> dict[str, float]:
    """Returns the largest difference of each way from the loop, over the largest value."""
    expected = contest.loop()
    at = [contest.cells.index(cell) for cell in contest.sample]
    found = {name: way().flatten() for name, way in contest.ways.items()}
    return {name: float((value[at] - expected).abs().max() / expected.abs().max()) for name, value in found.items()}


def measured(contest: Contest, rounds: int, clock: Clock) -> Times:
    """Returns the time of each way for the whole grid, the loop's from its cells."""
    times = timed({LOOP: contest.loop, **contest.ways}, rounds, clock, warmups=0)  # all ran when they were compared
    all_cells, sample = len(contest.cells), len(contest.sample)
    whole = [each * all_cells / sample for each in times.seconds[LOOP]]
    return Times({**times.seconds, LOOP: whole})


def rows(contest: Contest, times: Times, found: Mapping[str, float]) -> list[list[str]]:
    """Returns the lines of a table."""
    return [
        [
            name,
            seconds(times.median(name)),
            f"{times.ratio(LOOP, name):.2f} x",
            f"{times.ratio(TILES, name):.2f} x" if TILES in contest.ways else "",
            f"{found[name]:.1e}" if name in found else "",
        ]
        for name in times.seconds
    ]


def hashing(model: GPTBigCodeForCausalLM, rounds: int, clock: Clock) -> str:
    """Returns what it takes to know the weights again, which is done when a sweep begins, is saved, and goes on."""
    tokens = random_tokens(1, 32)
    times = timed(
        {"hash": lambda: fingerprint(model), "forward": lambda: model(tokens, use_cache=False)}, rounds, clock
    )
    size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    return (
        f"\nhash of all weights, {size:.0f} MiB: {seconds(times.median('hash'))}, "
        f"{times.ratio('hash', 'forward'):.1f} x a forward of 1 x 32 tokens"
    )


def main() -> int:
    """Prints a table for each grid, and returns the exit code."""
    arguments = parser("Measures sweeps of activation patching.", rounds=7)
    arguments.add_argument("--lengths", type=int, nargs="+", default=[32, 128])
    arguments.add_argument("--cells", type=int, default=24, help="of the loop over cells, spread over all")
    arguments.add_argument("--full", action="store_true", help="has the loop run all cells")
    arguments.add_argument("--tile", type=int, nargs=2, default=[2, 8], help="layers and positions of a tile")
    options = arguments.parse_args()
    clock, is_right = clock_of(options), True
    model = build(768)
    bridge = clearspan.boot(model)
    print(conditions(options.clock))
    print(f"tiles by hand: {options.tile[0]} layers x {options.tile[1]} positions; medians of {options.rounds} rounds")
    with torch.no_grad():
        for length, contest_of in itertools.product(options.lengths, (residual_contest, head_contest)):
            contest = contest_of(bridge, model, length, options)
            print(f"\n{contest.title}\nplan: {contest.plan}\nthe loop runs {len(contest.sample)} cells\n", flush=True)
            found = errors(contest)
            is_right &= all(error <= TOLERANCE for error in found.values())
            times = measured(contest, options.rounds, clock)
            header = ["", "time of all cells", "faster than the loop", "than tiles by hand", "error"]
            print(table(header, rows(contest, times, found)), flush=True)
        print(hashing(model, options.rounds, clock))
    return 0 if is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())
