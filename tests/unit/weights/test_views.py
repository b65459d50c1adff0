"""No write into a weight is lost: it reaches the model, or it raises; and ties are said."""

import copy
import pickle
import warnings

import pytest
import torch
from tests.zoo import MODELS, build

import clearspan
from clearspan.components import WeightTensor
from clearspan.errors import (
    InvalidArgumentError,
    MissingWeightError,
    TiedWeightWarning,
    UnreadableWeightError,
    UnwritableError,
)

STACKED = ["W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out"]
WHOLE = ["W_E", "W_pos", "W_E_pos", "W_U", "b_U"]


@pytest.fixture(params=MODELS)
def zoo(request):
    return clearspan.boot(build(request.param))


def parameters(bridge):
    return {name: parameter.detach().clone() for name, parameter in bridge.hf_model.named_parameters()}


def changed(bridge, before):
    return {name for name, parameter in bridge.hf_model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.filterwarnings("ignore::clearspan.errors.TiedWeightWarning")
def test_each_weight_is_there_writable_or_absent_with_a_reason(zoo):
    """Assigned and written in place, a weight reads as it was written, and something in the model has changed."""
    for name in [*STACKED, *WHOLE]:
        try:
            shown = getattr(zoo, name)
        except MissingWeightError:
            with pytest.raises(MissingWeightError, match="reason: "):
                setattr(zoo, name, torch.zeros(1))
            continue
        if name == "b_U" and zoo.unembed.module.bias is None:
            with torch.no_grad(), pytest.raises(UnwritableError, match="no bias"):
                shown[0] = 1
            continue
        if name in ("W_V", "W_O") and "Deepseek" in zoo.cfg.architecture:
            continue
        before = parameters(zoo)
        new = torch.randn_like(shown)
        setattr(zoo, name, new)
        torch.testing.assert_close(getattr(zoo, name), new, msg=name)
        assert changed(zoo, before), name
        before = parameters(zoo)
        index = (-1, ..., 0) if new.ndim > 1 else -1
        with torch.no_grad():
            getattr(zoo, name)[index] *= 3
        expected = new.clone()
        expected[index] *= 3
        torch.testing.assert_close(getattr(zoo, name), expected, msg=name)
        assert changed(zoo, before), name


def _all_but(W):
    ones = torch.ones(W.shape)
    ones[1, 2] = 0
    return ones


@pytest.mark.parametrize(
    "write",
    [
        lambda W: W[1, 2].mul_(0),
        lambda W: W[1][2].zero_(),
        lambda W: W[1:2, 2].fill_(0),
        lambda W: W.transpose(2, 3)[1, 2].zero_(),
        lambda W: next(one for i, one in enumerate(W) if i == 1)[2].zero_(),
        lambda W: W.unbind(0)[1].select(0, 2).zero_(),
        lambda W: torch.mul(W, _all_but(W), out=W),
        lambda W: torch.nn.init.zeros_(W[1, 2]),
        lambda W: W.data[1, 2].zero_(),
        lambda W: W.__setitem__((1, 2), 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("variant", ["gpt_bigcode", "falcon grouped", "gpt2"])
def test_every_way_to_write_a_stack_reaches_the_model(variant, write):
    bridge = clearspan.boot(build(variant))
    expected = bridge.W_Q.detach().clone()
    expected[1, 2] = 0
    with torch.no_grad():
        write(bridge.W_Q)
    assert torch.equal(bridge.W_Q, expected)
    assert not bridge.blocks[1].attn.W_Q[2].any()


def test_what_is_computed_from_weights_is_an_ordinary_tensor():
    bridge = clearspan.boot(build("llama"))
    W = bridge.W_Q
    assert (
        type(W * 2) is type(W.sum()) is type(torch.einsum("lhmd->lmd", W)) is type(W.detach().clone()) is torch.Tensor
    )
    assert isinstance(W[0], WeightTensor)
    for copied in (pickle.loads(pickle.dumps(W)), copy.deepcopy(W.detach())):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, W)


def test_gradients_reach_the_parameters_through_a_stack():
    bridge = clearspan.boot(build("gpt_bigcode"))
    bridge.W_Q[1].sum().backward()
    assert (bridge.blocks[1].attn.qkv.module.weight.grad[:48] == 1).all()
    assert not bridge.blocks[0].attn.qkv.module.weight.grad.any()


def test_a_write_where_gradients_are_made_says_how_to():
    bridge = clearspan.boot(build("gpt_bigcode"))
    with pytest.raises(UnwritableError, match=r"with torch.no_grad\(\)"):
        bridge.W_Q[0] = 0
    bridge.W_Q = torch.zeros_like(bridge.W_Q)
    assert not bridge.blocks[2].attn.W_Q.any()


def test_a_norms_weight_with_an_offset_writes_through():
    bridge = clearspan.boot(build("gemma2"))
    bridge.ln_final.w = torch.full((bridge.cfg.d_model,), 3.0)
    assert (bridge.ln_final.module.weight == 2).all()
    with torch.no_grad():
        bridge.ln_final.w[5] = 0
    assert bridge.ln_final.module.weight[5] == -1


def test_a_wrong_shape_is_refused():
    bridge = clearspan.boot(build("gpt2"))
    with pytest.raises(InvalidArgumentError, match=r"(?s)cannot assign W_Q.*\[4, 48, 12\].*\[48, 12\]"):
        bridge.blocks[0].attn.W_Q = torch.zeros(48, 12)


@pytest.mark.parametrize("name", ["W_E", "W_U"])
def test_a_write_into_a_tied_weight_says_what_else_changes(name):
    bridge = clearspan.boot(build("gpt2"))
    other = {"W_E": "W_U", "W_U": "W_E"}[name]
    assert bridge.tied == {"W_E": ("W_U",), "W_U": ("W_E",)}
    with pytest.warns(TiedWeightWarning, match=f"{name} and {other} are one parameter"), torch.no_grad():
        getattr(bridge, name)[3:5] = 0
    with pytest.warns(TiedWeightWarning):
        setattr(bridge, name, torch.ones_like(getattr(bridge, name)))
    assert (getattr(bridge, other) == 1).all()
    with pytest.warns(TiedWeightWarning), torch.no_grad():
        bridge.W_E_pos[0] = 4
    assert (bridge.W_U[:, 0] == 4).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bridge.W_pos = bridge.W_pos * 2


def test_a_tied_embedding_stands_for_its_parameter():
    bridge = clearspan.boot(build("gpt2"))
    parameter = bridge.embed.module.weight
    loss = bridge(torch.tensor([[1, 2, 3]]), return_type="loss")
    (gradient,) = torch.autograd.grad(loss, bridge.W_E, retain_graph=True)
    loss.backward()
    assert bridge.W_E.is_leaf
    assert torch.equal(gradient, parameter.grad)
    assert torch.equal(bridge.W_E.grad, parameter.grad)
    bridge.W_E.grad = None
    assert parameter.grad is None
    (bridge.W_E * 2).sum().backward()
    assert (parameter.grad == 2).all()
    optimiser = torch.optim.SGD([bridge.W_E], lr=1.0, foreach=False)
    before = parameter.detach().clone()
    with pytest.warns(TiedWeightWarning):
        optimiser.step()
    torch.testing.assert_close(parameter.detach(), before - 2)


def test_untied_models_have_no_ties():
    bridge = clearspan.boot(build("llama"))
    assert bridge.tied == {}
    assert bridge.W_E is bridge.embed.module.weight


def test_only_embeddings_are_tied_in_the_zoo(zoo):
    assert set(zoo.tied) <= {"W_E", "W_U"}


def test_stacks_of_layers_that_differ_say_which():
    bridge = clearspan.boot(build("qwen3_moe"))
    with pytest.raises(
        MissingWeightError, match=r"(?s)W_in cannot be stacked: layers .* do not have it.*bridge\.blocks\[\d\]"
    ):
        bridge.W_in  # noqa: B018
    with pytest.raises(MissingWeightError, match=r"(?s)no W_pos.*not by a learned embedding"):
        bridge.W_pos  # noqa: B018
    with pytest.raises(MissingWeightError, match=r"(?s)W_gate cannot be stacked.*not gated"):
        clearspan.boot(build("gpt2")).W_gate  # noqa: B018
    with pytest.raises(MissingWeightError, match=r"(?s)mlp has no W_in.*each expert has its own"):
        bridge.blocks[2].mlp.W_in  # noqa: B018


def test_an_offloaded_weight_is_not_read():
    bridge = clearspan.boot(build("gpt2"))
    bridge.blocks[0].attn.o.module.to("meta")
    with pytest.raises(UnreadableWeightError, match="offloaded"):
        bridge.W_O  # noqa: B018


def test_a_composed_weight_refuses_writes():
    bridge = clearspan.boot(build("deepseek_v3 full queries"))
    attn = bridge.blocks[0].attn
    with torch.no_grad(), pytest.raises(UnwritableError, match=r"(?s)W_V of blocks.0.attn is the product.*kv_a_norm"):
        attn.W_V[0] = 0
    with pytest.raises(UnwritableError):
        attn.W_V = torch.zeros_like(attn.W_V)
    with torch.no_grad(), pytest.raises(UnwritableError):
        bridge.W_V[0] = 0
    with torch.no_grad():
        attn.W_Q[1] = 0
    assert not attn.q.module.weight.unflatten(0, (4, -1))[1].any()
