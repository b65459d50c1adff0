"""ZAYA, whose blocks multiply the stream and add to it by parameters, and keep it in float32."""

import pytest
import torch
from tests.structures import assert_verified

import clearspan
from clearspan import zoo
from clearspan.architectures.zaya import ZayaArchitectureAdapter
from clearspan.errors import AbsentPointError, InputError, InvalidArgumentError

TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bridge():
    return clearspan.boot(zoo.build("zaya"))


@pytest.fixture(scope="module")
def halved():
    return clearspan.boot(zoo.build("zaya").to(torch.bfloat16))


def test_its_parts_are_found_and_verified(bridge):
    assert type(bridge.adapter) is ZayaArchitectureAdapter
    names = ("hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern", "hook_z")
    assert {f"blocks.1.attn.{name}" for name in names} <= {*bridge.hook_dict}
    assert bridge.cfg.positional_embedding_type == "rotary"
    assert_verified(bridge, "quick")


def test_offsets_are_a_part_of_what_is_added(bridge):
    model, (_, cache) = bridge.hf_model.model, bridge.run_with_cache(TOKENS)
    embedded = model.embed_tokens(TOKENS) + model.input_hidden_states_bias
    torch.testing.assert_close(cache["hook_embed"], embedded * model.input_hidden_states_scale)
    for name, enters, scaling in (
        ("attn", "resid_pre", model.layers[1].post_attention_residual_scale),
        ("mlp", "resid_mid", model.layers[1].post_mlp_residual_scale),
    ):
        given = cache[f"blocks.1.{name}.hook_out"] + scaling.hidden_states_bias
        added = given * scaling.hidden_states_scale + scaling.residual_bias * scaling.residual_scale
        torch.testing.assert_close(cache[f"{name}_out", 1], added)
        after = cache["resid_mid" if name == "attn" else "resid_post", 1]
        torch.testing.assert_close(cache[enters, 1] * scaling.residual_scale + added, after)


@pytest.mark.parametrize("name", ["hook_embed", "blocks.0.hook_attn_out", "blocks.1.hook_mlp_out"])
def test_what_is_added_can_be_written(bridge, name):
    after = {"hook_embed": "blocks.0.hook_resid_pre", "blocks.0.hook_attn_out": "blocks.0.hook_resid_mid"}
    end = after.get(name, "blocks.1.hook_resid_post")
    _, before = bridge.run_with_cache(TOKENS)
    with bridge.hooks(fwd_hooks=[(name, lambda value, hook: value + 1)]):
        _, cache = bridge.run_with_cache(TOKENS)
    torch.testing.assert_close(cache[end], before[end] + 1)


def test_the_stream_is_float32_whatever_the_model_is(halved):
    with halved.hooks(fwd_hooks=[("blocks.0.hook_resid_mid", lambda value, hook: value * 0)]):
        _, cache = halved.run_with_cache(TOKENS)
    assert cache["hook_embed"].dtype is cache["mlp_in", 0].dtype is torch.bfloat16
    assert {cache[name, 0].dtype for name in ("resid_pre", "resid_mid", "resid_post")} == {torch.float32}
    torch.testing.assert_close(cache["resid_post", 0], cache["mlp_out", 0].float(), rtol=0.01, atol=0.01)


def test_a_run_starts_from_a_stream_of_its_own_dtype(halved):
    logits, cache = halved.run_with_cache(TOKENS)
    assert torch.equal(halved(cache["resid_pre", 0], start_at_layer=0), logits)
    torch.testing.assert_close(halved.blocks[0](cache["resid_pre", 0]), cache["resid_post", 0])
    with pytest.raises(InputError) as error:
        halved(cache["resid_pre", 0].double(), start_at_layer=0)
    assert "  expected: the stream's dtype, torch.float32" in str(error.value).splitlines()


def test_routers_go_on_from_those_before(bridge):
    _, cache = bridge.run_with_cache(TOKENS)
    own = bridge.hf_model.model.layers[0].mlp.gate
    logits = own.router_mlp(own.down_proj(cache["blocks.0.mlp.hook_in"]))
    torch.testing.assert_close(cache["blocks.0.mlp.hook_router_logits"], logits)
    assert cache["blocks.0.mlp.hook_router_logits"].shape[-1] == bridge.cfg.hf["num_experts"] + 1
    torch.testing.assert_close(bridge.blocks[0].mlp(cache["blocks.0.mlp.hook_in"]), cache["blocks.0.mlp.hook_out"])
    with pytest.raises(InvalidArgumentError) as error:
        bridge.blocks[1].mlp(cache["blocks.1.mlp.hook_in"])
    assert str(error.value).splitlines()[:2] == [
        "blocks.1.mlp cannot run alone",
        "  reason: its module is given what layer 0 found",
    ]


def test_a_norm_before_a_router_that_is_no_map_is_not_folded(bridge):
    assert not list(bridge.blocks[0].folds())
    assert not list(bridge.blocks[0].mlp.reads())


def test_what_attention_reads_by_head_is_absent(bridge):
    with pytest.raises(AbsentPointError, match="not each one linear map"):
        bridge.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_q_input", lambda value, hook: value)])
