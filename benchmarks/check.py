"""A check in CI that nothing became slow: counts of work, which are exact, and a few ratios, which have room.

    make bench-check

Times on a shared machine say little, so what can be counted is counted: torch hooks, forwards, bytes, operators, calls
of Python. A number that is larger than here is a regression, and a smaller one is reason to lower it here. The ratios
are of CPU time, of one thread, to a base that runs next to them and has the same share of arithmetic; each has three
attempts. The exit code is 1 if a number is too large.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import clearspan
from clearspan.analysis import attribution_patch, edge_attribution
from clearspan.sweep import Costs, Metric
from hand_written import everything, logit_difference
from kernels import calls_of, kernels_of, python_calls
from libraries import nbytes_of
from reference import LAYERS, Reference, build, random_tokens
from report import table
from sweeps import DECLARED, Runs
from timing import timed

ATTEMPTS, ROUNDS = 3, 31
MEMORY, COSTS = 2**31, Costs(token=1e-4, floor=16e-4, start=0.0, join=4e-4, most=1024)
"""Bytes that a batch of a sweep may take, and what blocks cost, so that plans do not depend on the machine."""


@dataclass(frozen=True)
class Check:
    """One number, and the largest that it may be."""

    what: str
    found: float
    most: float


# --- counts ----------------------------------------------------------------------------------------------------------


def hooks_of(reference: Reference, run: Callable[[], object]) -> int:
    """Returns how many torch hooks, and forwards in the place of a module's own, are on the model while it runs."""
    modules, counts = list(reference.model.modules()), []

    def count(_: torch.nn.Module, __: object) -> None:
        hooks = sum(len(vars(module)[kind]) for module in modules for kind in kinds)
        counts.append(hooks + sum("forward" in vars(module) for module in modules))

    kinds = ("_forward_hooks", "_forward_pre_hooks")
    handle = reference.blocks[LAYERS // 2].register_forward_pre_hook(count)
    try:
        run()
    finally:
        handle.remove()
    return max(counts) - 1


def forwards_of(reference: Reference, length: int, run: Callable[[], object]) -> float:
    """Returns the work of the blocks while something runs, in whole forwards of so many positions."""
    work = 0

    def count(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal work
        work += args[0].shape[0] * args[0].shape[1]

    with contextlib.ExitStack() as stack:
        for projection in reference.projections:  # a block that is stepped over is called, but not its parts
            stack.callback(projection.register_forward_pre_hook(count).remove)
        run()
    return work / (length * LAYERS)


def counts(bridge: clearspan.TransformerBridge, reference: Reference) -> Iterator[Check]:
    """Gives what reading, generating and attributing costs in hooks, forwards and bytes."""
    tokens, (clean, corrupted) = random_tokens(1, 16), pair(32)
    outputs = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
    one_pattern = [("blocks.5.attn.hook_pattern", lambda value, hook: None)]
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}

    def with_patterns() -> object:
        cache = bridge.run_with_cache(tokens)[1]
        return [cache["pattern", layer] for layer in range(LAYERS)]

    yield Check("hooks, nothing listening", hooks_of(reference, lambda: bridge(tokens)), 0)
    yield Check(
        "hooks, one pattern", hooks_of(reference, lambda: bridge.run_with_hooks(tokens, fwd_hooks=one_pattern)), 2
    )
    yield Check(
        "hooks, every block's output", hooks_of(reference, lambda: bridge.run_with_cache(tokens, outputs)), LAYERS
    )
    yield Check("hooks, everything", hooks_of(reference, lambda: bridge.run_with_cache(tokens)), 113)
    yield Check("forwards, everything and all patterns", forwards_of(reference, 16, with_patterns), 1)
    generation = forwards_of(reference, 16, lambda: bridge.generate(tokens, **options))
    yield Check("forwards, 16 tokens after 16", generation, 1 + 15 / 16)
    attribution = forwards_of(reference, 32, lambda: attribution_patch(bridge, clean, corrupted, DECLARED))
    yield Check("forwards, attribution patching", attribution, 2)
    edges = forwards_of(reference, 32, lambda: edge_attribution(bridge, clean, corrupted, DECLARED))
    yield Check("forwards, edge attribution", edges, 2)
    kept = bridge.run_with_cache(tokens)[1].nbytes / nbytes_of(everything(reference, tokens))
    yield Check("bytes, everything, to plain hooks", kept, 1)


def pair(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns tokens of two runs."""
    return random_tokens(1, length, seed=1), random_tokens(1, length)


def asked(bridge: clearspan.TransformerBridge, reference: Reference) -> Iterator[Check]:
    """Gives what reading and sweeping ask of the device and of Python, less what a forward of the model asks."""
    tokens, (clean, corrupted), runs = random_tokens(1, 16), pair(32), Runs(reference, bridge, 32)
    outputs = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]

    def forward() -> object:
        return reference.model(tokens, use_cache=False)

    def swept() -> object:
        return runs.sweep(runs.residual_grid()).run(MEMORY, COSTS, progress=False)

    plain, plain_calls = kernels_of(forward, reference.device), python_calls(forward)
    # Calls of Python have 5 % of room, since its releases differ in what is a call.
    tasks: Mapping[str, tuple[Callable[[], object], Sequence[int]]] = {
        "nothing listening": (lambda: bridge(tokens), (0, 1, 107)),
        "every block's output": (lambda: bridge.run_with_cache(tokens, outputs), (0, 1, 553)),
        "everything": (lambda: bridge.run_with_cache(tokens), (0, 1, 3530)),
        "edge attribution, 32 tokens": (lambda: edge_attribution(bridge, clean, corrupted, DECLARED), (460, 9, 17_400)),
        "residual stream, 32 tokens": (swept, (3355, 43, 127_300)),
    }
    for name, (task, (operators, reads, calls)) in tasks.items():
        found = kernels_of(task, reference.device)
        yield Check(f"operators, {name}", found.operators - plain.operators, operators)
        yield Check(f"reads by the host, {name}", found.reads - plain.reads, reads)
        yield Check(f"calls of Python, {name}", python_calls(task) - plain_calls, calls)


def plans(bridge: clearspan.TransformerBridge, reference: Reference) -> Iterator[Check]:
    """Gives the work of reference sweeps, as planned, and what it is."""
    short, long = Runs(reference, bridge, 32), Runs(reference, bridge, 128)
    references = {
        "residual stream, 32 tokens": (short.sweep(short.residual_grid()), 112.94, 12),
        "residual stream, 128 tokens": (long.sweep(long.residual_grid()), 423.32, 116),
        "48 heads, 32 tokens": (short.sweep(short.head_grid()), 26, 2),
        "48 heads, 128 tokens": (long.sweep(long.head_grid()), 26, 6),
    }
    for name, (sweep, forwards, batches) in references.items():
        plan = sweep.plan(MEMORY, COSTS)
        yield Check(f"forwards, {name}", plan.forwards, forwards)
        yield Check(f"batches, {name}", len(plan.tiles), batches)
    sweep = short.sweep(short.residual_grid())
    planned = sweep.plan(MEMORY, COSTS).forwards
    calls = calls_of(
        lambda: short.sweep(short.residual_grid()).run(MEMORY, COSTS, progress=False),
        reference.model,
        time.process_time,
    )
    yield Check("calls of the model, residual stream, 32 tokens, 12 batches", calls.forwards, 13)
    found = forwards_of(reference, 32, lambda: sweep.run(MEMORY, COSTS, progress=False))
    yield Check("forwards beside the plan's, of the run and its source", found - planned, 2)


# --- ratios ----------------------------------------------------------------------------------------------------------


def ratio(task: Callable[[], object], base: Callable[[], object], most: float, rounds: int = ROUNDS) -> float:
    """Returns how many times as long a task takes as its base: the first that is not too large, or the smallest."""
    found = []
    for _ in range(ATTEMPTS):
        times = timed({"task": task, "base": base}, rounds, time.process_time)
        found.append(times.ratio("task", "base"))
        if found[-1] <= most:
            break
    return min(found)


def ratios(bridge: clearspan.TransformerBridge, reference: Reference) -> Iterator[Check]:
    """Gives times of reading where Python costs most, as ratios to a plain forward."""
    tokens = random_tokens(1, 16)
    outputs = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
    tasks: Mapping[str, tuple[Callable[[], object], float]] = {
        "nothing listening": (lambda: bridge(tokens), 1.15),
        "every block's output": (lambda: bridge.run_with_cache(tokens, outputs), 1.4),
        "everything": (lambda: bridge.run_with_cache(tokens), 1.9),
    }
    for name, (task, most) in tasks.items():
        yield Check(f"time, {name}", ratio(task, lambda: reference.model(tokens, use_cache=False), most), most)


def sweep_ratios(bridge: clearspan.TransformerBridge, reference: Reference) -> Iterator[Check]:
    """Gives the time of a planned sweep, as a ratio to plain batches of about its work.

    They have about the sweep's share of arithmetic and of Python, so that the ratio is much the same on machines that
    differ in these. One forward for each cell has not.
    """
    runs = Runs(reference, bridge, 32)
    batch = runs.corrupted.expand(10, -1)
    metrics: Mapping[str, tuple[Metric, float]] = {"declared": (DECLARED, 1.4), "function": (logit_difference, 3.2)}
    for name, (metric, most) in metrics.items():
        found = ratio(
            lambda metric=metric: runs.sweep(runs.residual_grid(), metric).run(MEMORY, COSTS, progress=False),
            lambda: [reference.model(batch, use_cache=False) for _ in range(12)],
            most,
            rounds=5,
        )
        yield Check(f"time, residual stream, 32 tokens, {name}, to plain batches", found, most)


def number(value: float) -> str:
    """Returns a number as text."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.5g}"


def main() -> int:
    """Prints the numbers, and returns the exit code."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    reference = build("gpt-bigcode", 64)
    bridge = clearspan.boot(reference.model)
    with torch.no_grad():
        found = [
            check for checks in (counts, asked, plans, ratios, sweep_ratios) for check in checks(bridge, reference)
        ]
    rows = [
        [check.what, number(check.found), number(check.most), "" if check.found <= check.most else "too large"]
        for check in found
    ]
    print(table(["", "found", "at most", ""], rows))
    print(f"in {time.perf_counter() - start:.0f} s")
    return int(any(check.found > check.most for check in found))


if __name__ == "__main__":
    raise SystemExit(main())
