"""A plan's bytes are those of the cache that a run then keeps, on every architecture."""

import pytest
import torch
from tests.zoo import MODELS, build

import clearspan

FILTERS = {
    "everything": None,
    "patterns": lambda name: name.endswith("hook_pattern"),
    "rotated queries or z": lambda name: name.endswith(("hook_rot_q", "hook_z")),
    "one stream": "blocks.1.hook_resid_post",
    "derived": lambda name: name.endswith(("hook_scale", "hook_q_input")),
}


@pytest.fixture(params=MODELS)
def bridge(request):
    return clearspan.boot(build(request.param))


def run(bridge, shape, names=None, **terms):
    ids = torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return bridge.run_with_cache(ids, names, **terms)[1]


@pytest.mark.parametrize("shape", [(2, 7), (1, 1), (3, 12)])
def test_bytes_and_shapes_are_those_of_the_run(shape, bridge):
    plan, cache = bridge.plan_cache(shape), run(bridge, shape)
    assert plan.total_bytes == cache.nbytes
    assert [entry.name for entry in plan.entries] == list(cache)
    kept = cache.nbytes
    for entry in plan.entries:
        assert entry.shape == tuple(cache[entry.name].shape), entry.name
    assert kept + plan.look_up_bytes == cache.nbytes


@pytest.mark.parametrize("names", FILTERS.values(), ids=FILTERS)
def test_of_a_part(names, bridge):
    if callable(names) and not any(map(names, bridge.hook_dict)):
        pytest.skip("the model has none of these points")
    plan, cache = bridge.plan_cache((2, 7), names), run(bridge, (2, 7), names)
    assert plan.total_bytes == cache.nbytes
    for name in cache:
        _ = cache[name]
    assert plan.total_bytes + plan.look_up_bytes == cache.nbytes


@pytest.mark.parametrize("terms", [{"pos_slice": -1}, {"pos_slice": (1, 7, 2)}, {"device": "meta"},
                                   {"pos_slice": [0, 3], "device": "meta"}, {"device": "cpu"}], ids=str)  # fmt: skip
def test_of_positions_and_elsewhere(terms, bridge):
    plan, cache = bridge.plan_cache((2, 7), **terms), run(bridge, (2, 7), **terms)
    assert plan.total_bytes == cache.nbytes
    if "pos_slice" in terms:
        assert plan.look_up_bytes == 0
        assert all(entry.shape == tuple(cache[entry.name].shape) for entry in plan.entries)


def test_the_bound_is_one(bridge):
    for shape, names in (((2, 7), None), ((1, 30), FILTERS["patterns"]), ((3, 5), FILTERS["derived"])):
        choice = clearspan.bridge.caching.choose(bridge, names)
        terms = clearspan.bridge.terms.Terms.of(shape, None, None)
        plan = bridge.plan_cache(shape, names)
        assert 4 * choice.bound.numbers(terms) >= plan.total_bytes + plan.look_up_bytes


def test_the_model_is_untouched(bridge):
    model = bridge.hf_model
    before = {name: (id(value), value._version) for name, value in (*model.named_parameters(), *model.named_buffers())}
    own = {name: set(vars(module)) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    bridge.plan_cache((2, 7))
    assert before == {n: (id(v), v._version) for n, v in (*model.named_parameters(), *model.named_buffers())}
    assert own == {name: set(vars(module)) for name, module in model.named_modules()}
    assert torch.equal(state, torch.get_rng_state())
