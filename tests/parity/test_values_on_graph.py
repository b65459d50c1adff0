"""A value that a hook function was given is on the graph: torch's own ways to ask for its gradient work on it."""

import pytest
import torch
from tests.zoo import MODELS, build

import clearspan
from clearspan.errors import PointNotReachedError
from clearspan.points import Derived

TOKENS = torch.tensor([[5, 9, 2, 40, 7], [3, 3, 8, 1, 60]])


def close(found, expected, what):
    scale = max(1e-2, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * scale, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("variant", MODELS)
def test_of_every_architecture(variant):
    """At every point at once, against the gradients of backward hooks; the loss and other gradients stay."""
    bridge = clearspan.boot(build(variant))
    _, cache = bridge.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    points = [point for point in bridge.index if f"{point.name}_grad" in cache]
    names = [point.name for point in points if not isinstance(point.access, Derived)]
    given = {}

    def keep(value, hook):
        given[hook.name] = value
        value.retain_grad()

    with torch.no_grad():
        plain = bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda *_: None) for name in names], return_type="loss")
    loss = bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, keep) for name in names], return_type="loss")
    assert torch.equal(loss, plain)
    loss.backward()
    for name in names:
        close(given[name].grad, cache[f"{name}_grad"], name)
    found = [parameter.grad for parameter in bridge.hf_model.parameters()]
    bridge.hf_model.zero_grad()
    bridge(TOKENS, return_type="loss").backward()
    for (name, parameter), one in zip(bridge.hf_model.named_parameters(), found, strict=True):
        assert (one is None) == (parameter.grad is None), name
        if one is not None and parameter.grad is not None:
            close(one, parameter.grad, name)


def hooked(value):
    value.register_hook(lambda gradient: None)


@pytest.mark.parametrize("ask", [torch.Tensor.retain_grad, hooked])
@pytest.mark.parametrize("variant", ["gpt_bigcode", "olmo2", "deepseek_v3"])
def test_a_derived_value_is_refused(variant, ask):
    """The model does not compute with it, so no gradient flows through it."""
    bridge = clearspan.boot(build(variant))
    for point in bridge.index:
        if isinstance(point.access, Derived):
            with pytest.raises(PointNotReachedError, match="asked for the gradient of a derived value"):
                bridge.run_with_hooks(TOKENS, fwd_hooks=[(point.name, lambda value, hook: ask(value))])


@pytest.mark.parametrize("name", ["hook_embed", "blocks.0.attn.hook_q", "blocks.1.hook_resid_mid"])
@pytest.mark.parametrize("returns", [True, False])
def test_other_ways_to_a_gradient(name, returns, bridge):
    """It is asked for afterwards, it is changed by a torch hook, and a frozen model's value is made a leaf."""

    def loss(function, **kwargs):
        def called(value, hook):
            function(value)
            return value if returns else None

        return bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, called)], return_type="loss", **kwargs)

    _, cache = bridge.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    kept = []
    close(torch.autograd.grad(loss(kept.append), kept)[0], cache[f"{name}_grad"], name)

    weight = bridge.hf_model.transformer.wte.weight
    stopped = loss(lambda value: value.register_hook(torch.zeros_like))
    halted = loss(lambda value: None, bwd_hooks=[(name, lambda gradient, hook: torch.zeros_like(gradient))])
    close(*(torch.autograd.grad(one, weight)[0] for one in (stopped, halted)), name)

    bridge.hf_model.requires_grad_(False)
    leaves = []
    loss(lambda value: leaves.append(value.requires_grad_())).backward()
    close(leaves[0].grad, cache[f"{name}_grad"], name)
