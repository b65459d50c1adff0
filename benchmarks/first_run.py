"""What a sweep takes the first time in a process, and later: each length in a new process.

    python benchmarks/first_run.py [--model llama] [--device cuda] [--lengths 64 256] [--tiny]

The residual stream is patched at each layer and position, with a metric that declares its position. A GPU's libraries
prepare kernels for shapes that they have not seen, which the first sweep pays for. The process has run forwards of one
row before: they give the estimate of the loop of one forward for each cell.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

import clearspan
from reference import Reference, add_model_options, build_chosen
from report import conditions, seconds, table
from sweeps import Runs
from timing import Clock, clock_of, parser, timed


@dataclass(frozen=True)
class FirstRun:
    """Seconds of one length.

    Attributes:
        forward: The first forward in the process.
        loop: Of one forward for each cell, as later forwards take.
        first: The first sweep.
        later: A sweep after it: the fastest of two.
    """

    forward: float
    loop: float
    first: float
    later: float


def first_run(reference: Reference, length: int, clock: Clock) -> FirstRun:
    """Returns what sweeps take in this process, which has run none so far."""
    runs = Runs(reference, clearspan.boot(reference.model), length)
    tokens, cells = runs.corrupted, runs.residual_grid()

    def spent(count: int) -> Sequence[float]:
        return timed({"sweep": lambda: runs.sweep(cells).run(progress=False)}, count, clock, warmups=0).seconds["sweep"]

    with torch.inference_mode():
        forward = {"forward": lambda: reference.model(tokens, use_cache=False)}
        cold = timed(forward, 1, clock, warmups=0).median("forward")
        warm = timed(forward, 5, clock).median("forward")
        return FirstRun(cold, warm * len(cells.cells), spent(1)[0], min(spent(2)))


def in_new_process(options: argparse.Namespace, length: int) -> FirstRun:
    """Returns what sweeps of a length take in a process of their own."""
    given = ["--model", options.model, "--device", options.device, "--clock", options.clock, "--lengths", str(length)]
    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    command = [sys.executable, __file__, *given, *threads, *(["--tiny"] if options.tiny else []), "--here"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return FirstRun(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Prints a table, or one length's numbers as JSON."""
    arguments = parser("Measures the first sweep in a process.", rounds=1)
    add_model_options(arguments)
    arguments.set_defaults(model="llama")
    arguments.add_argument("--lengths", type=int, nargs="+", default=[64, 256], help="tokens of a run")
    arguments.add_argument("--here", action="store_true", help="in this process, of one length, as JSON")
    options = arguments.parse_args()
    clock = clock_of(options)
    if options.here:
        print(json.dumps(asdict(first_run(build_chosen(options), options.lengths[0], clock))))
        return
    print(conditions(options))
    lines = []
    for length in options.lengths:
        found = in_new_process(options, length)
        times = [seconds(each) for each in (found.forward, found.loop, found.first, found.later)]
        lines.append([str(length), *times, f"{found.loop / found.first:.1f} x", f"{found.loop / found.later:.1f} x"])
    header = ["tokens", "first forward", "loop, estimated", "first sweep", "later", "first, faster", "later, faster"]
    print(table(header, lines))


if __name__ == "__main__":
    main()
