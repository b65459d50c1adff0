"""What is kept, and by whom: after `del` nothing of ours refers to a model, and a run keeps nothing it was given."""

import contextlib
import gc
import weakref

import pytest
import torch

import clearspan
from clearspan.circuits import attribution_patch, edge_attribution
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Intervention, Patch, Scale
from clearspan.sweep import LogitDifference, Sweep, grid
from tests.concurrency.test_interrupts import JOBS, OTHER, TOKENS
from tests.zoo import build


@pytest.fixture(autouse=True)
def _uncollected():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "deepseek_v3", "bloom"])
def test_a_model_is_free_when_its_bridge_is_deleted(family):
    bridge = clearspan.boot(build(family))
    model, last = weakref.ref(bridge.hf_model), weakref.ref(bridge.blocks[-1].module)
    for job in JOBS:
        job(bridge)
        bridge.reset_hooks()
    bridge.W_E, bridge.points(), bridge.hook_dict["blocks.0.hook_resid_pre"]
    with bridge.hooks([("blocks.0.hook_mlp_out", lambda value, hook: None)]):
        bridge(TOKENS)
    with contextlib.suppress(RuntimeError), bridge.hooks([("hook_embed", lambda value, hook: None)]):
        raise RuntimeError
    del bridge, job
    assert model() is None
    assert last() is None


def test_the_users_model_outlives_its_bridge():
    model = build("gpt2")
    bridge = clearspan.boot(model)
    attention, point = bridge.blocks[0].attn, bridge.hook_dict["hook_embed"]
    base = bridge(TOKENS)
    expected = attention(base.new_ones(1, 4, bridge.cfg.d_model))
    del bridge
    assert torch.equal(model(TOKENS, use_cache=False).logits, base)
    assert torch.equal(attention(base.new_ones(1, 4, 48)), expected)
    with pytest.raises(InvalidArgumentError, match="bridge of this hook point is gone"):
        point.add_hook(lambda value, hook: None)


class Large:
    """A tensor that a hook function holds, and that can be missed."""

    def __init__(self):
        self.tensor = torch.ones(1000)
        self.alive = weakref.ref(self.tensor)

    def writer(self):
        tensor = self.tensor

        def write(value, hook):
            return value + tensor.sum() * 0

        return write


def runs():
    """Returns ways to run a bridge with a hook function, by name."""
    name = "blocks.0.hook_resid_post"
    return {
        "run": lambda bridge, write: bridge.run_with_hooks(TOKENS, [(name, write)]),
        "backward": lambda bridge, write: bridge.run_with_hooks(TOKENS, bwd_hooks=[(name, write)], return_type="loss"),
        "cache": lambda bridge, write: bridge.run_with_cache(TOKENS, fwd_hooks=[(name, write)]) and None,
        "generation": lambda bridge, write: bridge.generate(TOKENS, fwd_hooks=[(name, write)], max_new_tokens=2),
        "generation with a cache": lambda bridge, write: bridge.generate(
            TOKENS, fwd_hooks=[(name, write)], max_new_tokens=2, return_cache=True
        ),
        "stream": lambda bridge, write: list(
            bridge.generate_stream(TOKENS, fwd_hooks=[(name, write)], max_new_tokens=2)
        ),
        "half a stream": lambda bridge, write: next(
            bridge.generate_stream(TOKENS, fwd_hooks=[(name, write)], max_new_tokens=5)
        ),
        "context": lambda bridge, write: bridge.hooks([(name, write)])(bridge.forward)(TOKENS),
    }


@pytest.mark.parametrize("kind", runs())
def test_a_run_keeps_no_hook_function(kind):
    bridge, large = clearspan.boot(build("llama")), Large()
    found = runs()[kind](bridge, large.writer())
    alive = large.alive
    del large
    if kind == "backward":  # until the graph is gone
        assert alive() is not None
        del found
    assert alive() is None


def test_a_run_keeps_no_intervention_and_no_source():
    bridge = clearspan.boot(build("llama"))
    source = torch.ones(1, 4, 48)
    alive = weakref.ref(source)
    patch = Intervention("resid_post", Patch("other"), layer=0)
    bridge(TOKENS, interventions=[patch], sources={"other": {"blocks.0.hook_resid_post": source}})
    bridge.generate(TOKENS, interventions=[Intervention("z", Scale(2.0), layer=0)], max_new_tokens=2)
    del source
    assert alive() is None


def test_results_keep_no_model():
    bridge = clearspan.boot(build("gpt2"))
    model = weakref.ref(bridge.hf_model)
    metric = LogitDifference(3, 7)
    cells = grid("z", Patch("clean"), layer=range(2), head=range(2))
    kept = [
        Sweep(bridge, TOKENS, cells, metric, sources={"clean": OTHER}).run(progress=False),
        edge_attribution(bridge, OTHER, TOKENS, metric),
        attribution_patch(bridge, OTHER, TOKENS, metric, "z"),
        bridge.verify(),
        bridge.points(),
        bridge.cfg,
    ]
    del bridge
    assert model() is None
    assert len(kept) == 6
