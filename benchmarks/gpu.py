"""The figures asked of a GPU, a line of JSON for each: its name, what is asked, what is measured, and the card.

    python benchmarks/gpu.py [PART ...] [--device cuda] [--limit 480] [--rounds 7] [--tiny] [--here]

Each part runs in a process of its own, so that a failure or a shortage of memory is that part's, and first runs are
first. A part has two minutes, and all have `--limit` seconds. `--here` runs parts in this process;
`--tiny --device cpu` shows that everything runs. The exit code is 1 if a part failed.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import attribution
import clearspan
import overhead
import sweeps
from first_run import first_run
from kernels import calls_of, kernels_of, python_calls
from reference import TINY_LAYERS, TINY_WIDTH, Reference, build
from report import card, versions
from timing import Clock, clock_of, parser, timed
from transfers import by_hand, transfers


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        name: What it is of.
        measured: The number.
        least: What is asked for at the least, if anything.
        most: What is asked for at the most, if anything.
    """

    name: str
    measured: float
    least: float | None = None
    most: float | None = None

    @property
    def asked(self) -> str | None:
        """What is asked for, as text."""
        if self.least is not None:
            return f">= {self.least:g}"
        return None if self.most is None else f"<= {self.most:g}"


@dataclass(frozen=True)
class Stage:
    """Where figures are made.

    Attributes:
        device: Of models and tokens.
        is_tiny: Whether models and inputs are as small as they can be.
        rounds: How often each task runs.
        clock: What tells the time.
    """

    device: str
    is_tiny: bool
    rounds: int
    clock: Clock

    def build(self, name: str) -> Reference:
        """Returns a model."""
        size = (TINY_WIDTH, TINY_LAYERS) if self.is_tiny else (None, None)
        return build(name, *size, device=self.device)

    def length(self, tokens: int) -> int:
        """Returns a number of tokens, or few."""
        return min(tokens, 8) if self.is_tiny else tokens

    def runs(self, name: str, tokens: int) -> sweeps.Runs:
        """Returns what is patched of a model."""
        reference = self.build(name)
        return sweeps.Runs(reference, clearspan.boot(reference.model), self.length(tokens))


Part = Callable[[Stage], Iterator[Figure]]


@torch.no_grad()
def swept(stage: Stage, name: str, tokens: int, least: float, least_heads: float | None = None) -> Iterator[Figure]:
    """Gives how much faster sweeps are than one forward for each cell, their errors, and the time beside the plan's."""
    runs = stage.runs(name, tokens)
    what = f"{name}, {runs.length} tokens"
    tolerance = sweeps.TOLERANCES[runs.reference.model.dtype]
    for title, contest, asked in (
        (f"residual sweep, {what}", sweeps.residual_contest(runs, 24), least),
        (f"sweep of heads, {what}", sweeps.head_contest(runs, 24), least_heads),
    ):
        errors, times = sweeps.errors(contest), sweeps.measured(contest, stage.rounds, stage.clock)
        for way, plan in contest.plans.items():
            is_declared = way == sweeps.PLANNED
            label = title if is_declared else f"{title}, plain function"
            yield Figure(f"{label}: x the loop", times.ratio(sweeps.LOOP, way), least=asked if is_declared else None)
            yield Figure(f"{label}: error", errors[way], most=tolerance)
            expected = sweeps.predicted(plan)
            if expected is not None:
                yield Figure(f"{label}: time of the predicted", times.median(way) / expected)


def first(stage: Stage, tokens: int, least: float, least_later: float | None = None) -> Iterator[Figure]:
    """Gives how much faster the first sweep of a process is than one forward for each cell, and a later one."""
    what = f"llama, {stage.length(tokens)} tokens"
    found = first_run(stage.build("llama"), stage.length(tokens), stage.clock)
    yield Figure(f"first sweep, {what}: x the loop", found.loop / found.first, least)
    yield Figure(f"later sweep, {what}: x the loop", found.loop / found.later, least_later)
    yield Figure(f"first sweep, {what}: seconds", found.first)


