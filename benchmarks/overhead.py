"""What the bridge costs: each task as a ratio to the plain Hugging Face forward, paired in one run.

    python benchmarks/overhead.py [--rounds 151] [--threads 2] [--only 64] [--clock cpu]

Random-weight GPTBigCode, 12 layers: d_model 64 on 1x16 tokens, where Python costs most, and d_model 768 on 4x128 (a
fifth of the rounds). Each figure is the median of the ratios of alternating runs. "Plain hooks" is a hand-written loop
of torch hooks that keeps the same raw tensors as the cache does; "with patterns" runs it under eager attention, whose
outputs hold the patterns. The cache computes scores and patterns when they are looked up, which the last rows time for
one layer and for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import clearspan
from hand_written import everything, residuals
from reference import LAYERS, build, random_tokens
from report import conditions, seconds, table
from timing import Clock, clock_of, parser, timed

SIZES = {64: (1, 16), 768: (4, 128)}
FEWEST = 15
"""Rounds of what takes long, where there are so many."""


@dataclass(frozen=True)
class Row:
    """A line of the table: a task, and what it is a ratio to."""

    label: str
    task: Callable[[], object]
    base: Callable[[], object]
    is_long: bool = False


def rows_of(d_model: int) -> list[Row]:
    """Returns one size's rows."""
    model, eager = build(d_model), build(d_model)
    eager.set_attn_implementation("eager")
    bridge, generator = clearspan.boot(model), model
    tokens = random_tokens(*SIZES[d_model])
    prompt = tokens[:, :16]
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
    one_pattern = [("blocks.5.attn.hook_pattern", lambda value, hook: None)]

    def base() -> object:
        return model(tokens, use_cache=False)

    def cached() -> clearspan.ActivationCache:
        return bridge.run_with_cache(tokens)[1]

    def hooked() -> object:
        return everything(model, tokens)

    def all_patterns() -> object:
        cache = cached()
        return [cache["pattern", layer] for layer in range(LAYERS)]

    return [
        Row("hf_model again (noise)", base, base),
        Row("forward, nothing listening", lambda: bridge(tokens), base),
        Row("listen to one pattern", lambda: bridge.run_with_hooks(tokens, fwd_hooks=one_pattern), base),
        Row("cache all hook_resid_post", lambda: bridge.run_with_cache(tokens, names), base),
        Row("plain hooks, every block's output", lambda: residuals(model, tokens), base),
        Row("cache everything", cached, base),
        Row("plain hooks, everything", hooked, base),
        Row("cache everything, to plain hooks", cached, hooked),
        Row("cache everything, look up a pattern", lambda: cached()["pattern", 5], base),
        Row("cache everything, look up all patterns", all_patterns, base),
        Row("plain hooks, everything with patterns", lambda: everything(eager, tokens), base),
        Row("generate 16 tokens, greedy", *generations(bridge, generator, prompt), is_long=True),
    ]


def generations(
    bridge: clearspan.TransformerBridge, generator: Any, prompt: torch.Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Returns the generation by the bridge, and by the model alone."""
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    return (
        lambda: bridge.generate(prompt, **options),
        lambda: generator.generate(prompt, attention_mask=mask, **options),
    )


def measure(d_model: int, rounds: int, clock: Clock) -> None:
    """Prints one size's rows."""
    batch, length = SIZES[d_model]
    print(f"\nd_model {d_model}, {batch}x{length} tokens, {rounds} rounds\n")
    lines = []
    with torch.inference_mode():
        for row in rows_of(d_model):
            count = fewer(rounds) if row.is_long else rounds
            times = timed({"task": row.task, "base": row.base}, count, clock, warmups=5)
            lines.append([row.label, f"{times.ratio('task', 'base'):.3f} x", seconds(times.median("base"))])
    print(table(["", "ratio", "of"], lines), flush=True)


def fewer(rounds: int) -> int:
    """Returns the rounds of what takes long."""
    return min(rounds, max(FEWEST, rounds // 5))


def main() -> None:
    """Prints a table for each size."""
    arguments = parser("Measures what the bridge costs.", rounds=151)
    arguments.add_argument("--only", type=int, choices=SIZES)
    options = arguments.parse_args()
    clock = clock_of(options)
    print(conditions(options.clock))
    for d_model in SIZES:
        if options.only in (None, d_model):
            measure(d_model, options.rounds if d_model == 64 else fewer(options.rounds), clock)


if __name__ == "__main__":
    main()
