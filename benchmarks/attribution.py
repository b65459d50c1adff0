"""What attribution patching takes, in forwards of the model without gradients.

    python benchmarks/attribution.py [--model llama] [--device cuda] [--lengths 32 128] [--rounds 31] [--clock cpu]
                                     [--tiny]

Each figure is the median of the ratios to a plain Hugging Face forward that ran next to it.
"""

from collections.abc import Callable, Mapping

import torch

import clearspan
from clearspan.analysis import attribution_patch, edge_attribution
from clearspan.sweep import LogitDifference
from hand_written import CORRECT, INCORRECT
from reference import Reference, add_model_options, build_chosen
from report import conditions, seconds, table
from timing import clock_of, parser, timed

FORWARD, HEADS, EDGES = "forward", "all heads (z)", "all edges (EAP)"


def tasks(reference: Reference, bridge: clearspan.TransformerBridge, length: int) -> Mapping[str, Callable[[], object]]:
    """Returns what is timed, a plain forward first."""
    metric = LogitDifference(CORRECT, INCORRECT)
    pair = (reference.tokens(1, length, seed=1), reference.tokens(1, length))

    @torch.no_grad()
    def forward() -> object:
        return reference.model(pair[1], use_cache=False)

    return {
        FORWARD: forward,
        HEADS: lambda: attribution_patch(bridge, *pair, metric),
        "residual stream by layer and position": lambda: attribution_patch(bridge, *pair, metric, "resid_pre"),
        EDGES: lambda: edge_attribution(bridge, *pair, metric),
        "all edges, 5 steps (EAP-IG)": lambda: edge_attribution(bridge, *pair, metric, steps=5),
    }


def main() -> None:
    """Prints a table for each length."""
    arguments = parser("Measures attribution patching.", rounds=31)
    add_model_options(arguments)
    arguments.add_argument("--lengths", type=int, nargs="+", default=[32, 128])
    options = arguments.parse_args()
    clock = clock_of(options)
    reference = build_chosen(options)
    bridge = clearspan.boot(reference.model)
    print(conditions(options))
    for length in options.lengths:
        times = timed(tasks(reference, bridge, length), options.rounds, clock, warmups=2)
        rows = [[name, seconds(times.median(name)), f"{times.ratio(name, FORWARD):.2f}"] for name in times.seconds]
        print(f"\n{length} tokens, {options.rounds} rounds\n")
        print(table(["", "time", "forwards"], rows), flush=True)


if __name__ == "__main__":
    main()
