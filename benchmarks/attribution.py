"""What attribution patching takes, in forwards of the model without gradients.

    python benchmarks/attribution.py [--lengths 32 128] [--rounds 31] [--clock cpu]

Random-weight GPTBigCode, 12 layers, d_model 768. Each figure is the median of the ratios to a plain Hugging Face
forward that ran next to it.
"""

from collections.abc import Callable

import torch

import clearspan
from clearspan.analysis import attribution_patch, edge_attribution
from clearspan.sweep import LogitDifference
from hand_written import CORRECT, INCORRECT
from reference import build, random_tokens
from report import conditions, seconds, table
from timing import clock_of, parser, timed

FORWARD = "forward"


def tasks(bridge: clearspan.TransformerBridge, length: int) -> dict[str, Callable[[], object]]:
    """Returns what is timed, a plain forward first."""
    metric, pair = LogitDifference(CORRECT, INCORRECT), (random_tokens(1, length, seed=1), random_tokens(1, length))

    @torch.no_grad()
    def forward() -> object:
        return bridge.hf_model(pair[1], use_cache=False)

    return {
        FORWARD: forward,
        "all heads (z)": lambda: attribution_patch(bridge, *pair, metric),
        "residual stream by layer and position": lambda: attribution_patch(bridge, *pair, metric, "resid_pre"),
        "all edges (EAP)": lambda: edge_attribution(bridge, *pair, metric),
        "all edges, 5 steps (EAP-IG)": lambda: edge_attribution(bridge, *pair, metric, steps=5),
    }


def main() -> None:
    """Prints a table for each length."""
    arguments = parser("Measures attribution patching.", rounds=31)
    arguments.add_argument("--lengths", type=int, nargs="+", default=[32, 128])
    options = arguments.parse_args()
    clock = clock_of(options)
    bridge = clearspan.boot(build(768))
    print(conditions(options.clock))
    for length in options.lengths:
        times = timed(tasks(bridge, length), options.rounds, clock, warmups=2)
        rows = [[name, seconds(times.median(name)), f"{times.ratio(name, FORWARD):.2f}"] for name in times.seconds]
        print(f"\n{length} tokens, {options.rounds} rounds\n")
        print(table(["", "time", "forwards"], rows), flush=True)


if __name__ == "__main__":
    main()
