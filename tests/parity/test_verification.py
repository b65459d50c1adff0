"""What `bridge.verify` finds on models in which something is wrong, and how it says so."""

import inspect
import json
import types

import pytest
import torch
from tests.zoo import build
from torch import nn
from typer.testing import CliRunner

import clearspan
from clearspan.cli import app
from clearspan.errors import InvalidArgumentError, NotFiniteError
from clearspan.verification.report import GROUPS


def patched_block(self, hidden_states, **kwargs):
    """A llama block whose residual branch takes a copy, as a fused add-and-norm would: no write in place reaches it."""
    residual = hidden_states
    hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    hidden_states = residual + hidden_states
    residual = hidden_states.clone()
    return residual + self.mlp(self.post_attention_layernorm(hidden_states))


def test_a_write_that_one_branch_misses_is_found():
    model = build("llama")
    block = model.model.layers[1]
    block.forward = types.MethodType(patched_block, block)
    found = clearspan.boot(model).verify()
    assert not found.passed
    assert {check.group for check in found.failures} == {"writes"}
    assert [check.what for check in found.failures] == ["blocks.1.hook_resid_mid, returned"]
    assert (
        "blocks.1.hook_resid_mid + blocks.1.hook_mlp_out == blocks.1.hook_resid_post" in found.failures[0].explanation
    )
    assert "FAILED writes: blocks.1.hook_resid_mid, returned" in str(found)


def adding_block(self, hidden_states, **kwargs):
    """A llama block that adds to what attention returned, in place."""
    residual = hidden_states
    hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    hidden_states += residual
    return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def test_a_value_that_the_model_overwrites_is_a_failed_check():
    model = build("llama")
    block = model.model.layers[1]
    block.forward = types.MethodType(adding_block, block)
    found = clearspan.boot(model).verify()
    explanations = {check.what: check.explanation for check in found.failures}
    identity = "blocks.1.hook_resid_pre + blocks.1.hook_attn_out == blocks.1.hook_resid_mid"
    assert "blocks.1.hook_attn_out" in explanations[identity], explanations


@pytest.mark.parametrize("variant", ["gemma2", "llama eager", "bloom"])
def test_logits_that_are_not_finite_in_the_model_itself_are_no_fault_of_the_adapter(variant):
    model = build(variant).double()  # softmax in float32 takes the least number of float64 for -inf
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :3] = 0
    assert model(torch.ones_like(mask), attention_mask=mask).logits.isnan().any()
    found = clearspan.boot(model).verify()
    assert found.passed, str(found)
    unchecked = [check for check in found.unavailable if "without this library" in check.explanation]
    assert [check.what for check in unchecked] == ["row of 9 tokens padded on the left to 12"]
    assert [(check.group, check.error) for check in unchecked] == [("padding", None)]
    assert "  1 of padding could not be checked. The model's own forward, without this library, gives" in str(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_model_that_gives_no_numbers_is_not_verified():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NotFiniteError) as error:
        clearspan.boot(model).verify()
    assert str(error.value).splitlines() == [
        "the model's own logits are not finite, so there is nothing to verify",
        "  where: LlamaForCausalLM in torch.float32, without this library",
        "  fix: bridge.to(torch.float32), or other tokens=",
    ]


def test_a_full_verification_finds_it_in_every_layer():
    model = build("llama")
    block = model.model.layers[2]
    block.forward = types.MethodType(patched_block, block)
    assert clearspan.boot(model).verify().passed, "the quick one writes in the middle layer"
    failed = {check.what for check in clearspan.boot(model).verify("full").failures}
    assert failed == {"blocks.2.hook_resid_mid, returned", "blocks.2.hook_resid_mid, in place"}


def test_a_contribution_that_is_not_what_is_added_is_found():
    model = build("granite")
    for layer in model.model.layers:
        layer.residual_multiplier = 0.7  # not what the config says
    found = clearspan.boot(model).verify()
    texts = {check.what for check in found.failures if check.group == "identities"}
    assert "blocks.0.hook_resid_pre + blocks.0.hook_attn_out == blocks.0.hook_resid_mid" in texts
    assert all(check.group in ("identities", "writes") for check in found.failures)


