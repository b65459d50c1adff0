"""A plan's bytes are those of the cache that a run then keeps, on every architecture."""

import pytest
import torch
from tests.zoo import MODELS, build

import clearspan
from clearspan._cache.plan import Terms
from clearspan._run.caching import choose

PARTS = {
    "everything": None,
    "patterns": lambda name: name.endswith("hook_pattern"),
    "without squares": lambda name: name.endswith(("hook_rot_q", "hook_z", "hook_scale", "hook_q_input")),
}


@pytest.fixture(params=MODELS, scope="module")
def bridge(request):
    return clearspan.boot(build(request.param))


def run(bridge, shape, names=None, **terms):
    ids = torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return bridge.run_with_cache(ids, names, **terms)[1]


@pytest.mark.parametrize(("names", "shape"), [*zip(PARTS, [(2, 7), (1, 30), (3, 1)], strict=True)])
def test_bytes_and_shapes_are_those_of_the_run(names, shape, bridge):
    names = PARTS[names]
    plan, cache = bridge.plan_cache(shape, names), run(bridge, shape, names)
    assert plan.total_bytes == cache.nbytes
    assert [entry.name for entry in plan.entries] == list(cache)
    for entry in plan.entries:
        assert entry.shape == tuple(cache[entry.name].shape), entry.name
    assert plan.total_bytes + plan.look_up_bytes == cache.nbytes
    assert 4 * choose(bridge, names).bound.numbers(Terms.of(shape, None, None)) >= cache.nbytes


@pytest.mark.parametrize(
    "terms", [{"pos_slice": -1}, {"device": "meta"}, {"pos_slice": [0, 3], "device": "meta"}], ids=str
)
def test_of_positions_and_elsewhere(terms, bridge):
    plan, cache = bridge.plan_cache((2, 7), **terms), run(bridge, (2, 7), **terms)
    assert plan.total_bytes == cache.nbytes
    if "pos_slice" in terms:
        assert plan.look_up_bytes == 0
        assert all(entry.shape == tuple(cache[entry.name].shape) for entry in plan.entries)


def test_the_model_is_untouched(bridge):
    model = bridge.hf_model

    def state():
        tensors = (*model.named_parameters(), *model.named_buffers())
        return {name: (id(tensor), tensor._version) for name, tensor in tensors}, [
            set(vars(m)) for m in model.modules()
        ]

    before = state()
    bridge.plan_cache((2, 7), "hook_logits")
    assert state() == before
