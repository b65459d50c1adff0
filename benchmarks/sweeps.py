"""Sweeps of activation patching: the planner beside one forward for each cell, and beside tiles written by hand.

    python benchmarks/sweeps.py [--model llama] [--device cuda] [--lengths 32 128] [--rounds 7] [--cells 24] [--full]
                                [--profile] [--clock cpu] [--tiny]

The residual stream is patched at each layer and position, and each head at all positions. One forward for each cell is
timed on some cells spread over all, and its time is that of a cell times the cells; `--full` runs all. It finds the
values to patch beforehand, the others find theirs in the time shown. Every way must give the numbers of the loop, or
the exit code is 1. Forwards are counted, and what a run does besides: calls of Python, and time outside of forwards.
`--profile` counts what one run asks of the device (`kernels.py`).
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

import clearspan
from clearspan.interventions import Patch
from clearspan.sweep import Grid, LogitDifference, Metric, Sweep, SweepPlan, grid
from clearspan.sweep.experiment import fingerprint
from hand_written import (
    CORRECT,
    INCORRECT,
    Cell,
    inputs_of,
    logit_difference,
    patched_heads,
    patched_residuals,
    tiled_residuals,
)
from kernels import calls_of, kernels_of, python_calls
from reference import Reference, add_model_options, build_chosen
from report import conditions, seconds, table
from timing import Clock, Times, clock_of, parser, timed

LENGTHS: Mapping[str, Sequence[int]] = {"gpt-bigcode": (32, 128), "llama": (64,)}
TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.bfloat16: 0.1}
"""Of the largest difference from the loop over the largest value. In bfloat16, whose logits have 8 bits, 0.025 was seen
at width 512."""

DECLARED = LogitDifference(CORRECT, INCORRECT)
LOOP, TILES = "one forward for each cell", "tiles by hand"
PLANNED, FUNCTION = "planner, a metric that declares its position", "planner, a plain function"


@dataclass(frozen=True)
class Contest:
    """Ways to fill one grid.

    Attributes:
        title: What is patched.
        cells: The cells of the grid, the last axis running fastest.
        sample: The cells of the loop.
        loop: The loop over them.
        ways: What fills the grid.
        plans: The plans of those ways that have one.
    """

    title: str
    cells: Sequence[Cell]
    sample: Sequence[Cell]
    loop: Callable[[], Tensor]
    ways: Mapping[str, Callable[[], Tensor]]
    plans: Mapping[str, SweepPlan]


@dataclass(frozen=True)
class Runs:
    """The reference model's two runs of so many tokens, and its bridge.

    Attributes:
        reference: The model.
        bridge: Its bridge.
        length: Tokens of a run.
    """

    reference: Reference
    bridge: clearspan.TransformerBridge
    length: int

    @cached_property
    def corrupted(self) -> Tensor:
        """The run that is changed."""
        return self.reference.tokens(1, self.length)

    @cached_property
    def clean(self) -> Tensor:
        """The run that values are taken from."""
        return self.reference.tokens(1, self.length, seed=1)

    def sweep(self, cells: Grid, metric: Metric = DECLARED) -> Sweep:
        """Returns the planner's sweep of a grid."""
        return Sweep(self.bridge, self.corrupted, cells, metric, sources={"clean": self.clean})

    def residual_grid(self) -> Grid:
        """Returns the residual stream's grid, by layer and position."""
        return grid("resid_pre", Patch(), layer=range(self.reference.layers), position=range(self.length))

    def head_grid(self) -> Grid:
        """Returns the grid of all heads, each at all positions."""
        return grid("z", Patch(), layer=range(self.reference.layers), head=range(self.reference.heads))


def planned(
    runs: Runs, cells: Grid, metrics: Mapping[str, Metric]
) -> Iterator[tuple[str, Callable[[], Tensor], SweepPlan]]:
    """Gives the planner's ways by name, each with its plan."""
    for name, metric in metrics.items():
        sweep = partial(runs.sweep, cells, metric)
        yield name, lambda sweep=sweep: sweep().run(progress=False).mean(), sweep().plan()


def residual_contest(runs: Runs, sampled: int | None, tile: tuple[int, int] | None = None) -> Contest:
    """Returns the ways to patch the residual stream by layer and position.

    Args:
        runs: What is patched.
        sampled: Cells of the loop, None for all.
        tile: Layers and positions of tiles by hand, if these are a way.
    """
    reference, tokens, clean = runs.reference, runs.corrupted, runs.clean
    cells = list(itertools.product(range(reference.layers), range(runs.length)))
    sample = spread(cells, sampled or len(cells))
    by_planner = list(planned(runs, runs.residual_grid(), {PLANNED: DECLARED, FUNCTION: logit_difference}))
    by_hand = {} if tile is None else {TILES: partial(tiled_residuals, reference, tokens, clean, *tile)}
    return Contest(
        f"residual stream, {reference.layers} layers x {runs.length} positions",
        cells,
        sample,
        partial(patched_residuals, reference, tokens, inputs_of(reference, reference.blocks, clean), sample),
        {**by_hand, **{name: way for name, way, _ in by_planner}},
        {name: plan for name, _, plan in by_planner},
    )


def head_contest(runs: Runs, sampled: int | None) -> Contest:
    """Returns the ways to patch each head at all positions; the loop runs some cells, or all."""
    reference, tokens = runs.reference, runs.corrupted
    cells = list(itertools.product(range(reference.layers), range(reference.heads)))
    sample = spread(cells, sampled or len(cells))
    by_planner = list(planned(runs, runs.head_grid(), {PLANNED: DECLARED}))
    outputs = inputs_of(reference, reference.projections, runs.clean)
    return Contest(
        f"heads, {reference.layers} layers x {reference.heads}, at all of {runs.length} positions",
        cells,
        sample,
        partial(patched_heads, reference, tokens, outputs, sample),
        {name: way for name, way, _ in by_planner},
        {name: plan for name, _, plan in by_planner},
    )


