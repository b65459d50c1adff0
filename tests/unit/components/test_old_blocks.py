"""Blocks that return lists, attention that is given one tensor three times, and embeddings scaled in place."""

import pytest
import torch
from tests.structures import LAYER_NORM, SPLIT_EVENLY, assert_verified, bridged, levels, linears, norms, tiny, tokens

from clearspan.architectures.gpt import GPT_SIZES
from clearspan.components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    JointQKVAttentionBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    TransposedLinearBridge,
    UnembeddingBridge,
)
from clearspan.conversions import BlockedQKVConversionRule

GPT = {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 4}


def openai():
    def mapping(cfg):
        def maps(**names):
            return {key.rstrip("_"): TransposedLinearBridge(name=name) for key, name in names.items()}

        rule = BlockedQKVConversionRule(cfg.n_heads, cfg.d_head, cfg.n_heads)
        parts = {
            "ln1": NormalizationBridge(name="ln_1", output_is_overwritten=True),
            "attn": JointQKVAttentionBridge(
                name="attn", qkv_conversion_rule=rule, submodules=maps(qkv="c_attn", o="c_proj")
            ),
            **norms(ln2="ln_2"),
            "mlp": MLPBridge(name="mlp", submodules=maps(in_="c_fc", out="c_proj")),
        }
        return {
            "embed": EmbeddingBridge(name="transformer.tokens_embed"),
            "pos_embed": PosEmbedBridge(name="transformer.positions_embed"),
            "blocks": BlockBridge(name="transformer.h", submodules=parts, norms_the_sum=True),
            "unembed": UnembeddingBridge(name="lm_head"),
        }

    return bridged(
        tiny("OpenAIGPT", "OpenAIGPTLMHeadModel", **GPT),
        mapping,
        config_values=LAYER_NORM,
        sizes={**GPT_SIZES, "act_fn": ("afn",)},
        irrelevant={"*.position_ids": "positions", "*.attn.bias": "the causal mask"},
        whole_sequences="the model takes no KV cache",
    )


def ctrl():
    def mapping(cfg):
        maps = linears(q="Wq", k="Wk", v="Wv", o="dense")
        parts = {
            **norms(ln1="layernorm1"),
            "attn": AttentionBridge(name="multi_head_attention", submodules=maps, same_inputs=("k", "q")),
            **norms(ln2="layernorm2"),
            "mlp": MLPBridge(name="ffn", submodules=linears(in_="0", out="2")),
        }
        return {
            "embed": EmbeddingBridge(name="transformer.w", ends_at="transformer.dropout", output_is_overwritten=True),
            "pos_embed": PosEmbedBridge(table=None, ends_in_embed=True),
            "blocks": BlockBridge(name="transformer.h", submodules=parts),
            **norms(ln_final="transformer.layernorm"),
            "unembed": UnembeddingBridge(name="lm_head"),
        }

    return bridged(
        tiny("CTRL", "CTRLLMHeadModel", **GPT, dff=80),
        mapping,
        config_values={**LAYER_NORM, "has_table": True},
        sizes={**SPLIT_EVENLY, "n_ctx": ("n_positions",), "d_mlp": ("dff",), "act_fn": ()},
        irrelevant={"*pos_encoding": "sines and cosines of positions"},
    )


KINDS = {"openai": openai, "ctrl": ctrl}


@levels
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_verify(kind, level):
    assert_verified(KINDS[kind](), level)


def test_attention_that_is_given_one_tensor_three_times_reads_an_edit_in_all():
    bridge = ctrl()
    ids = tokens(bridge.hf_model)
    with bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_in", lambda value, hook: value * 2)]):
        _, cache = bridge.run_with_cache(ids)
    plain = bridge.run_with_cache(ids)[1]
    for letter in "qkv":
        bias = getattr(bridge.blocks[1].attn, f"b_{letter.upper()}")
        edited, before = cache[letter, 1], plain[letter, 1]
        assert torch.allclose(edited - bias, 2 * (before - bias), atol=1e-5)
    normed = plain["blocks.1.ln1.hook_out"]
    assert torch.allclose(bridge.blocks[1].attn(normed), plain["blocks.1.attn.hook_out"], atol=1e-5)


def test_embeddings_scaled_in_place_leave_what_they_were_given():
    bridge = ctrl()
    ids = tokens(bridge.hf_model)
    embeds = bridge.W_E[ids].detach().clone()
    given = embeds.clone()
    _, cache = bridge.run_with_cache(ids)
    assert torch.equal(bridge(given), bridge(ids))
    assert torch.equal(given, embeds)
    assert torch.equal(cache["embed.hook_out"], embeds)
    residual = cache["resid_pre", 1]
    before = residual.clone()
    assert torch.equal(bridge(residual, start_at_layer=1), bridge(ids))
    assert torch.equal(residual, before)
    assert bridge.why_absent("hook_pos_embed") == (
        "the model adds positions in its own forward, by no module, and hook_embed has them"
    )


def test_a_run_of_some_blocks_that_return_lists():
    bridge = openai()
    ids = tokens(bridge.hf_model)
    with torch.no_grad():
        stream = bridge(ids, stop_at_layer=2)
        assert torch.equal(bridge(stream, start_at_layer=2), bridge(ids))
    assert torch.equal(bridge.run_with_cache(ids)[1]["resid_post", 1], stream)
