"""Writes a copy of the package whose embedded model's weights are moved in their last digits.

    python .ci/round.py SOURCE TARGET SEED

What changes with them is what another processor may show otherwise: signs of zero, last digits, the order of ties.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MOVED = 1e-5
"""Of each weight, as a standard deviation; ten times and more what processors differ by."""


def main(source: str, target: str, seed: str) -> None:
    """Copies and moves."""
    shutil.copytree(source, target)
    generator = torch.Generator().manual_seed(int(seed))
    for path in Path(target).rglob("*.safetensors"):
        weights = load_file(path)
        for name, weight in weights.items():
            weights[name] = weight.float() * (1 + MOVED * torch.randn(weight.shape, generator=generator))
        save_file(weights, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main(*sys.argv[1:])
