"""Backward listeners on architectures whose attention and MLP read the residual stream in different ways."""

import pytest
import torch
from tests.zoo import build
from torch import Tensor

import clearspan
from clearspan import TransformerBridge

WAYS = [
    *("llama", "gptj", "olmo2", "falcon", "falcon grouped"),
    *("opt post-norm", "bloom", "mixtral", "deepseek_v3", "phi3"),
]
"""Separate projections, fused ones, no norm before, a shared norm, parallel, latent, half of a fused gate."""


@pytest.fixture(params=WAYS)
def bridge(request: pytest.FixtureRequest) -> TransformerBridge:
    return clearspan.boot(build(request.param))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 97, (2, 8), generator=torch.Generator().manual_seed(2))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(1e-2, expected.abs().max().item()))


def inputs(bridge: TransformerBridge) -> list[str]:
    """The points of block 1 that read the residual stream on behalf of one reader."""
    names = ("attn_in", "q_input", "k_input", "v_input", "mlp_in")
    return [f"blocks.1.hook_{name}" for name in names if f"blocks.1.hook_{name}" in bridge.hook_dict]


def test_a_backward_hook_is_called_with_the_gradient(bridge, ids):
    """At every point of a layer, heard one by one, and all at once."""
    _, cache = bridge.run_with_cache(ids, return_type="loss", incl_bwd=True)
    names = [p.name for p in bridge.index if p.name.startswith("blocks.1.") and f"{p.name}_grad" in cache]
    assert len(names) > 30
    for name in names:
        heard: list[Tensor] = []
        with bridge.hooks(bwd_hooks=[(name, lambda gradient, hook, heard=heard: heard.append(gradient.clone()))]):
            bridge(ids, return_type="loss").backward()
        assert len(heard) == 1, name
        close(heard[0], cache[f"{name}_grad"])
    together: dict[str, Tensor] = {}

    def hear(gradient: Tensor, hook: clearspan.HookPoint) -> None:
        together[hook.name] = gradient.clone()

    with bridge.hooks(bwd_hooks=[(name, hear) for name in names]):
        bridge(ids, return_type="loss").backward()
    for name in names:
        close(together[name], cache[f"{name}_grad"])


def test_the_gradient_of_an_input_can_be_cut(bridge, ids):
    """Zeroing the gradient of one reader's input takes just its share from the residual stream's."""
    _, cache = bridge.run_with_cache(ids, return_type="loss", incl_bwd=True)
    stream = "blocks.1.hook_resid_pre"
    for name in inputs(bridge):
        source = stream if name != "blocks.1.hook_mlp_in" or bridge.blocks[1].is_parallel else "blocks.1.hook_resid_mid"
        share = cache[f"{name}_grad"]
        share = share.sum(2) if share.ndim == 4 else share
        heard: list[Tensor] = []
        hooks = [
            (source, lambda gradient, hook, heard=heard: heard.append(gradient.clone())),
            (name, lambda gradient, hook: torch.zeros_like(gradient)),
        ]
        with bridge.hooks(bwd_hooks=hooks):
            bridge(ids, return_type="loss").backward()
        if bridge.blocks[1].residual_is_normed:
            continue
        close(heard[0], cache[f"{source}_grad"] - share)


def test_a_patch_is_trained_through_every_input(bridge, ids):
    """The gradient of a vector that a hook adds is the sum of the value's gradients."""
    _, cache = bridge.run_with_cache(ids, return_type="loss", incl_bwd=True)
    for name in [*inputs(bridge), "blocks.1.hook_attn_out", "blocks.1.attn.hook_z", "blocks.1.attn.hook_result"]:
        vector = torch.zeros(cache[name].shape[-1], requires_grad=True)
        bridge.run_with_hooks(
            ids, return_type="loss", fwd_hooks=[(name, lambda value, hook, vector=vector: value + vector)]
        ).backward()
        assert vector.grad is not None
        close(vector.grad, cache[f"{name}_grad"].flatten(0, -2).sum(0))


def gradients(bridge: TransformerBridge) -> dict[str, Tensor]:
    return {name: one.grad.clone() for name, one in bridge.named_parameters() if one.grad is not None}


def test_parameters_get_the_gradients_that_they_have_unheard(bridge, ids):
    bridge(ids, return_type="loss").backward()
    expected = gradients(bridge)
    bridge.zero_grad()
    names = [p.name for p in bridge.index if p.name.startswith("blocks.1.") and "expert_indices" not in p.name]
    with bridge.hooks(bwd_hooks=[(name, lambda gradient, hook: None) for name in names]):
        bridge(ids, return_type="loss").backward()
    found = gradients(bridge)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        close(found[name], gradient)