def transferred(stage: Stage) -> Iterator[Figure]:
    """Gives what bringing every block's residual stream to the CPU costs."""
    given = stage.build("llama"), 4, stage.length(1024), stage.rounds, stage.clock
    found, hand = transfers(*given), by_hand(*given)
    yield Figure("residual streams to the CPU, later calls: x the forward", found.warm, most=1.05)
    yield Figure("residual streams to the CPU, first call: x the forward", found.first)
    yield Figure("residual streams to the CPU, earlier caches kept: x the forward", found.keeping)
    yield Figure("residual streams kept on the device: x the forward", found.here)
    yield Figure("residual streams by torch hooks, .cpu(): x the forward", hand.waiting)
    yield Figure("residual streams by torch hooks, an Outbound: x the forward", hand.outbound)
    yield Figure("residual streams by torch hooks, a Ring: x the forward", hand.ring)


def read(stage: Stage, name: str, batch: int, tokens: int, most: Mapping[str, float]) -> Iterator[Figure]:
    """Gives what reading costs, in forwards: rows of `overhead.py`, with what is asked of some."""
    reference = stage.build(name)
    bridge, given = clearspan.boot(reference.model), reference.tokens(batch, stage.length(tokens))
    rows = [row for row in overhead.reading(reference, bridge, given) if "look up" not in row.label]
    if batch == 1:
        rows.append(overhead.generation(reference, bridge, given[:, :32]))
    for label, ratio, _ in overhead.measured(rows, 3 * stage.rounds, stage.clock):
        what = f"{label}, {name}, {batch}x{given.shape[1]}"
        yield Figure(f"{what}: x the base", ratio, most=most.get(label))


def attributed(stage: Stage, name: str) -> Iterator[Figure]:
    """Gives what attribution patching takes, in forwards."""
    reference, most = stage.build(name), {attribution.HEADS: 3.3, attribution.EDGES: 4.5}
    tasks = attribution.tasks(reference, clearspan.boot(reference.model), stage.length(64))
    chosen = {task: tasks[task] for task in (attribution.FORWARD, *most)}
    times = timed(chosen, stage.rounds, stage.clock, warmups=2)
    for task, asked in most.items():
        yield Figure(f"attribution, {task}, {name}: forwards", times.ratio(task, attribution.FORWARD), most=asked)


@torch.no_grad()
def remembered(stage: Stage) -> Iterator[Figure]:
    """Gives what a sweep takes of the GPU's memory beside what is predicted, and whether it keeps to a limit."""
    runs, gibibyte, limit = stage.runs("llama", 256), 2**30, 6
    what = f"memory of a sweep, llama, {runs.length} tokens"
    sweep = runs.sweep(runs.residual_grid())
    yield Figure(f"{what}: GiB predicted", sweep.plan().nbytes / gibibyte)
    if torch.device(stage.device).type != "cuda":
        return

    def peak() -> float:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        runs.sweep(runs.residual_grid()).run(progress=False)
        return torch.cuda.max_memory_allocated()

    before = torch.cuda.memory_allocated()
    yield Figure(f"{what}: of the predicted", (peak() - before) / sweep.plan().nbytes, most=1)
    total = torch.cuda.get_device_properties(stage.device).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(limit * gibibyte / total)
        yield Figure(f"{what}, with a limit: GiB", peak() / gibibyte, most=limit)
    finally:
        torch.cuda.set_per_process_memory_fraction(1)


@torch.no_grad()
def counted(stage: Stage, name: str, tokens: int) -> Iterator[Figure]:
    """Gives what a residual sweep asks of the device and of Python, for each batch."""
    runs = stage.runs(name, tokens)
    what = f"residual sweep, {name}, {runs.length} tokens"
    batches = len(runs.sweep(runs.residual_grid()).plan().tiles)

    def swept() -> object:
        return runs.sweep(runs.residual_grid()).run(progress=False)

    found, called = kernels_of(swept, torch.device(stage.device)), calls_of(swept, runs.reference.model, stage.clock)
    per_batch = {
        "calls of Python": python_calls(swept),
        "milliseconds outside of forwards": 1000 * called.outside,
        "operators": found.operators,
        "reads by the host": found.reads,
        "launches": found.launches,
        "synchronisations": found.synchronisations,
    }
    yield Figure(f"{what}: batches", batches)
    yield Figure(f"{what}: forwards", called.forwards)
    yield Figure(f"{what}: shapes of attention", found.shapes)
    for kind, count in per_batch.items():
        if count is not None:
            yield Figure(f"{what}: {kind} a batch", count / batches)


