"""Sweeps on every model type of transformers: the numbers of whole forwards, by the fastest way that each takes."""

import pytest
import torch

import clearspan
from clearspan import zoo
from clearspan.interventions import Scale
from clearspan.sweep import LogitDifference, Sweep, grid
from clearspan.zoo.models import why_unbuildable

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore::UserWarning")]

REFUSED = {"dory", "inkling2_loop_text", "inkling2_text", "xlm"}
"""Model types for which there is no adapter."""
BUILT = [name for name in zoo.types() if why_unbuildable(name) is None and name not in REFUSED]
WHOLE = {"blt", "cpmant", "hrm_text", "prophetnet", "reformer", "rwkv", "xlm-prophetnet", "xlnet"}
"""Model types of which no block can be run apart from the whole forward."""
IN_TURN = {"glm_moe_dsa", "hy_v4", "zaya"}
"""Model types whose blocks hand on more than the stream, which rows that join have none of."""
FEEDERS = ("resid_pre", "mlp_out")


@pytest.mark.parametrize("model_type", BUILT)
def test_cells_equal_whole_forwards(model_type):
    bridge = clearspan.boot(zoo.build(model_type))
    vocabulary = bridge.hf_model.config.get_text_config().vocab_size
    tokens = torch.randint(3, vocabulary, (2, 9), generator=torch.Generator().manual_seed(2))
    point = next(name for name in FEEDERS if f"blocks.0.hook_{name}" in bridge.hook_dict)
    layers = [layer for layer in range(bridge.cfg.n_layers) if f"blocks.{layer}.hook_{point}" in bridge.hook_dict]
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :2] = 0
    for attention_mask in (None, mask if model_type != "reformer" else None):
        cells = grid(point, Scale(0.5), layer=layers, position=(2, 5))
        sweep = Sweep(bridge, tokens, cells, LogitDifference(4, 5), attention_mask=attention_mask)
        way = sweep.plan().way
        assert (way.is_whole, way.in_one) == (model_type in WHOLE, model_type not in IN_TURN), str(way)
        sweep.run(progress=False)
        assert sweep.check(4) < 2e-5
