"""A check in CI that nothing became slow: counts of work, which are exact, and a few ratios, which have room.

    make bench-check

Times on a shared machine say little, so what can be counted is counted: torch hooks, forwards, bytes. A number that is
larger than here is a regression, and a smaller one is reason to lower it here. The ratios are of CPU time, of one
thread, to a base that runs next to them; each has three attempts. The exit code is 1 if a number is too large.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPTBigCodeForCausalLM

import clearspan
from clearspan.analysis import attribution_patch, edge_attribution
from clearspan.interventions import Patch
from clearspan.sweep import Grid, LogitDifference, Metric, Sweep, grid
from hand_written import CORRECT, INCORRECT, everything, inputs_of, logit_difference, patched_residuals
from libraries import nbytes_of
from reference import LAYERS, blocks_of, build, random_tokens
from report import table
from sweeps import spread
from timing import timed

ATTEMPTS, ROUNDS = 3, 31
MEMORY = 2**31
"""Bytes that a batch of a sweep may take, so that plans do not depend on the machine."""
METRIC = LogitDifference(CORRECT, INCORRECT)


@dataclass(frozen=True)
class Check:
    """One number, and the largest that it may be."""

    what: str
    found: float
    most: float


# --- counts ----------------------------------------------------------------------------------------------------------


def hooks_of(model: GPTBigCodeForCausalLM, run: Callable[[], object]) -> int:
    """Returns how many torch hooks, and forwards in the place of a module's own, are on the model while it runs."""
    modules, counts = list(model.modules()), []

    def count(_: torch.nn.Module, __: object) -> None:
        hooks = sum(len(vars(module)[kind]) for module in modules for kind in kinds)
        counts.append(hooks + sum("forward" in vars(module) for module in modules))

    kinds = ("_forward_hooks", "_forward_pre_hooks")
    handle = blocks_of(model)[LAYERS // 2].register_forward_pre_hook(count)
    try:
        run()
    finally:
        handle.remove()
    return max(counts) - 1


def forwards_of(model: GPTBigCodeForCausalLM, length: int, run: Callable[[], object]) -> float:
    """Returns the work of the blocks while something runs, in whole forwards of so many positions."""
    work = 0

    def count(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal work
        work += args[0].shape[0] * args[0].shape[1]

    with contextlib.ExitStack() as stack:
        for block in blocks_of(model):  # a block that is stepped over is called, but not its parts
            stack.callback(block.attn.c_attn.register_forward_pre_hook(count).remove)
        run()
    return work / (length * LAYERS)


def counts(bridge: clearspan.TransformerBridge, model: GPTBigCodeForCausalLM) -> Iterator[Check]:
    """Gives what reading, generating and attributing costs in hooks, forwards and bytes."""
    tokens, (clean, corrupted) = random_tokens(1, 16), pair(32)
    outputs = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
    one_pattern = [("blocks.5.attn.hook_pattern", lambda value, hook: None)]
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}

    def with_patterns() -> object:
        cache = bridge.run_with_cache(tokens)[1]
        return [cache["pattern", layer] for layer in range(LAYERS)]

    yield Check("hooks, nothing listening", hooks_of(model, lambda: bridge(tokens)), 0)
    yield Check("hooks, one pattern", hooks_of(model, lambda: bridge.run_with_hooks(tokens, fwd_hooks=one_pattern)), 2)
    yield Check("hooks, every block's output", hooks_of(model, lambda: bridge.run_with_cache(tokens, outputs)), LAYERS)
    yield Check("hooks, everything", hooks_of(model, lambda: bridge.run_with_cache(tokens)), 113)
    yield Check("forwards, everything and all patterns", forwards_of(model, 16, with_patterns), 1)
    generation = forwards_of(model, 16, lambda: bridge.generate(tokens, **options))
    yield Check("forwards, 16 tokens after 16", generation, 1 + 15 / 16)
    attribution = forwards_of(model, 32, lambda: attribution_patch(bridge, clean, corrupted, METRIC))
    yield Check("forwards, attribution patching", attribution, 2)
    edges = forwards_of(model, 32, lambda: edge_attribution(bridge, clean, corrupted, METRIC))
    yield Check("forwards, edge attribution", edges, 2)
    kept = bridge.run_with_cache(tokens)[1].nbytes / nbytes_of(everything(model, tokens))
    yield Check("bytes, everything, to plain hooks", kept, 1)


def pair(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns tokens of two runs."""
    return random_tokens(1, length, seed=1), random_tokens(1, length)


def sweep_of(bridge: clearspan.TransformerBridge, cells: Grid, length: int, metric: Metric = METRIC) -> Sweep:
    """Returns the sweep of a grid, from one run of so many tokens to another."""
    clean, corrupted = pair(length)
    return Sweep(bridge, corrupted, cells, metric, sources={"clean": clean})


def residual_cells(length: int) -> Grid:
    """Returns the grid of the residual stream by layer and position."""
    return grid("resid_pre", Patch(), layer=range(LAYERS), position=range(length))


def plans(bridge: clearspan.TransformerBridge, model: GPTBigCodeForCausalLM) -> Iterator[Check]:
    """Gives the work of reference sweeps, as planned, and what it is."""
    heads = grid("z", Patch(), layer=range(LAYERS), head=range(bridge.cfg.n_heads))
    references = {
        "residual stream, 32 tokens": (residual_cells(32), 32, 112.94, 12),
        "residual stream, 128 tokens": (residual_cells(128), 128, 423.32, 116),
        "48 heads, 32 tokens": (heads, 32, 26, 2),
        "48 heads, 128 tokens": (heads, 128, 26, 6),
    }
    for name, (cells, length, forwards, batches) in references.items():
        plan = sweep_of(bridge, cells, length).plan(MEMORY)
        yield Check(f"forwards, {name}", plan.forwards, forwards)
        yield Check(f"batches, {name}", len(plan.tiles), batches)
    sweep = sweep_of(bridge, residual_cells(32), 32)
    planned = sweep.plan(MEMORY).forwards
    found = forwards_of(model, 32, lambda: sweep.run(MEMORY, progress=False))
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


def ratios(bridge: clearspan.TransformerBridge, model: GPTBigCodeForCausalLM) -> Iterator[Check]:
    """Gives times of reading where Python costs most, as ratios to a plain forward."""
    tokens = random_tokens(1, 16)
    outputs = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
    tasks: Mapping[str, tuple[Callable[[], object], float]] = {
        "nothing listening": (lambda: bridge(tokens), 1.12),
        "every block's output": (lambda: bridge.run_with_cache(tokens, outputs), 1.3),
        "everything": (lambda: bridge.run_with_cache(tokens), 1.75),
    }
    for name, (task, most) in tasks.items():
        yield Check(f"time, {name}", ratio(task, lambda: model(tokens, use_cache=False), most), most)


def sweep_ratios(bridge: clearspan.TransformerBridge, model: GPTBigCodeForCausalLM) -> Iterator[Check]:
    """Gives the time of a planned sweep, as a share of that of one plain forward for each cell."""
    cells, (clean, corrupted) = residual_cells(32), pair(32)
    streams = inputs_of(model, blocks_of(model), clean)
    every = list(itertools.product(range(LAYERS), range(32)))
    sample = spread(every, 24)
    metrics: Mapping[str, tuple[Metric, float]] = {"declared": (METRIC, 0.25), "function": (logit_difference, 0.45)}
    for name, (metric, most) in metrics.items():
        share = len(sample) / len(every)
        found = ratio(
            lambda metric=metric: sweep_of(bridge, cells, 32, metric).run(MEMORY, progress=False),
            lambda: patched_residuals(model, corrupted, streams, sample),
            most / share,
            rounds=5,
        )
        yield Check(f"time, residual stream, 32 tokens, {name}", found * share, most)


def main() -> int:
    """Prints the numbers, and returns the exit code."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    model = build(64)
    bridge = clearspan.boot(model)
    with torch.no_grad():
        found = [check for checks in (counts, plans, ratios, sweep_ratios) for check in checks(bridge, model)]
    rows = [
        [check.what, f"{check.found:.5g}", f"{check.most:.5g}", "" if check.found <= check.most else "too large"]
        for check in found
    ]
    print(table(["", "found", "at most", ""], rows))
    print(f"in {time.perf_counter() - start:.0f} s")
    return int(any(check.found > check.most for check in found))


if __name__ == "__main__":
    raise SystemExit(main())