def spread(cells: Sequence[Cell], count: int) -> list[Cell]:
    """Returns so many cells, evenly from all."""
    count = min(count, len(cells))
    return [cells[index * len(cells) // count] for index in range(count)]


def errors(contest: Contest) -> dict[str, float]:
    """Returns the largest difference of each way from the loop, over the largest value."""
    expected = contest.loop().cpu()
    at = [contest.cells.index(cell) for cell in contest.sample]
    found = {name: way().flatten().cpu() for name, way in contest.ways.items()}
    return {name: float((value[at] - expected).abs().max() / expected.abs().max()) for name, value in found.items()}


def measured(contest: Contest, rounds: int, clock: Clock) -> Times:
    """Returns the time of each way for the whole grid, the loop's from its cells."""
    times = timed({LOOP: contest.loop, **contest.ways}, rounds, clock, warmups=0)  # all ran when they were compared
    all_cells, sample = len(contest.cells), len(contest.sample)
    whole = [each * all_cells / sample for each in times.seconds[LOOP]]
    return Times({**times.seconds, LOOP: whole})


def predicted(plan: SweepPlan) -> float | None:
    """Returns the seconds that a plan predicts, or None where it predicts none."""
    return getattr(plan, "seconds", None)


def rows(contest: Contest, times: Times, found: Mapping[str, float]) -> Iterator[list[str]]:
    """Gives the lines of a table."""
    for name in times.seconds:
        expected = predicted(contest.plans[name]) if name in contest.plans else None
        yield [
            name,
            seconds(times.median(name)),
            "" if expected is None else seconds(expected),
            f"{times.ratio(LOOP, name):.2f} x",
            f"{times.ratio(TILES, name):.2f} x" if TILES in contest.ways else "",
            f"{found[name]:.1e}" if name in found else "",
        ]


def besides(contest: Contest, model: torch.nn.Module, clock: Clock) -> Iterator[str]:
    """Gives how many forwards each planned way makes, and what it does besides, in a line."""
    for name, plan in contest.plans.items():
        way, batches = contest.ways[name], len(plan.tiles)
        found, calls = calls_of(way, model, clock), python_calls(way)
        yield (
            f"{name}: {found.forwards} forwards for {batches} batch{'es' * (batches > 1)}; for each batch "
            f"{calls / batches:,.0f} calls of Python and {seconds(found.outside / batches)} outside of forwards"
        )


def counts(contest: Contest, device: torch.device) -> Iterator[str]:
    """Gives what each planned way asks of the device, in a line."""
    for name, plan in contest.plans.items():
        found = kernels_of(contest.ways[name], device)
        yield f"{name}: {found.per(len(plan.tiles))}; {found.shapes} shapes of attention"


def hashing(reference: Reference, rounds: int, clock: Clock) -> str:
    """Returns what it takes to know the weights again, which is done when a sweep begins, is saved, and goes on."""
    model, tokens = reference.model, reference.tokens(1, 32)
    times = timed(
        {"hash": lambda: fingerprint(model), "forward": lambda: model(tokens, use_cache=False)}, rounds, clock
    )
    size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    return (
        f"\nhash of all weights, {size:.0f} MiB: {seconds(times.median('hash'))}, "
        f"{times.ratio('hash', 'forward'):.1f} x a forward of 1 x 32 tokens"
    )


def measure(contest: Contest, reference: Reference, options: argparse.Namespace, clock: Clock) -> bool:
    """Prints the table of one grid, and returns whether all numbers are right."""
    plan = contest.plans[PLANNED]
    print(f"\n{contest.title}\nplan: {str(plan).partition(chr(10))[0]}\nthe loop runs {len(contest.sample)} cells\n")
    found = errors(contest)
    times = measured(contest, options.rounds, clock)
    header = ["", "time of all cells", "predicted", "faster than the loop", "than tiles by hand", "error"]
    print(table(header, list(rows(contest, times, found))))
    print("", *besides(contest, reference.model, clock), sep="\n", flush=True)
    if options.profile:
        print("", *counts(contest, reference.device), sep="\n", flush=True)
    return max(found.values()) <= TOLERANCES[reference.model.dtype]


def main() -> int:
    """Prints a table for each grid, and returns the exit code."""
    arguments = parser("Measures sweeps of activation patching.", rounds=7)
    add_model_options(arguments)
    arguments.add_argument("--lengths", type=int, nargs="+", help="tokens of a run")
    arguments.add_argument("--cells", type=int, default=24, help="of the loop over cells, spread over all")
    arguments.add_argument("--full", action="store_true", help="has the loop run all cells")
    arguments.add_argument("--tile", type=int, nargs=2, default=[2, 8], help="layers and positions of a tile")
    arguments.add_argument("--profile", action="store_true", help="counts what one run asks of the device")
    options = arguments.parse_args()
    clock, is_right = clock_of(options), True
    reference = build_chosen(options)
    bridge = clearspan.boot(reference.model)
    print(conditions(options))
    print(f"tiles by hand: {options.tile[0]} layers x {options.tile[1]} positions; medians of {options.rounds} rounds")
    sampled = None if options.full else options.cells
    with torch.no_grad():
        for length in options.lengths or ([8] if options.tiny else LENGTHS[options.model]):
            runs = Runs(reference, bridge, length)
            for contest in (residual_contest(runs, sampled, options.tile), head_contest(runs, sampled)):
                is_right &= measure(contest, reference, options, clock)
        print(hashing(reference, options.rounds, clock))
    return 0 if is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())
