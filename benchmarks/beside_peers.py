"""clearspan beside plain transformers, torch hooks, TransformerLens, nnsight and interp-engine, paired in one run.

    make bench-peers
    python benchmarks/beside_peers.py [--device cuda] [--rounds 7] [--length 32] [--cells 24] [--only 64] [--clock cpu]

The same tasks (`libraries.Task`) in each library's own way, on random-weight GPTBigCode of 12 layers: d_model 64 on
1x16 tokens, where Python costs most, and d_model 768 on 4x128; patching and generation start from 1x32 tokens. Each
figure is the median of the ratios to a base that ran next to it, and the median time. Every library must give the
base's numbers, or the exit code is 1.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from hand_written import inputs_of
from imports import BASE as IMPORT_TORCH
from imports import times_of_imports
from libraries import Clearspan, ForwardHooks, Inputs, Library, Outcome, Task, Transformers
from memory import loading
from peers.with_interp_engine import InterpEngine
from peers.with_nnsight import NNsight
from peers.with_transformer_lens import TransformerLens
from reference import LAYERS, build, save
from report import conditions, seconds, table
from sweeps import spread
from timing import Clock, Times, clock_of, parser, timed

LIBRARIES: tuple[type[Library], ...] = (
    Transformers,
    ForwardHooks,
    Clearspan,
    TransformerLens,
    NNsight,
    InterpEngine,
)
IMPORTS = {
    "transformers": "from transformers import AutoModelForCausalLM",
    "clearspan": "from clearspan import boot",
    "transformer-lens": "from transformer_lens.model_bridge import TransformerBridge",
    "nnsight": "from nnsight import TransformersModel",
    "interp-engine": "from interp_engine import load_model",
}
SIZES = {64: (1, 16), 768: (4, 128)}
NEW_TOKENS = 16
TOLERANCE = 1e-5
"""Of the largest difference from the base's numbers over the largest of them."""


Key = tuple[str, Task]
"""A library's name and what it does."""
Runs = Mapping[Key, Callable[[], Outcome]]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        label: Its first column.
        task: What the libraries do.
        base: The library and task that it is a ratio to.
        truth: The library and task that gives the right numbers, or None where bytes are shown.
        parts: How many cells the time is divided by.
    """

    label: str
    task: Task
    base: Key
    truth: Key | None
    parts: int = 1


def rows(cells: int, all_cells: int) -> list[Row]:
    """Returns the lines, where patching is of so many cells, or of all by a planner."""
    forward: Key = ("transformers", "forward")
    hooked: Key = ("forward hooks", "cells")
    own: Key = ("transformers", "generation")
    return [
        Row("forward, nothing listening", "forward", forward, forward),
        Row("keep every block's output", "residuals", forward, ("forward hooks", "residuals")),
        Row("keep everything", "everything", forward, None),
        Row("patch a cell, one forward for each", "cells", hooked, hooked, cells),
        Row("patch a cell, as a row of one batch", "batched cells", hooked, hooked, cells),
        Row("patch a cell, planned", "sweep", hooked, hooked, all_cells),
        Row(f"generate {NEW_TOKENS} tokens", "generation", own, own),
    ]


def inputs(d_model: int, length: int, count: int, device: str) -> Inputs:
    """Returns what the tasks of one size are done on."""
    reference = build("gpt-bigcode", d_model, device=device)
    cells = spread([(layer, position) for layer in range(LAYERS) for position in range(length)], count)
    prompt, clean = reference.tokens(1, length), reference.tokens(1, length, seed=1)
    streams = inputs_of(reference, reference.blocks, clean)
    return Inputs(reference.tokens(*SIZES[d_model]), prompt, NEW_TOKENS, prompt, streams, cells)


def checked(row: Row, tasks: Runs) -> Iterator[tuple[str, str, bool]]:
    """Gives each library's error, or the bytes that it keeps, as text, and whether that is right.

    An error is the largest difference from the right numbers over the largest of them.
    """
    right = None if row.truth is None else tasks[row.truth]()
    for (library, task), run in tasks.items():
        if task == row.task:
            found = run()
            if isinstance(found, Tensor):
                assert isinstance(right, Tensor), "what gives a tensor is compared with one"
                error = float((found - right).abs().max() / right.abs().max())
                yield library, f"{error:.1e}", error <= TOLERANCE
            else:
                yield library, f"{found() / 2**20:.1f} MiB", True


def times(row: Row, tasks: Runs, rounds: int, clock: Clock, cells: int) -> tuple[Times, Sequence[str]]:
    """Returns the times of one part of a row's tasks and of its base, and the libraries that have the task."""
    found = {library: run for (library, task), run in tasks.items() if task == row.task}
    measured = timed({"base": tasks[row.base], **found}, rounds, clock)
    base = cells if row.base[1] == "cells" else 1
    return measured.per({"base": base, **dict.fromkeys(found, row.parts)}), list(found)


