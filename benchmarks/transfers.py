"""What bringing activations to the CPU costs beside a plain forward: every block's residual stream, as it appears.

    python benchmarks/transfers.py [--model llama] [--device cuda] [--batch 4 1024] [--rounds 12] [--tiny]

The first call of a process has to allocate the memory on the CPU that later ones use again, and so has a call whose
predecessor's cache is still kept: the three are timed apart. On a CPU nothing is transferred, and the figures say only
that it runs.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

import clearspan
from reference import Reference, add_model_options, build_chosen
from report import conditions, table
from timing import Clock, clock_of, parser, timed


@dataclass(frozen=True)
class Transfers:
    """Ratios to the plain forward.

    Attributes:
        first: The first call in the process.
        warm: A call whose predecessors' caches are gone.
        keeping: A call whose predecessors' caches are all kept.
        here: A call that keeps the values on the device.
    """

    first: float
    warm: float
    keeping: float
    here: float


def transfers(reference: Reference, batch: int, length: int, rounds: int, clock: Clock) -> Transfers:
    """Returns what bringing every block's residual stream to the CPU costs."""
    bridge, tokens = clearspan.boot(reference.model), reference.tokens(batch, length)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(reference.layers)]
    kept: list[clearspan.ActivationCache] = []

    def forward() -> object:
        return reference.model(tokens, use_cache=False)

    def cached(device: str | None) -> clearspan.ActivationCache:
        return bridge.run_with_cache(tokens, names, device=device)[1]

    def against(task: Callable[[], object], warmups: int = 2) -> float:
        gc.collect()
        return timed({"task": task, "forward": forward}, rounds, clock, warmups).ratio("task", "forward")

    with torch.inference_mode():
        one = timed({"forward": forward}, 3, clock).median("forward")
        start = clock()
        cached("cpu")
        first = (clock() - start) / one
        return Transfers(
            first,
            against(lambda: cached("cpu")),
            against(lambda: kept.append(cached("cpu")), warmups=0),
            against(lambda: cached(None)),
        )


def main() -> None:
    """Prints a table."""
    arguments = parser("Measures transfers to the CPU.", rounds=12)
    add_model_options(arguments)
    arguments.add_argument("--batch", type=int, nargs=2, help="rows, and tokens of a row")
    options = arguments.parse_args()
    clock = clock_of(options)
    batch, length = options.batch or ((2, 16) if options.tiny else (4, 1024))
    reference = build_chosen(options)
    print(conditions(options))
    found = transfers(reference, batch, length, options.rounds, clock)
    print(f"\n{options.model}, {batch}x{length} tokens, {options.rounds} rounds\n")
    lines = [
        ["kept on the device", f"{found.here:.3f} x"],
        ["to the CPU, the first call", f"{found.first:.3f} x"],
        ["to the CPU, later calls", f"{found.warm:.3f} x"],
        ["to the CPU, earlier caches kept", f"{found.keeping:.3f} x"],
    ]
    print(table(["every block's residual stream", "of a forward"], lines))


if __name__ == "__main__":
    main()
