"""Weights: canonical shapes, views of the live parameters, and what they compute."""

import pytest
import torch
from tests.conftest import tiny_model

import clearspan
from clearspan.errors import MissingWeightError


def test_shapes(variant):
    heads, kv_heads, d_head = variant.cfg.n_heads, variant.cfg.n_key_value_heads, variant.cfg.d_head
    expected = {
        "W_E": (97, 48), "W_pos": (32, 48), "W_U": (48, 97), "b_U": (97,),
        "W_Q": (3, heads, 48, d_head), "W_K": (3, kv_heads, 48, d_head), "W_V": (3, kv_heads, 48, d_head),
        "W_O": (3, heads, d_head, 48), "b_Q": (3, heads, d_head), "b_K": (3, kv_heads, d_head),
        "b_V": (3, kv_heads, d_head), "b_O": (3, 48),
        "W_in": (3, 48, 192), "b_in": (3, 192), "W_out": (3, 192, 48), "b_out": (3, 48),
    }  # fmt: skip
    assert {name: tuple(getattr(variant, name).shape) for name in expected} == expected


def test_a_blocks_weights_are_views_through_which_a_write_reaches_the_model(variant, tokens):
    storages = {parameter.untyped_storage().data_ptr() for parameter in variant.hf_model.parameters()}
    block = variant.blocks[1]
    views = [getattr(block.attn, f"{kind}_{part}") for kind in "Wb" for part in "QKVO"]
    views += [block.mlp.W_in, block.mlp.b_in, block.mlp.W_out, block.mlp.b_out, block.ln1.w, block.ln1.b]
    views += [variant.W_E, variant.W_pos, variant.W_U]
    assert all(view.untyped_storage().data_ptr() in storages for view in views)
    with torch.no_grad():
        _, before = variant.run_with_cache(tokens)
        block.attn.W_Q[0] *= 2
        block.attn.b_Q[0] *= 2
        _, after = variant.run_with_cache(tokens)
    torch.testing.assert_close(after["q", 1][:, :, 0], before["q", 1][:, :, 0] * 2)
    assert torch.equal(after["q", 1][:, :, 1:], before["q", 1][:, :, 1:])
    assert torch.equal(after["k", 1], before["k", 1])


def test_weights_compute_the_activations(variant, tokens):
    with torch.no_grad():
        _, cache = variant.run_with_cache(tokens)
        read = cache["blocks.2.ln1.hook_out"]
        for name, letter in (("q", "Q"), ("k", "K"), ("v", "V")):
            projected = torch.einsum("bpm,hmd->bphd", read, getattr(variant, f"W_{letter}")[2])
            projected += getattr(variant, f"b_{letter}")[2]
            torch.testing.assert_close(projected, cache[name, 2], rtol=1e-5, atol=1e-4)
        hidden = cache["blocks.2.ln2.hook_out"] @ variant.W_in[2] + variant.b_in[2]
        torch.testing.assert_close(hidden, cache["pre", 2], rtol=1e-5, atol=1e-4)


def test_gradients_flow_into_the_parameters_through_views(bridge):
    bridge.blocks[0].attn.W_K.sum().backward()
    gradient = bridge.hf_model.transformer.h[0].attn.c_attn.weight.grad
    assert gradient[:48].sum() == 0
    assert (gradient[48:60] == 1).all()
    assert gradient[60:].sum() == 0


def test_no_bias_of_the_unembedding_is_zeros_that_take_no_memory(bridge):
    assert not bridge.b_U.any()
    assert bridge.b_U.stride() == (0,)
    bridge.hf_model.lm_head.bias = torch.nn.Parameter(torch.ones(97))
    assert bridge.b_U is bridge.hf_model.lm_head.bias


@pytest.mark.parametrize("multi_query", [True, False])
def test_a_model_without_biases(multi_query, tokens):
    model = tiny_model(multi_query=multi_query)
    for block in model.transformer.h:
        block.attn.c_attn.bias = block.attn.c_proj.bias = None
        block.ln_1 = torch.nn.LayerNorm(48, bias=False)
    bridge = clearspan.boot(model)
    with torch.no_grad():
        base, cache = bridge.run_with_cache(tokens)
        assert torch.equal(base, model(tokens, use_cache=False).logits)
        for name in ("hook_q_input", "hook_v_input", "attn.hook_result", "ln1.hook_normalized"):
            same = bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.{name}", lambda value, hook: value.clone())])
            torch.testing.assert_close(same, base, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(cache["result", 0].sum(2), cache["attn_out", 0], rtol=1e-5, atol=1e-4)
    with pytest.raises(MissingWeightError, match=r"blocks\.0\.attn\.qkv has no bias"):
        bridge.b_Q  # noqa: B018
