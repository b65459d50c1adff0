"""Gradients of any function of what a run returns, kept in the cache."""

import pytest
import torch
from tests.zoo import build

import clearspan
from clearspan.errors import InvalidArgumentError

NAMES = ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.hook_q_input", "blocks.2.mlp.hook_post"]


@pytest.fixture(scope="module")
def exact():
    return clearspan.boot(build("gpt2").double())


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(1))


def score(logits):
    return (logits[:, -1, 5] - logits[:, 2, 7]).sum() ** 2


def test_they_are_those_of_the_function(exact, ids):
    logits, cache = exact.run_with_cache(ids, NAMES, incl_bwd=score)
    assert torch.equal(logits, exact(ids).detach())
    assert not logits.requires_grad
    for name in NAMES:
        direction = torch.randn(cache[name].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

        def at(step, name=name, direction=direction):
            hook = (name, lambda value, hook: value + step * direction)
            return score(exact.run_with_hooks(ids, fwd_hooks=[hook])).item()

        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        assert float((cache[f"{name}_grad"] * direction).sum()) == pytest.approx(slope, rel=1e-5)


def test_the_loss_as_a_function_gives_the_losss_gradients(exact, ids):
    def loss(logits):
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    both, of_function = exact.run_with_cache(ids, NAMES, incl_bwd=loss, return_type="both")
    value, of_loss = exact.run_with_cache(ids, NAMES, incl_bwd=True, return_type="loss")
    torch.testing.assert_close(both[1], value)
    for name in NAMES:
        torch.testing.assert_close(of_function[f"{name}_grad"], of_loss[f"{name}_grad"])


def test_a_run_that_stops_hands_over_the_residual_stream(exact, ids):
    def of_stream(stream):
        return score(exact.read_out(stream))

    stream, cache = exact.run_with_cache(ids, NAMES, incl_bwd=of_stream, stop_at_layer=3)
    _, whole = exact.run_with_cache(ids, NAMES, incl_bwd=score)
    assert torch.equal(stream, exact(ids, stop_at_layer=3).detach())
    for name in NAMES:
        torch.testing.assert_close(cache[f"{name}_grad"], whole[f"{name}_grad"])


def test_embeddings_need_no_loss(exact, ids):
    embedded = exact.run_with_cache(ids, "blocks.0.hook_resid_pre")[1]["resid_pre", 0]
    _, cache = exact.run_with_cache(embedded, NAMES, incl_bwd=score, start_at_layer=0)
    _, whole = exact.run_with_cache(ids, NAMES, incl_bwd=score)
    torch.testing.assert_close(cache["z_grad", 1], whole["z_grad", 1])


def test_no_parameter_is_touched(exact, ids):
    exact.run_with_cache(ids, NAMES, incl_bwd=score)
    assert all(parameter.grad is None for parameter in exact.hf_model.parameters())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda logits: logits[:, -1, 5],
            "gradients are those of one number\n"
            "  expected: incl_bwd=function, from what the run returns to a tensor of one number\n"
            "  got: a tensor of shape [2]",
        ),
        (
            lambda logits: 0.5,
            "gradients are those of one number\n"
            "  expected: incl_bwd=function, from what the run returns to a tensor of one number\n  got: float",
        ),
        (
            lambda logits: logits.argmax(-1).double().mean(),
            "the function of what the run returns has no gradient\n"
            "  reason: its number does not depend on that by differentiable operations\n"
            "  fix: a smooth function, such as a logit, a log-probability or a loss, under torch.enable_grad()",
        ),
    ],
)
def test_what_is_no_number_with_a_gradient_is_said(exact, ids, function, message):
    with pytest.raises(InvalidArgumentError) as error:
        exact.run_with_cache(ids, NAMES, incl_bwd=function)
    assert str(error.value) == message


def test_the_losss_gradients_need_the_whole_run(exact, ids):
    with pytest.raises(InvalidArgumentError, match="incl_bwd=True needs a scalar loss"):
        exact.run_with_cache(ids, "blocks.1.attn.hook_z", incl_bwd=True, stop_at_layer=2)