def measure(d_model: int, options: argparse.Namespace, clock: Clock) -> bool:
    """Prints the table of one size, and returns whether all numbers are right."""
    given = inputs(d_model, options.length, options.cells, options.device)
    with tempfile.TemporaryDirectory() as folder:
        save(build("gpt-bigcode", d_model).model, folder)
        libraries = [library(folder, options.device) for library in LIBRARIES]
    tasks: Runs = {(library.name, task): run for library in libraries for task, run in library.tasks(given).items()}
    names, is_right = [library.name for library in libraries], True
    lines, notes = [], []
    for row in rows(len(given.cells), LAYERS * options.length):
        found = list(checked(row, tasks))
        is_right &= all(is_so for _, _, is_so in found)
        said = ", ".join(f"{name} {text}" for name, text, _ in found)
        notes.append(f"{row.label}: {'keeps' if row.truth is None else 'largest differences'} {said}")
        rounds = options.rounds if d_model == 768 else 5 * options.rounds
        taken, having = times(row, tasks, rounds, clock, len(given.cells))
        cell = {name: f"{taken.ratio(name, 'base'):.2f} ({seconds(taken.median(name))})" for name in having}
        lines.append([row.label, *(cell.get(name, "") for name in names)])
        print(f"  {row.label}", flush=True)
    batch, length = SIZES[d_model]
    print(f"\nd_model {d_model}, {batch}x{length} tokens; patching and generation from 1x{options.length}\n")
    print(table(["", *names], lines), *notes, sep="\n", flush=True)
    return is_right


def measure_loading(rounds: int) -> None:
    """Prints what importing and loading take, each in a process of its own."""
    imports = times_of_imports([IMPORT_TORCH, *IMPORTS.values()], rounds)
    with tempfile.TemporaryDirectory() as folder:
        save(build("gpt-bigcode").model, folder)
        kinds = [library for library in LIBRARIES if library.name in IMPORTS]
        found = [{library.name: loading(library, folder) for library in kinds} for _ in range(rounds)]
    lines = []
    for name, statement in IMPORTS.items():
        ratios = imports.ratio(statement, IMPORT_TORCH), imports.median(statement)
        grown = statistics.median(each[name].mebibytes for each in found)
        took = statistics.median(each[name].seconds for each in found)
        lines.append([name, f"{ratios[0]:.2f} ({seconds(ratios[1])})", seconds(took), f"{grown:.0f} MiB"])
    print("\nloading d_model 768\n")
    print(table(["", f"import, of {IMPORT_TORCH}", "load", "more at the peak"], lines), flush=True)


def main() -> int:
    """Prints the tables, and returns the exit code."""
    arguments = parser("Measures clearspan beside other libraries.", rounds=7)
    arguments.add_argument("--cells", type=int, default=24, help="that are patched, spread over all")
    arguments.add_argument("--length", type=int, default=32, help="of what is patched, and continued")
    arguments.add_argument("--only", type=int, choices=SIZES)
    options = arguments.parse_args()
    clock = clock_of(options)
    transformers.logging.disable_progress_bar()
    print(conditions(options, *(library.name for library in LIBRARIES[3:])), flush=True)
    sizes = [size for size in SIZES if options.only in (None, size)]
    with torch.no_grad():
        is_right = min([measure(size, options, clock) for size in sizes])
    measure_loading(max(1, options.rounds // 2))
    return 0 if is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())