SMALL = {"cache all hook_resid_post": 1.05, "cache everything": 1.25}
PARTS: Mapping[str, Part] = {
    "first-64": partial(first, tokens=64, least=25, least_later=85),
    "sweeps-llama-64": partial(swept, name="llama", tokens=64, least=85, least_heads=40),
    "sweeps-gpt-bigcode-32": partial(swept, name="gpt-bigcode", tokens=32, least=110, least_heads=60),
    "sweeps-gpt-bigcode-128": partial(swept, name="gpt-bigcode", tokens=128, least=47),
    "transfers": transferred,
    "reading-gpt-bigcode-1x32": partial(read, name="gpt-bigcode", batch=1, tokens=32, most=SMALL),
    "reading-llama-1x512": partial(read, name="llama", batch=1, tokens=512, most=SMALL),
    "attribution-gpt-bigcode": partial(attributed, name="gpt-bigcode"),
    "attribution-llama": partial(attributed, name="llama"),
    "first-256": partial(first, tokens=256, least=15),
    "counts-gpt-bigcode-32": partial(counted, name="gpt-bigcode", tokens=32),
    "counts-llama-64": partial(counted, name="llama", tokens=64),
    "memory": remembered,
    "reading-llama-4x2048": partial(read, name="llama", batch=4, tokens=2048, most={"listen to one pattern": 1.1}),
    "reading-gpt-bigcode-4x128": partial(read, name="gpt-bigcode", batch=4, tokens=128, most=SMALL),
}
"""What is asked for most comes first, since time may run out."""
LONGEST = 120
"""Seconds that a part may take."""


def say(**values: object) -> None:
    """Prints a line of JSON."""
    print(json.dumps(values), flush=True)


def run_here(parts: Sequence[str], options: argparse.Namespace) -> None:
    """Prints the figures of parts."""
    stage = Stage(options.device, options.tiny, options.rounds, clock_of(options))
    for part in parts:
        for figure in PARTS[part](stage):
            line = {"asked": figure.asked, "measured": float(f"{figure.measured:.4g}")}
            name = "tiny " * options.tiny + figure.name
            say(name=name, **line, card=card(options.device), versions=versions())


def run_apart(part: str, options: argparse.Namespace, end: float) -> bool:
    """Runs a part in a process of its own until a time of the monotonic clock, and returns whether it ended well."""
    most = min(LONGEST, end - time.monotonic())
    if most <= 0:
        say(part=part, error="no time was left")
        return False
    given = ["--here", "--device", options.device, "--rounds", str(options.rounds), *["--tiny"] * options.tiny]
    try:
        done = subprocess.run(
            [sys.executable, __file__, part, *given], stderr=subprocess.PIPE, text=True, timeout=most, check=False
        )
    except subprocess.TimeoutExpired:
        say(part=part, error=f"stopped after {most:.0f} s")
        return False
    if done.returncode:
        say(part=part, error=(done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.returncode == 0


def main() -> int:
    """Prints the figures, and returns the exit code."""
    arguments = parser("Measures what is asked of a GPU.", rounds=7)
    arguments.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    arguments.add_argument("--limit", type=float, default=480, help="seconds in all")
    arguments.add_argument("--tiny", action="store_true", help="with models and inputs as small as they can be")
    arguments.add_argument("--here", action="store_true", help="all in this process")
    arguments.set_defaults(device="cuda")
    options = arguments.parse_args()
    parts, end = options.parts or list(PARTS), time.monotonic() + options.limit
    if options.here:
        run_here(parts, options)
        return 0
    return 0 if min([run_apart(part, options, end) for part in parts]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
