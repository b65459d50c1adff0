"""What takes the place of a module's forward: found by its signature, taken off in any order, and what a cache sees."""

import copy
import inspect

import pytest
import torch
from tests.zoo import build
from torch import nn

import clearspan
from clearspan.hf.torch_hooks import StandIn

TOKENS = torch.tensor([[5, 9, 2, 40]])


def adding(amount):
    return lambda run, value: run(value) + amount


@pytest.fixture
def module():
    return nn.Linear(2, 2)


def test_a_forward_in_the_place_of_a_modules_has_its_signature(module):
    own = inspect.signature(module.forward)
    StandIn(module, adding(1))
    StandIn(module, adding(1))
    assert inspect.signature(module.forward) == own


def test_forwards_in_a_modules_place_come_off_in_any_order(module):
    value = torch.ones(2)
    base = module(value)
    lower, middle, upper = (StandIn(module, adding(amount)) for amount in (1, 10, 100))
    torch.testing.assert_close(module(value), base + 111)
    lower.restore()
    torch.testing.assert_close(module(value), base + 110)
    upper.restore()
    torch.testing.assert_close(module(value), base + 10)
    middle.restore()
    torch.testing.assert_close(module(value), base)
    assert "forward" not in vars(module)


def test_a_copy_has_none_of_several_forwards_in_the_modules_place(module):
    value = torch.ones(2)
    base = module(value)
    for amount in (1, 10):
        StandIn(module, adding(amount))
    other = copy.deepcopy(module)
    with torch.no_grad():
        module.weight.zero_()
    torch.testing.assert_close(other(value), base)


def test_a_model_says_what_its_forward_takes_while_all_is_kept():
    bridge = clearspan.boot(build("llama"))
    taken, own = [], inspect.signature(bridge.hf_model.forward)

    def ask(value, hook):
        taken.append(inspect.signature(bridge.hf_model.forward))

    bridge.run_with_cache(TOKENS, fwd_hooks=[("blocks.0.hook_resid_pre", ask)])
    assert taken == [own]


@pytest.mark.parametrize("of_all_modules", [False, True])
def test_a_cache_has_what_the_users_torch_hook_made_of_an_output(of_all_modules):
    bridge = clearspan.boot(build("llama"))
    module = bridge.blocks[1].mlp.module
    register = nn.modules.module.register_module_forward_hook if of_all_modules else module.register_forward_hook
    handle = register(lambda on, _, output: output * 2 if on is module else None)
    try:
        _, cache = bridge.run_with_cache(TOKENS)
    finally:
        handle.remove()
    _, plain = bridge.run_with_cache(TOKENS)
    torch.testing.assert_close(cache["mlp_out", 1], plain["mlp_out", 1] * 2)
    torch.testing.assert_close(cache["resid_post", 1], cache["resid_mid", 1] + cache["mlp_out", 1])


def test_a_hook_that_a_function_adds_stays_when_the_run_is_over():
    bridge = clearspan.boot(build("bloom"))  # whose attention is seen by a forward in its forward's place
    seen = []

    def add(value, hook):
        if not seen:
            seen.append("added")
            bridge.add_hook("blocks.1.attn.hook_pattern", lambda pattern, hook: seen.append(pattern.shape))

    bridge.run_with_cache(TOKENS, "blocks.1.attn.hook_out", fwd_hooks=[("blocks.0.hook_resid_pre", add)])
    seen.clear()
    bridge(TOKENS)
    assert len(seen) == 1
    bridge.reset_hooks()
    assert not any("forward" in vars(module) for module in bridge.hf_model.modules())
