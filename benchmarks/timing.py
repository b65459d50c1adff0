"""Timing: tasks in alternation, as medians, and as ratios of runs that were next to each other."""

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

Task = Callable[[], object]
Clock = Callable[[], float]

CLOCKS: Mapping[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""By name. Time on the CPU, of one thread, is less disturbed by what else a machine does."""


@dataclass(frozen=True)
class Times:
    """Seconds of the runs of each task. Runs of one index were next to each other."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, task: str) -> float:
        """Returns a task's median time in seconds."""
        return statistics.median(self.seconds[task])

    def ratio(self, task: str, base: str) -> float:
        """Returns the median of how many times as long a task takes as another that ran next to it."""
        pairs = zip(self.seconds[task], self.seconds[base], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def per(self, counts: Mapping[str, int]) -> "Times":
        """Returns the times of one part of each task, which are so many."""
        return Times({task: [each / counts[task] for each in taken] for task, taken in self.seconds.items()})


def timed(tasks: Mapping[str, Task], rounds: int, clock: Clock = time.perf_counter, warmups: int = 1) -> Times:
    """Returns the times of tasks that take turns, every other round in the other order.

    Garbage is collected between rounds, so that no task pays for what another left.
    """
    for _ in range(warmups):
        for task in tasks.values():
            task()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    with collecting_by_hand():
        for index in range(rounds):
            names = list(tasks)[:: 1 if index % 2 else -1]
            for name in names:
                start = clock()
                tasks[name]()
                seconds[name].append(clock() - start)
            gc.collect()
    return Times(seconds)


@contextlib.contextmanager
def collecting_by_hand() -> Iterator[None]:
    """Turns Python's own garbage collection off, and leaves what is there now out of any other."""
    gc.collect()
    gc.freeze()  # what was imported: a collection takes a tenth of a second with it, and none without
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """Returns a parser of the options that all benchmarks have."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--rounds", type=int, default=rounds, help=f"how often each task runs, {rounds} by default")
    found.add_argument("--threads", type=int, help="of torch; by default its own choice, or 1 for the clock of the CPU")
    found.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: time on the CPU, of one thread")
    found.add_argument("--device", default="cpu", help="of models and tokens: cpu, or an accelerator such as cuda")
    return found


def clock_of(options: argparse.Namespace) -> Clock:
    """Returns the clock asked for, which waits for an accelerator before it is read, and gives torch its threads."""
    is_on_cpu = torch.device(options.device).type == "cpu"
    if options.clock == "cpu" and not is_on_cpu:
        raise SystemExit("--clock cpu does not see what an accelerator does: use --clock wall")
    if options.clock == "cpu" and options.threads not in (None, 1):
        raise SystemExit("--clock cpu adds the times of threads up: use it with --threads 1")
    threads = 1 if options.clock == "cpu" else options.threads
    if threads is not None:
        torch.set_num_threads(threads)
    return CLOCKS[options.clock] if is_on_cpu else synchronised


def synchronised() -> float:
    """Returns the time of the wall clock when the accelerator is done."""
    torch.accelerator.synchronize()
    return time.perf_counter()
