"""What attribution patching takes, in forwards of the model without gradients.

    python benchmarks/attribution.py [--model llama] [--device cuda] [--lengths 32 64 128] [--width 768]
                                     [--rounds 31] [--clock cpu] [--tiny]

Each figure is the median of the ratios to a plain Hugging Face forward that ran next to it. Beside it stands what a
task asks of the device (`kernels.py`). With few tokens, or a small `--width`, that and Python take the time, as on a
GPU.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import clearspan
from clearspan.analysis import attribution_patch, edge_attribution
from clearspan.sweep import LogitDifference
from hand_written import CORRECT, INCORRECT
from kernels import kernels_of
from reference import Reference, add_model_options, build_chosen
from report import conditions, seconds, table
from timing import clock_of, parser, timed

FORWARD, HEADS, EDGES = "forward", "all heads (z)", "all edges (EAP)"


def logit(logits: Tensor) -> Tensor:
    """Returns the logit whose gradients are taken."""
    return logits[0, -1, CORRECT]


def tasks(reference: Reference, bridge: clearspan.TransformerBridge, length: int) -> Mapping[str, Callable[[], object]]:
    """Returns what is timed, a plain forward first."""
    metric = LogitDifference(CORRECT, INCORRECT)
    pair = (reference.tokens(1, length, seed=1), reference.tokens(1, length))
    layers = range(reference.layers)
    heads = [f"blocks.{layer}.attn.hook_z" for layer in layers]
    inputs = [f"blocks.{layer}.attn.hook_{part}" for layer in layers for part in "qkv"]

    @torch.no_grad()
    def forward() -> object:
        return reference.model(pair[1], use_cache=False)

    return {
        FORWARD: forward,
        HEADS: lambda: attribution_patch(bridge, *pair, metric),
        "residual stream by layer and position": lambda: attribution_patch(bridge, *pair, metric, "resid_pre"),
        EDGES: lambda: edge_attribution(bridge, *pair, metric),
        "all edges, 5 steps (EAP-IG)": lambda: edge_attribution(bridge, *pair, metric, steps=5),
        "gradients at z": lambda: bridge.run_with_cache(pair[0], heads, incl_bwd=logit),
        "gradients at q, k, v": lambda: bridge.run_with_cache(pair[0], inputs, incl_bwd=logit),
    }


def main() -> None:
    """Prints a table for each length."""
    arguments = parser("Measures attribution patching.", rounds=31)
    add_model_options(arguments)
    arguments.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128])
    arguments.add_argument("--width", type=int, help="d_model, where the model is not tiny")
    options = arguments.parse_args()
    clock = clock_of(options)
    reference = build_chosen(options, options.width)
    bridge = clearspan.boot(reference.model)
    print(conditions(options))
    for length in options.lengths:
        every = tasks(reference, bridge, length)
        counts = {name: kernels_of(task, reference.device) for name, task in every.items()}
        times, base = timed(every, options.rounds, clock, warmups=1), counts[FORWARD]
        print(f"\n{length} tokens, {options.rounds} rounds\n")
        rows = [
            [
                name,
                seconds(times.median(name)),
                f"{times.ratio(name, FORWARD):.2f}",
                str(found.starts),
                f"{found.starts / base.starts:.2f}",
                str(found.waits),
            ]
            for name, found in counts.items()
        ]
        starts, waits = base.kinds
        print(table(["", "time", "forwards", starts, "forwards", waits], rows), flush=True)


if __name__ == "__main__":
    main()