def fused_softmax(scores, dim=-1, dtype=None):
    """A softmax that shows no operation of torch by this name, as that of a fused kernel."""
    weights = (scores - scores.max(dim, keepdim=True).values).exp()
    return weights / weights.sum(dim, keepdim=True)


def test_what_cannot_be_seen_is_named_and_the_rest_verified():
    model = build("mpt")
    attention = model.transformer.blocks[1].attn
    code = inspect.unwrap(type(attention).forward)
    functional = types.SimpleNamespace(**{**vars(nn.functional), "softmax": fused_softmax})
    own = {**code.__globals__, "nn": types.SimpleNamespace(functional=functional)}
    attention.forward = types.MethodType(types.FunctionType(code.__code__, own, argdefs=code.__defaults__), attention)
    found = clearspan.boot(model).verify("full")
    failed = {check.what.partition(",")[0] for check in found.failures}
    assert failed == {f"blocks.1.attn.hook_{name}" for name in ("attn_scores", "pattern")}
    assert "got: 0 softmaxes" in found.failures[0].explanation
    assert any(check.what == "blocks.1.attn.hook_z, returned" and check.passed for check in found.checks)


def test_weights_changed_under_an_attention_are_no_fault(tmp_path):
    bridge = clearspan.boot(build("gpt2"))
    with torch.no_grad():
        bridge.blocks[0].attn.W_O.mul_(3)
    assert bridge.verify().passed


def test_verification_leaves_the_model_as_it_was():
    bridge = clearspan.boot(build("gemma3"))
    bridge.train()
    before = {name: tensor.clone() for name, tensor in bridge.hf_model.state_dict().items()}
    heard = []
    bridge.add_hook("hook_embed", lambda value, hook: heard.append(1))
    assert bridge.verify().passed
    assert bridge.hf_model.training
    assert heard, "the user's own hooks stay and fire"
    assert all(torch.equal(tensor, before[name]) for name, tensor in bridge.hf_model.state_dict().items())
    assert not any(module._forward_hooks for name, module in bridge.hf_model.named_modules() if "layers" in name)


def test_bad_arguments():
    bridge = clearspan.boot(build("gpt2"))
    with pytest.raises(InvalidArgumentError) as error:
        bridge.verify("thorough")
    assert str(error.value).splitlines() == ["unknown level 'thorough'", "  expected: 'quick' or 'full'"]
    with pytest.raises(InvalidArgumentError) as error:
        bridge.verify(tokens=torch.ones(1, 9, dtype=torch.long))
    assert str(error.value).splitlines() == [
        "too few tokens to verify on",
        "  expected: at least 2 rows of 4",
        "  got: [1, 9]",
    ]


def test_command_prints_a_table_and_exits_zero():
    result = CliRunner().invoke(app, ["verify", "tiny-bigcode"])
    assert result.exit_code == 0, result.output
    assert "every point reads and writes as it should" in result.output
    for group in GROUPS.keys() - {"precision", "tokenizer"}:
        assert group in result.output


def test_command_gives_json():
    result = CliRunner().invoke(app, ["verify", "tiny-bigcode", "--full", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["passed"]
    assert found["level"] == "full"
    assert {check["group"] for check in found["checks"]} == GROUPS.keys() - {"precision"}


def test_command_explains_a_failure_and_exits_one(tmp_path, monkeypatch):
    model = build("granite")
    for layer in model.model.layers:
        layer.residual_multiplier = 0.7
    bridge = clearspan.boot(model)
    monkeypatch.setattr(clearspan, "boot", lambda name: bridge)
    result = CliRunner().invoke(app, ["verify", "broken"])
    assert result.exit_code == 1
    assert "failed identities" in result.output
    assert "load it as it was" in result.output
    assert "checks failed" in result.output


def test_command_on_a_model_that_is_not_there():
    result = CliRunner().invoke(app, ["verify", "/no/such/model"])
    assert result.exit_code == 1
