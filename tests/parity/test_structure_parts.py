"""Mixtures, latents, norms and unembeddings that are like no others: their parts are found, and do what they say."""

import functools

import pytest
import torch
from tests.releases import known
from tests.structures import assert_verified, levels, tokens

import clearspan
from clearspan import TransformerBridge, zoo
from clearspan._forward.readout import read_out
from clearspan.components import GatedNormBridge, LatentAttentionBridge, MoEBridge
from clearspan.errors import InexactProcessingError, InvalidArgumentError
from clearspan.structure import derive
from clearspan.zoo import models


@functools.cache
def booted(model_type: str) -> TransformerBridge:
    model = zoo.build(model_type)
    return clearspan.boot(model, adapter=derive(model))


def mixture(model_type: str) -> MoEBridge:
    found = [block.mlp for block in booted(model_type).blocks if "mlp" in block.submodules]
    return next(one for one in found if isinstance(one, MoEBridge))


def test_weights_of_experts_are_told_apart_by_what_they_do():
    assert (mixture("dbrx").experts.reading, mixture("dbrx").experts.adding) == (("mlp.w1", "mlp.v1"), "mlp.w2")
    assert mixture("dbrx").experts.adding_is_transposed
    assert (mixture("nemotron_h").experts.reading, mixture("nemotron_h").experts.adding) == (("up_proj",), "down_proj")
    assert mixture("gpt_oss").experts.is_transposed


def test_a_router_need_not_be_a_linear_map():
    assert mixture("ernie4_5_moe").router.name == "gate"  # it has a part of its own beside its weight
    assert mixture("longcat_flash").router.holder == "classifier"  # whose weight alone is used
    assert (mixture("dbrx").router.logits, mixture("dbrx").router.k) == ("layer", 2)  # which does not choose itself


def test_experts_without_weights_return_their_input():
    mlp = mixture("longcat_flash")
    assert mlp.has_identities
    assert not list(mlp.reads())  # so that the norm before it cannot be folded
    assert not mixture("ernie4_5_moe").has_identities


def test_what_a_mixture_sums_up_may_be_a_mean_or_be_normed():
    assert (mixture("cohere2_moe").multiplier, mixture("cohere2_moe").shared_multiplier) == (0.5, 0.5)
    assert mixture("axk1").submodules["norm"].name == "post_mlp_layernorm"
    assert not list(mixture("axk1").adds())


def test_narrow_experts_lie_between_two_maps(monkeypatch):
    own = {**models.OWN["nemotron_h"], "moe_latent_size": 32}
    monkeypatch.setattr(models, "OWN", {**models.OWN, "nemotron_h": own})
    model = zoo.build("nemotron_h")
    bridge = clearspan.boot(model, adapter=derive(model))
    mlp = bridge.blocks[1].mlp
    assert mlp.submodules["project_in"].widths == (64, 32)
    assert bridge.hook_dict["blocks.1.mlp.experts.hook_in"].axes == ("batch", "pos", "width")
    assert_verified(bridge, "quick")


def test_a_linear_branch_may_be_cut_off_and_moved():
    mlp = booted("minimax_m3_vl_text").blocks[0].mlp
    assert (mlp.linear_limit, mlp.linear_offset, mlp.gate_is_second) == (7.0, 1.0, False)
    assert torch.equal(mlp.branch(torch.tensor([-9.0, 2.0, 9.0])), torch.tensor([-6.0, 3.0, 8.0]))


@pytest.mark.skipif(not known(["dots3_note_text"]), reason="transformers from 5.21 on has the type")
def test_latents_may_be_multiplied_or_read_twice_and_their_rotary_part_normed():
    dots = booted("dots3_note_text").blocks[0].attn
    assert isinstance(dots, LatentAttentionBridge)
    assert dots.submodules["k_rope_norm"].name == "k_rope_only_layernorm"
    rank = dots.submodules["q_b"].widths[0]
    assert dots.query_multiplier == (64 / rank) ** 0.5  # exactly: what the model's own code computes
    joined = booted("axk2").blocks[0].attn
    assert joined.joins_query_latent
    assert joined.gate_in_queries


def test_a_gated_norm_has_the_scale_of_the_norm_in_it():
    bridge = booted("axk2")
    norm = bridge.blocks[0].ln1
    assert isinstance(norm, GatedNormBridge)
    ids = tokens(bridge.hf_model)
    _, cache = bridge.run_with_cache(ids)
    normed, gate = cache["blocks.0.ln1.norm.hook_out"], cache["blocks.0.ln1.gate.hook_out"]
    torch.testing.assert_close(cache["blocks.0.ln1.hook_normalized"] * norm.w, normed)
    torch.testing.assert_close(normed * torch.sigmoid(gate), cache["blocks.0.ln1.hook_out"])
    assert norm not in [one for one, _ in bridge.blocks[0].folds()]
    with pytest.raises(InvalidArgumentError) as error:
        cache.apply_ln_to_stack(cache["blocks.0.hook_resid_pre"][None], layer=0)
    assert str(error.value) == (
        "blocks.0.ln1 is not linear in the residual stream at a given scale\n"
        "  reason: a gate multiplies its output that is made of it\n"
        "  fix: run the model, with hooks on the stream"
    )


@pytest.mark.parametrize("model_type", ["inkling_text", "minicpm3"])
def test_some_tokens_logits_are_those_of_the_model(model_type):
    """Inkling divides the last norm's output and cuts logits off at its vocabulary; MiniCPM 3 divides alone."""
    bridge = booted(model_type)
    assert bridge.unembed.input_scale == pytest.approx(0.5)
    logits, cache = bridge.run_with_cache(tokens(bridge.hf_model))
    last = cache[f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post"]
    torch.testing.assert_close(read_out(bridge, last, [1, 5]), logits[..., [1, 5]])
    assert bridge.W_U.shape[1] == bridge.cfg.d_vocab == logits.shape[-1]


def test_rows_that_pad_a_vocabulary_give_no_logits():
    bridge = booted("inkling_text")
    assert (bridge.unembed.n_logits, bridge.embed.n_tokens) == (95, 97)
    _, cache = bridge.run_with_cache(tokens(bridge.hf_model))
    assert cache["unembed.hook_out"].shape[-1] == 95
    with pytest.raises(InexactProcessingError) as error:
        bridge.processed(center_unembed=True)
    assert "  reason: rows after the vocabulary's, which pad it, share its weight" in str(error.value).splitlines()


def test_a_sublayer_that_a_convolution_changes_has_its_ends():
    bridge = booted("inkling_text")
    assert bridge.blocks[0].outs == {"mixer": "attn_sconv", "mlp": "mlp_sconv"}
    assert (
        "blocks.0.mixer: model.layers.0.attn_sconv changes what model.layers.0.self_attn gives before it is added"
        in (bridge.adapter.source.report())
    )


@pytest.mark.parametrize("model_type", known(["inkling2_text"]))
def test_blocks_that_attend_to_residuals_of_earlier_ones_have_their_stream_alone(model_type):
    model = zoo.build(model_type)
    bridge = clearspan.boot(model, adapter=derive(model, partial=True))
    assert bridge.layer_types() == ["unknown"] * 3
    with pytest.raises(InvalidArgumentError) as error:
        bridge(torch.zeros(1, 4, 64), start_at_layer=1)
    assert str(error.value).startswith("a run cannot start at layer 1\n")


@levels
@pytest.mark.parametrize("model_type", known(["axk1", "axk2", "cohere2_moe", "dbrx", "dots3_note_text", "glm_moe_dsa"]))
def test_verify_finds_no_fault(model_type, level):
    assert_verified(booted(model_type), level)
