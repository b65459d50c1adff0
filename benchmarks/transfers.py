"""What bringing activations to the CPU costs beside a plain forward: every block's residual stream, as it appears.

    python benchmarks/transfers.py [--model llama] [--device cuda] [--batch 4 1024] [--rounds 12] [--tiny]

The first call of a process has to allocate the memory on the CPU that later ones use again, and so has a call whose
predecessor's cache is still kept: the three are timed apart. Beside them stand torch hooks that do the same by hand:
with `.cpu()`, which waits for each tensor; with an `Outbound`, which is what a cache sends its tensors by; and with a
`Ring`, whose buffers are filled anew as soon as a consumer has seen them. A ring is run over several batches.

On a CPU nothing is transferred: a cache stays by reference, `.cpu()` is a clone, and the figures of `Outbound` and
`Ring` say what their own work costs, in which each tensor is copied twice.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import clearspan
from clearspan.transfers import PINNED, Outbound, Parcel, Ring
from reference import Reference, add_model_options, build_chosen
from report import conditions, seconds, table
from timing import Clock, clock_of, parser, timed

BATCHES = 4
"""Forwards that a ring is kept open for."""


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


@dataclass(frozen=True)
class ByHand:
    """Ratios of torch hooks that bring every block's output to the CPU, to the plain forward.

    Attributes:
        waiting: Each tensor by `.cpu()`.
        outbound: All by an `Outbound`, complete after each forward.
        ring: All through a `Ring`, complete after `BATCHES` forwards.
        forward: Seconds of the plain forward.
    """

    waiting: float
    outbound: float
    ring: float
    forward: float


def by_hand(reference: Reference, batch: int, length: int, rounds: int, clock: Clock) -> ByHand:
    """Returns what torch hooks cost that bring every block's output to the CPU."""
    tokens, kind = reference.tokens(batch, length), reference.device.type
    width = reference.model.config.hidden_size
    assert width is not None, "the model has a width"
    size = batch * length * width * reference.model.dtype.itemsize

    def forward() -> None:
        reference.model(tokens, use_cache=False)

    def waiting() -> None:
        with leaving(reference, lambda output: output.clone() if kind == "cpu" else output.cpu()):
            forward()

    def outbound() -> None:
        with Outbound(kinds=(kind,)) as there, leaving(reference, there.copy):
            forward()

    def ring() -> None:
        with (
            Ring(seen, 2 * reference.layers, size) as there,
            leaving(reference, lambda output: there.put(output, None)),
        ):
            for _ in range(BATCHES):
                forward()

    def forwards() -> None:
        for _ in range(BATCHES):
            forward()

    with torch.inference_mode():
        one = timed({"waiting": waiting, "outbound": outbound, "forward": forward}, rounds, clock, 2)
        several = timed({"ring": ring, "forward": forwards}, max(1, rounds // BATCHES), clock)
    ratios = one.ratio("waiting", "forward"), one.ratio("outbound", "forward"), several.ratio("ring", "forward")
    return ByHand(*ratios, one.median("forward"))


def seen(parcels: Iterator[Parcel[None]]) -> None:
    """Consumes parcels, and does nothing with them."""
    for _ in parcels:
        pass


@contextlib.contextmanager
def leaving(reference: Reference, send: Callable[[Tensor], object]) -> Iterator[None]:
    """While the context is open, calls a function with each block's output, and keeps what it returns."""
    kept = []
    with contextlib.ExitStack() as stack:
        for block in reference.blocks:
            hook = block.register_forward_hook(
                lambda _, __, output: kept.append(send(output if isinstance(output, Tensor) else output[0]))
            )
            stack.callback(hook.remove)
        yield


def main() -> None:
    """Prints two tables."""
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
    print(f"\n{PINNED.in_use / 2**20:.0f} MiB of pinned memory in use, of {PINNED.limit / 2**20:.0f}\n")
    hand = by_hand(reference, batch, length, options.rounds, clock)
    lines = [
        ["torch hooks, .cpu()", f"{hand.waiting:.3f} x"],
        ["torch hooks, an Outbound", f"{hand.outbound:.3f} x"],
        [f"torch hooks, a Ring over {BATCHES} forwards", f"{hand.ring:.3f} x"],
    ]
    print(table(["every block's output, by hand", f"of a forward of {seconds(hand.forward)}"], lines))


if __name__ == "__main__":
    main()
