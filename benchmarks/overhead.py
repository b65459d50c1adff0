"""What the bridge costs: each task as a ratio to the plain Hugging Face forward, paired in one run.

    python benchmarks/overhead.py [--model llama] [--device cuda] [--rounds 151] [--threads 2] [--only 64]
                                  [--clock cpu] [--tiny]

GPTBigCode of d_model 64 on 1x16 tokens, where Python costs most, and of d_model 768 on 4x128; Llama on 1x512 and
4x2048. What is wider than 64 has a fifth of the rounds. Each figure is the median of the ratios of alternating runs.
"Plain hooks" is a hand-written loop of torch hooks that keeps the same raw tensors as the cache does; "with patterns"
runs it under eager attention, whose outputs hold the patterns. The cache computes scores and patterns when they are
looked up, which the last rows time for one layer and for all.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import clearspan
from hand_written import Tokens, everything, residuals
from reference import TINY_WIDTH, Reference, add_model_options, build_chosen
from report import conditions, seconds, table
from timing import Clock, clock_of, parser, timed

Size = tuple[int, int, int]
"""d_model, rows, tokens of a row."""
SIZES: Mapping[str, Sequence[Size]] = {
    "gpt-bigcode": ((64, 1, 16), (768, 4, 128)),
    "llama": ((2048, 1, 512), (2048, 4, 2048)),
}
FEWEST = 15
"""Rounds of what takes long, where there are so many."""


@dataclass(frozen=True)
class Row:
    """A line of the table: a task, and what it is a ratio to."""

    label: str
    task: Callable[[], object]
    base: Callable[[], object]
    is_long: bool = False


def reading(reference: Reference, bridge: clearspan.TransformerBridge, tokens: Tokens) -> list[Row]:
    """Returns the rows of one forward, by the bridge and by plain hooks."""
    layers = range(reference.layers)
    names = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    one_pattern = [(f"blocks.{len(layers) // 2}.attn.hook_pattern", lambda value, hook: None)]

    def base() -> object:
        return reference.model(tokens, use_cache=False)

    def cached() -> clearspan.ActivationCache:
        return bridge.run_with_cache(tokens)[1]

    def hooked() -> object:
        return everything(reference, tokens)

    def all_patterns() -> object:
        cache = cached()
        return [cache["pattern", layer] for layer in layers]

    return [
        Row("hf_model again (noise)", base, base),
        Row("forward, nothing listening", lambda: bridge(tokens), base),
        Row("listen to one pattern", lambda: bridge.run_with_hooks(tokens, fwd_hooks=one_pattern), base),
        Row("cache all hook_resid_post", lambda: bridge.run_with_cache(tokens, names), base),
        Row("plain hooks, every block's output", lambda: residuals(reference, tokens), base),
        Row("cache everything", cached, base),
        Row("plain hooks, everything", hooked, base),
        Row("cache everything, to plain hooks", cached, hooked),
        Row("cache everything, look up a pattern", lambda: cached()["pattern", len(layers) // 2], base),
        Row("cache everything, look up all patterns", all_patterns, base),
    ]


def with_patterns(eager: Reference, base: Row, tokens: Tokens) -> Row:
    """Returns the row of plain hooks on a model whose attention keeps its patterns."""
    eager.model.set_attn_implementation("eager")
    return Row("plain hooks, everything with patterns", lambda: everything(eager, tokens), base.base)


def generation(reference: Reference, bridge: clearspan.TransformerBridge, prompt: Tokens) -> Row:
    """Returns the row of a generation, by the bridge and by the model alone."""
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    generator: Any = reference.model  # whose `generate` has types that no model fits
    mask = torch.ones_like(prompt)
    return Row(
        "generate 16 tokens, greedy",
        lambda: bridge.generate(prompt, **options),
        lambda: generator.generate(prompt, attention_mask=mask, **options),
        is_long=True,
    )


def measured(rows: Sequence[Row], rounds: int, clock: Clock) -> Iterator[tuple[str, float, float]]:
    """Gives the label of each row, its ratio to its base, and the seconds of the base."""
    with torch.inference_mode():
        for row in rows:
            count = fewer(rounds) if row.is_long else rounds
            times = timed({"task": row.task, "base": row.base}, count, clock, warmups=5)
            yield row.label, times.ratio("task", "base"), times.median("base")


def fewer(rounds: int) -> int:
    """Returns the rounds of what takes long."""
    return min(rounds, max(FEWEST, rounds // 5))


def measure(options: argparse.Namespace, size: Size, clock: Clock) -> None:
    """Prints one size's rows."""
    d_model, batch, length = size
    reference = build_chosen(options, d_model)
    bridge, tokens = clearspan.boot(reference.model), reference.tokens(batch, length)
    rows = reading(reference, bridge, tokens)
    rows.append(with_patterns(build_chosen(options, d_model), rows[0], tokens))
    rows.append(generation(reference, bridge, tokens[:, :16]))
    rounds = options.rounds if d_model == TINY_WIDTH else fewer(options.rounds)
    print(f"\nd_model {d_model}, {batch}x{length} tokens, {rounds} rounds\n")
    found = measured(rows, rounds, clock)
    lines = [[label, f"{ratio:.3f} x", seconds(base)] for label, ratio, base in found]
    print(table(["", "ratio", "of"], lines), flush=True)


def main() -> None:
    """Prints a table for each size."""
    arguments = parser("Measures what the bridge costs.", rounds=151)
    add_model_options(arguments)
    arguments.add_argument("--only", type=int, help="the sizes of this d_model")
    options = arguments.parse_args()
    clock = clock_of(options)
    print(conditions(options))
    for size in [(TINY_WIDTH, 1, 16)] if options.tiny else SIZES[options.model]:
        if options.only in (None, size[0]):
            measure(options, size, clock)


if __name__ == "__main__":
    main()
