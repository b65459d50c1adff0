"""What mixes positions is no MLP, whatever its maps look like."""

import pytest
import torch
from tests.structures import assert_verified, tiny

import clearspan
from clearspan import zoo
from clearspan.components import AttentionBridge, OpaqueBridge
from clearspan.structure import derive
from clearspan.zoo.pins import counted_from_the_left

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "is_decoder": True,
    "attention_probs_dropout_prob": 0.0,
}
ATTENTION = "roformer.encoder.layer.0.attention"
PADDING = "padding: row of 9 tokens padded on the left to 12"


def turned_everywhere():
    """Returns a model that rotates queries and keys at the first position too: no channel is a map's as it is."""
    model = tiny("RoFormer", **SIZES)
    with torch.no_grad():
        model.roformer.encoder.embed_positions.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model


UNKNOWN = {
    "heads from no map": (
        turned_everywhere,
        f"{64 // 2} of 32 channels of queries come from no linear map as they are",
    ),
    "rotated values": (
        lambda: tiny("RoFormer", **SIZES, rotary_value=True),
        f"positions change the values of {ATTENTION}.self",
    ),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_attention_that_is_not_understood_is_no_mlp(kind):
    build, reason = UNKNOWN[kind]
    structure = derive(build())
    block = structure.parts["blocks"].templates[0]
    assert block.stages == (("mixer",), ("mlp",))
    assert isinstance(block.submodules["mixer"], OpaqueBridge)
    said = structure.report().splitlines()
    assert f"blocks.0.mixer: heads of {ATTENTION}.self are not shown: {reason}" in said
    assert f"blocks.0.mixer: positions mix in {ATTENTION}, of which only the ends are known" in said


def test_only_the_ends_of_such_an_attention_are_points():
    model = tiny("RoFormer", **SIZES, rotary_value=True)
    bridge = clearspan.boot(model, adapter=derive(model))
    found = assert_verified(bridge, "quick", but=[PADDING])  # its table counts from the left end of the padded row
    assert {"hook_mixer_in", "hook_mixer_out"} <= {name.rpartition(".")[2] for name in bridge.hook_dict}
    assert not any(name.startswith("blocks.0.attn") for name in bridge.hook_dict)
    assert found.checks


def test_sines_turn_queries_and_keys():
    model = zoo.build("roformer")
    attn = derive(model).parts["blocks"].templates[0].submodules["attn"]
    assert isinstance(attn, AttentionBridge)
    assert (attn.has_rotary, attn.core) == (True, "self")
    assert counted_from_the_left(model) > 0.5
    assert zoo.check("roformer", "quick").outcome == "pinned"


@pytest.mark.parametrize("model_type", ["moss_transcribe_diarize", "whisper"])
def test_positions_are_handed_on_to_the_decoder(model_type):
    structure = derive(zoo.build(model_type))
    assert not structure.numbers_positions
