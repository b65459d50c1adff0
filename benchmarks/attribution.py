"""What attribution patching takes, in forwards of the model without gradients.

    python benchmarks/attribution.py [--lengths 32 64 128] [--width 768] [--rounds 31] [--clock cpu]

Random-weight GPTBigCode, 12 layers, d_model 768. Each figure is the median of the ratios to a plain Hugging Face
forward that ran next to it. Operators and synchronisations are what a GPU would feel (`kernels.py`). With few tokens,
or a small `--width`, what is left is Python and the start of operators, as on a GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import clearspan
from clearspan.analysis import attribution_patch, edge_attribution
from clearspan.sweep import LogitDifference
from hand_written import CORRECT, INCORRECT
from kernels import launched
from reference import LAYERS, build, random_tokens
from report import conditions, seconds, table
from timing import clock_of, parser, timed

FORWARD = "forward"
Z = [f"blocks.{layer}.attn.hook_z" for layer in range(LAYERS)]
QKV = [f"blocks.{layer}.attn.hook_{part}" for layer in range(LAYERS) for part in "qkv"]


def logit(logits: Tensor) -> Tensor:
    """Returns the logit whose gradients are taken."""
    return logits[0, -1, CORRECT]


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
        "gradients at z": lambda: bridge.run_with_cache(pair[0], Z, incl_bwd=logit),
        "gradients at q, k, v": lambda: bridge.run_with_cache(pair[0], QKV, incl_bwd=logit),
    }


def main() -> None:
    """Prints a table for each length."""
    arguments = parser("Measures attribution patching.", rounds=31)
    arguments.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128])
    arguments.add_argument("--width", type=int, default=768, help="d_model, 768 by default")
    options = arguments.parse_args()
    clock = clock_of(options)
    bridge = clearspan.boot(build(options.width))
    print(conditions(options.clock))
    for length in options.lengths:
        every = tasks(bridge, length)
        counts = {name: launched(task) for name, task in every.items()}
        times = timed(every, options.rounds, clock, warmups=2)
        rows = [
            [
                name,
                seconds(times.median(name)),
                f"{times.ratio(name, FORWARD):.2f}",
                str(counts[name].operators),
                f"{counts[name].operators / counts[FORWARD].operators:.2f}",
                str(counts[name].synchronisations),
            ]
            for name in times.seconds
        ]
        print(f"\n{length} tokens, {options.rounds} rounds\n")
        print(table(["", "time", "forwards", "operators", "forwards", "synchronisations"], rows), flush=True)


if __name__ == "__main__":
    main()
