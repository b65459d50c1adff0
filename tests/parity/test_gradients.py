"""Gradients: of every point against numeric ones, through writes, and as backward hooks see and change them."""

import pytest
import torch
from tests.conftest import tiny_model
from tests.parity.test_points import FLOATS, IDS

import clearspan
from clearspan.errors import PointNotReachedError


@pytest.fixture(scope="module", params=[True, False])
def exact(request):
    """A bridge in float64, with the cache of a run and its gradients."""
    bridge = clearspan.boot(tiny_model(multi_query=request.param).double())
    tokens = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(1))
    loss, cache = bridge.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    return bridge, tokens, loss, cache


@pytest.mark.parametrize("name", FLOATS)
def test_gradients_equal_numeric_ones(name, exact):
    bridge, tokens, _, cache = exact
    direction = torch.randn(cache[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    if name.endswith("hook_attn_scores"):
        direction = direction.tril()
    # The model takes its softmax in float32, so differences below attention are coarse.
    step, tolerance = 1e-3, 1e-3

    def loss(factor: float) -> float:
        with torch.no_grad():
            hooks = [(name, lambda value, hook: value + factor * direction)]
            return bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="loss").item()

    numeric = (loss(step) - loss(-step)) / (2 * step)
    analytic = (cache[name + "_grad"] * direction).sum().item()
    assert analytic == pytest.approx(numeric, rel=tolerance, abs=2e-5)


@pytest.mark.parametrize("name", FLOATS)
def test_backward_hooks_see_the_same_gradient_and_change_no_number(name, exact):
    bridge, tokens, loss, cache = exact
    seen = {}
    got = bridge.run_with_hooks(
        tokens, bwd_hooks=[(name, lambda grad, hook: seen.update({hook.name: grad.clone()}))], return_type="loss"
    )
    parameters = dict(bridge.hf_model.named_parameters())
    with_hook = torch.autograd.grad(got, list(parameters.values()))
    without = torch.autograd.grad(bridge(tokens, return_type="loss"), list(parameters.values()))
    torch.testing.assert_close(got, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen[name], cache[name + "_grad"], rtol=1e-4, atol=1e-6)
    for one, other in zip(with_hook, without, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_gradients_of_all_points_touch_no_parameter(exact):
    bridge, _, _, cache = exact
    assert all(parameter.grad is None for parameter in bridge.hf_model.parameters())
    named = {name.removesuffix("_grad") for name in cache if name.endswith("_grad")}
    assert named == {point.name for point in bridge.index} - set(IDS)


@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.1.hook_resid_mid", "blocks.1.attn.hook_k", "blocks.1.hook_q_input",
             "blocks.1.ln2.hook_normalized", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_result"]
)  # fmt: skip
@pytest.mark.parametrize("how", ["in place", "returned"])
def test_a_zeroed_gradient_goes_no_further(name, how, exact):
    bridge, tokens, _, _ = exact

    def zero(grad, hook):
        if how == "returned":
            return torch.zeros_like(grad)
        grad.zero_()
        return None

    def gradient(bwd_hooks):
        loss = bridge.run_with_hooks(tokens, bwd_hooks=bwd_hooks, return_type="loss")
        return torch.autograd.grad(loss, bridge.blocks[0].ln1.w)[0]

    if name == "hook_embed":
        loss = bridge.run_with_hooks(tokens, bwd_hooks=[(name, zero)], return_type="loss")
        through_unembedding = torch.autograd.grad(loss, bridge.W_E)[0]
        assert not torch.allclose(
            through_unembedding, torch.autograd.grad(bridge(tokens, return_type="loss"), bridge.W_E)[0]
        )
        return
    whole, cut = gradient([]), gradient([(name, zero)])
    assert (whole - cut).abs().max() > 1e-6
    if name == "blocks.1.hook_resid_mid":
        assert not cut.any()


def test_writes_are_differentiable(exact):
    bridge, tokens, _, _ = exact
    for name in ("blocks.0.hook_resid_mid", "blocks.1.attn.hook_q", "blocks.1.hook_k_input", "blocks.2.ln2.hook_scale"):
        vector = torch.zeros(bridge.hook_dict[name].axes and 1, dtype=torch.float64, requires_grad=True)

        def steer(value, hook, vector=vector):
            return value + vector

        def steer_in_place(value, hook, vector=vector):
            value += vector

        returned = torch.autograd.grad(
            bridge.run_with_hooks(tokens, fwd_hooks=[(name, steer)], return_type="loss"), vector
        )[0]
        in_place = torch.autograd.grad(
            bridge.run_with_hooks(tokens, fwd_hooks=[(name, steer_in_place)], return_type="loss"), vector
        )[0]
        expected = bridge.run_with_cache(tokens, name, incl_bwd=True)[1][name + "_grad"].sum()
        torch.testing.assert_close(returned[0], expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(in_place[0], expected, rtol=1e-4, atol=1e-7)


def test_a_steering_vector_trains(bridge, tokens):
    bridge.hf_model.requires_grad_(False)
    vector = torch.nn.Parameter(torch.zeros(48))
    optimizer = torch.optim.Adam([vector], lr=0.3)
    losses = []
    for _ in range(15):
        hooks = [("blocks.1.hook_resid_pre", lambda value, hook: value + vector)]
        loss = bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="loss")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_backward_hooks_survive_for_a_later_backward(bridge, tokens):
    seen = []
    with bridge.hooks(bwd_hooks=[("blocks.1.attn.hook_z", lambda grad, hook: seen.append(grad.shape))]):
        bridge(tokens, return_type="loss").backward()
    assert seen == [(2, 7, 4, 12)]


def test_under_no_grad_a_backward_hook_raises(bridge, tokens):
    with torch.no_grad(), pytest.raises(PointNotReachedError) as error:
        bridge.run_with_hooks(tokens, bwd_hooks=[("blocks.1.hook_resid_post", lambda grad, hook: None)])
    assert str(error.value).splitlines() == [
        "a backward hook cannot fire: no gradient flows through the value",
        "  where: blocks.1.hook_resid_post (under no_grad)",
        "  fix: run with gradients enabled",
    ]
