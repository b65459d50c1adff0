"""Gradients read at nodes of the graph, where nobody listens, and through taps, where somebody does: they are equal."""

import threading

import pytest
import torch
from tests.zoo import MODELS, build

import clearspan
from clearspan.errors import PointNotReachedError
from clearspan.hf.nodes import has_node
from clearspan.points import ReadOnly

TOKENS = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(1))


def unlike(one, other):
    return float((one - other).abs().max()) / (float(other.abs().max()) + 1e-12)


@pytest.mark.parametrize("variant", MODELS)
def test_gradients_at_nodes_are_those_that_taps_give(variant):
    """On every architecture; a listener that reads makes a point's place one of a tap."""
    bridge = clearspan.boot(build(variant))
    points = [point for point in bridge.index if not isinstance(point.access, ReadOnly)]
    _, every = bridge.run_with_cache(TOKENS[:, :2], return_type="loss")
    plain = [point.name for point in points if has_node(point) and point.name in every]
    plain = [name for name in plain if every[name].is_floating_point()]
    assert plain
    _, found = bridge.run_with_cache(TOKENS, plain, incl_bwd=True)
    reading = [(plain, lambda value, hook: None)]
    _, expected = bridge.run_with_cache(TOKENS, plain, incl_bwd=True, fwd_hooks=reading)
    assert {name for name in found if name.endswith("_grad")} == {name for name in expected if name.endswith("_grad")}
    for name in plain:
        assert torch.equal(found[name], expected[name]), name
        if f"{name}_grad" in expected:
            gradient, other = found[f"{name}_grad"], expected[f"{name}_grad"]
            assert gradient.shape == found[name].shape
            assert unlike(gradient, other) < 1e-4, name


@pytest.fixture
def bridge():
    return clearspan.boot(build("llama"))


NAMES = [f"blocks.{layer}.attn.hook_{part}" for layer in range(3) for part in "qkvz"]


def gradients(bridge, **options):
    _, cache = bridge.run_with_cache(TOKENS, NAMES, incl_bwd=lambda logits: logits[:, -1, 3].sum(), **options)
    return [cache[f"{name}_grad"] for name in NAMES]


def test_points_of_one_tensor_share_its_node():
    bridge = clearspan.boot(build("gpt_bigcode"))
    names = [f"blocks.1.attn.hook_{part}" for part in "qkv"]
    _, cache = bridge.run_with_cache(TOKENS, names, incl_bwd=True)
    found = [cache[f"{name}_grad"] for name in names]
    assert len({one.untyped_storage().data_ptr() for one in found}) == 1
    assert all(one.abs().max() > 0 for one in found)


def test_a_forward_inside_a_hook_has_no_nodes(bridge):
    inside = []

    def look(value, hook):
        inside.append(bridge.hf_model(TOKENS[:1]).logits.detach())

    found = gradients(bridge, fwd_hooks=[("blocks.1.hook_resid_pre", look)])
    torch.testing.assert_close(found, gradients(bridge))
    torch.testing.assert_close(inside[0], bridge.hf_model(TOKENS[:1]).logits.detach())


def test_another_thread_sees_the_plain_model(bridge):
    started, go_on, other = threading.Event(), threading.Event(), []

    def wait(value, hook):
        started.set()
        go_on.wait(10)

    def forward():
        started.wait(10)
        with torch.no_grad():  # in which a node would raise
            other.append(bridge.hf_model(TOKENS).logits)
        go_on.set()

    thread = threading.Thread(target=forward)
    thread.start()
    found = gradients(bridge, fwd_hooks=[("blocks.0.hook_resid_post", wait)])
    thread.join()
    torch.testing.assert_close(found, gradients(bridge))
    assert torch.equal(other[0], bridge.hf_model(TOKENS).logits.detach())


def test_frozen_weights_have_gradients_behind_the_first_node(bridge):
    expected = gradients(bridge)
    bridge.hf_model.requires_grad_(False)
    torch.testing.assert_close(gradients(bridge), expected)
    assert not any(parameter.requires_grad for parameter in bridge.hf_model.parameters())


def test_nothing_is_left_on_the_model(bridge):
    def fail(value, hook):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gradients(bridge, fwd_hooks=[("blocks.1.hook_resid_pre", fail)])
    with torch.no_grad(), pytest.raises(PointNotReachedError) as error:
        gradients(bridge)
    assert str(error.value) == (
        "a backward hook cannot fire: no gradient flows through the value\n"
        "  where: blocks.0.attn.hook_q (under no_grad)\n  fix: run with gradients enabled"
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bridge.hf_model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in bridge.hf_model.parameters())
