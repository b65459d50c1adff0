"""What is derived of models that are like no other: the part that makes them so. make zoo verifies them all."""

import pytest
import torch
from tests.releases import known

import clearspan
from clearspan import zoo
from clearspan.components import OpaqueBridge
from clearspan.conversions import SlicedQKVConversionRule
from clearspan.errors import InexactProcessingError, InvalidArgumentError
from clearspan.structure import derive


def sliced(parts, block):
    rule = block.submodules["attn"].qkv_conversion_rule
    return isinstance(rule, SlicedQKVConversionRule) and (rule.slices, rule.order) == (4, ("q", "v", "k"))


def positions_inline(parts, block):
    table = parts["pos_embed"]
    return table.name is None and table.ends_in_embed and set(block.submodules["attn"].same_inputs) == {"k", "q"}


def maps_embeddings_together(parts, block):
    return "project_in" in parts and parts["embed"].ends_at == parts["embed_norm"].name


def norms_inside_attention(parts, block):
    return block.submodules["attn"].norms_input and block.submodules["ln1"].name == "attention.ln"


def scales_queries(parts, block):
    attn, mlp = block.submodules["attn"], block.submodules["mlp"]
    return attn.scales_queries and not attn.has_rotary and mlp.runs_all


def multiplied_by_parameters(parts, block):
    return block.stream_multiplier == ["input_residual", "post_attention_residual"] and (
        block.submodules["attn"].bounds_values
    )


def shortcut(parts, block):
    stages = (("attn",), ("mlp", "mlp2"), ("attn2",), ("mlp3",))
    found = block.stages == stages and block.added_with == {"mlp": "mlp3"}
    return found and block.submodules["attn2"].latent_multiplier == pytest.approx(2)


def shares_activation(parts, block):
    return block.norms_the_sum and [*block.submodules] == ["attn", "ln1", "mlp", "ln2"]


def multiplies_experts(parts, block):
    return block.submodules["mlp"].multiplier == pytest.approx(2.5)


def unknown_attention(parts, block):
    return isinstance(block.submodules["mixer"], OpaqueBridge)


def unknown_mlp(parts, block):
    return isinstance(block.submodules["mlp"], OpaqueBridge)


def feeds_the_mixer(parts, block):
    attn, norm = block.submodules["attn"], block.submodules["attn_norm"]
    fed = block.fed_by == {"mixer": ["attn", "mlp", "feed"]} and block.stages == (("mixer",),)
    return fed and block.reads_tokens and attn.d_input == 128 and norm.axes == "batch pos width"


KINDS = {
    "codegen": sliced,
    "ctrl": positions_inline,
    "roc_bert": maps_embeddings_together,
    "megatron-bert": norms_inside_attention,
    "llama4_text": scales_queries,
    "doge": multiplied_by_parameters,
    "longcat_flash": shortcut,
    "openai-gpt": shares_activation,
    "beam": multiplies_experts,
    "diffllama": unknown_attention,
    "falcon_h1": unknown_mlp,
    "zamba": feeds_the_mixer,
    "zamba2": feeds_the_mixer,
}


@pytest.mark.parametrize("model_type", known(KINDS))
def test_what_makes_a_model_unlike_others_is_derived(model_type):
    parts = derive(zoo.build(model_type)).parts
    assert KINDS[model_type](parts, parts["blocks"].templates[-1])


def test_values_that_a_mask_is_made_of_keep_their_basis():
    model = zoo.build("doge")
    bridge = clearspan.boot(model, adapter=derive(model))
    with pytest.raises(InexactProcessingError) as error:
        bridge.processed(refactor_factored_attn_matrices=True)
    reason = "values are bounded, or a mask is made of them, so that another basis changes it"
    assert f"  reason: {reason}" in str(error.value).splitlines()


def test_a_table_of_one_type_has_no_types():
    model = zoo.build("xlm-roberta-xl")
    bridge = clearspan.boot(model, adapter=derive(model))
    assert bridge.why_absent("type_embed.hook_in") == "there is one type of tokens, so that types tell nothing"
    assert "type_embed.hook_out" in bridge.hook_dict


def test_the_report_says_why_heads_are_not_shown():
    report = derive(zoo.build("diffllama")).report()
    assert (
        "blocks.0.mixer: heads of model.layers.0.self_attn are not shown: what the heads of model.layers.0.self_attn "
        "found reaches no linear map as it is, gated, or normed"
    ) in report
    report = derive(zoo.build("falcon_h1")).report()
    assert "blocks.0.mlp: only the ends of model.layers.0.feed_forward are known: " in report


def test_what_feeds_a_mixer_is_read_and_written_and_adds_nothing_to_the_stream():
    model = zoo.build("zamba")
    bridge = clearspan.boot(model, adapter=derive(model))
    assert bridge.layer_types() == ["mixer", "attn > mlp > mixer", "mixer", "attn > mlp > mixer"]
    tokens = torch.arange(14).view(2, 7)
    _, cache = bridge.run_with_cache(tokens)
    fed = cache["blocks.1.hook_resid_pre"] + cache["blocks.1.feed.hook_out"]
    assert torch.equal(fed, cache["blocks.1.hook_mixer_in"])
    total = cache["blocks.1.hook_resid_pre"] + cache["blocks.1.hook_mixer_out"]
    assert torch.equal(total, cache["blocks.1.hook_resid_post"])
    assert cache["pattern", 1].shape == (2, 4, 7, 7)
    assert bridge.why_absent("blocks.1.hook_attn_out") == (
        "attn adds nothing to the residual stream: what it gives becomes a part of what mixer reads"
    )
    with pytest.raises(InvalidArgumentError, match="it reads the embeddings of the tokens beside the stream"):
        bridge.blocks[1](cache["blocks.1.hook_resid_pre"])
    with pytest.raises(InvalidArgumentError, match="needs the tokens"):
        bridge(cache["blocks.1.hook_resid_pre"], start_at_layer=1)
    with pytest.raises(InvalidArgumentError, match="they feed another part"):
        clearspan.circuits.ComputationalGraph.of(bridge)
