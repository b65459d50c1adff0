"""What the README shows, with an installed wheel and nothing that a developer has."""

import importlib.metadata

import torch

import clearspan
from clearspan.interventions import Patch
from clearspan.sweep import LogitDifference, Sweep, grid

assert "site-packages" in clearspan.__file__, clearspan.__file__
assert importlib.metadata.version("clearspan") == clearspan.__version__

bridge = clearspan.boot("tiny-bigcode")
clean, corrupted = bridge.to_tokens("import os\nimport sys"), bridge.to_tokens("import re\nimport sys")
logits, cache = bridge.run_with_cache(clean)
assert torch.equal(logits, bridge.hf_model(clean, use_cache=False).logits)
assert cache["pattern", 2].shape == (1, 8, clean.shape[1], clean.shape[1])

cells = grid("resid_pre", Patch("clean"), layer=range(5), position=range(clean.shape[1]))
found = Sweep(bridge, corrupted, cells, LogitDifference(3, 5), sources={"clean": clean}).run(progress=False)
assert len(found.to_dataframe()) == 5 * clean.shape[1]
assert bridge.verify().passed
print(f"clearspan {clearspan.__version__}, installed from a wheel, works")
