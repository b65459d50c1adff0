"""Blocks that are wired like no other: what they add, from where, and which of them a text passes."""

import pytest
import torch
from tests.structures import assert_verified, levels, tiny

import clearspan
from clearspan import zoo
from clearspan.components import LateBiasLinearBridge
from clearspan.errors import UnsupportedArchitectureError
from clearspan.structure import derive
from clearspan.zoo.pins import cannot_generate

TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


def booted(model_type):
    model = zoo.build(model_type)
    return clearspan.boot(model, adapter=derive(model))


@levels
@pytest.mark.parametrize("model_type", ["gpt_neox_japanese", "xmod", "mllama", "moss_transcribe_diarize"])
def test_verify_finds_no_fault(model_type, level):
    assert_verified(booted(model_type), level)


def test_a_bias_that_the_block_adds_is_the_output_projections():
    bridge = booted("gpt_neox_japanese")
    first, last = (block.attn.o for block in bridge.blocks)
    assert (type(first).__name__, type(last)) == ("LinearBridge", LateBiasLinearBridge)
    bias = bridge.hf_model.gpt_neox_japanese.layers[1].attention.dense_bias
    assert bridge.blocks[1].attn.b_O is bias
    _, cache = bridge.run_with_cache(TOKENS)
    added = cache["blocks.1.hook_attn_out"]
    torch.testing.assert_close(added, cache["blocks.1.attn.hook_result"].sum(2) + bias)
    torch.testing.assert_close(cache["blocks.1.hook_resid_pre"] + added, cache["blocks.1.hook_resid_mid"])
    zeroed = bridge.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_attn_out", lambda value, hook: value * 0)])
    with torch.no_grad():
        hidden = bridge.hf_model.gpt_neox_japanese.layers[1]
        stream = cache["blocks.1.hook_resid_pre"]
        stream = stream + hidden.mlp(hidden.post_attention_layernorm(stream))
        expected = bridge.hf_model.embed_out(bridge.hf_model.gpt_neox_japanese.final_layer_norm(stream))
    torch.testing.assert_close(zeroed, expected, rtol=1e-4, atol=1e-4)


def test_such_a_bias_is_centred_with_the_weight():
    centred = booted("gpt_neox_japanese").processed(center_writing_weights=True)
    bias = centred.hf_model.gpt_neox_japanese.layers[1].attention.dense_bias
    assert centred.blocks[1].attn.b_O is bias
    assert float(bias.detach().mean().abs()) < 1e-6


def test_an_adapter_of_a_language_is_an_mlp_that_reads_a_copy_of_the_stream():
    bridge = booted("xmod")
    block = bridge.blocks[0]
    assert block.stages == (("attn",), ("mlp",), ("mlp2",))
    assert block.reads_copies == ("mlp2",)
    assert [block.submodules[name].call for name in ("ln1", "ln2", "ln3")] == [None, 0, 1]
    _, cache = bridge.run_with_cache(TOKENS)
    stream, added = cache["blocks.0.hook_resid_mid2"], cache["blocks.0.hook_mlp2_out"]
    assert torch.equal(stream, cache["blocks.0.ln2.hook_out"])
    torch.testing.assert_close(stream + added, cache["blocks.0.ln3.hook_in"])


def test_layers_that_a_text_passes_by_are_not_counted():
    bridge = booted("mllama")
    assert [block.module_path for block in bridge.blocks] == ["model.layers.0", "model.layers.2"]
    assert bridge.cfg.n_layers == 2
    said = bridge.adapter.source.report().splitlines()
    assert said[0] == "blocks: a text passes by model.layers.1, so that no layer is counted for it"


def test_musicgen_decodes_one_codebook():
    bridge = booted("musicgen")
    assert bridge.embed.module_path == "model.decoder.embed_tokens.0"
    assert bridge.unembed.module_path == "lm_heads.0"
    assert cannot_generate(bridge.hf_model) == float("inf")
    assert cannot_generate(zoo.build("gpt2")) == 0


def test_several_codebooks_are_refused_by_name():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 40, "num_codebooks": 4}
    model = tiny("MusicgenDecoder", "MusicgenForCausalLM", vocab_size=97, **sizes)
    with pytest.raises(UnsupportedArchitectureError) as error:
        derive(model)
    reason = "4 rows of token ids, one of each codebook, make one row of the stream"
    assert f"  reason: {reason}" in str(error.value).splitlines()


def test_layers_that_are_no_modules_are_refused_by_name():
    with pytest.raises(UnsupportedArchitectureError) as error:
        derive(zoo.build("xlm"))
    lists = " and ".join(f"transformer.{name}" for name in ("attentions", "layer_norm1", "ffns", "layer_norm2"))
    assert f"  reason: no module is a block: layers are made of parts of {lists}" in str(error.value).splitlines()
