"""Blocks as stages of sublayers: what a template may say, and what a live block knows of its sublayers."""

import pytest
from tests.hybrids import hybrid
from tests.zoo import build

import clearspan
from clearspan.components import (
    BlockBridge,
    GatedMLPBridge,
    NormalizationBridge,
    OpaqueBridge,
    PerLayer,
    check_parts,
    part_kind,
)
from clearspan.components.sublayer import required_kind
from clearspan.errors import AdapterError, MissingPartError


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({"stages": ()}, ["no block has the stages ()"]),
        ({"stages": (("attn",), ())}, ["no block has the stages (('attn',), ())"]),
        ({"stages": (("attn",), ("attn",))}, ["no block has the stages (('attn',), ('attn',))"]),
        ({"outs": {"mixer": "out"}}, ["the block has no sublayer mixer", "  expected: attn, mlp"]),
        ({"stages": (("mixer",),), "mlp_out": "out"}, ["the block has no sublayer mlp", "  expected: mixer"]),
        ({"added_with": {"mlp": "mlp2"}}, ["the block has no sublayer mlp2", "  expected: attn, mlp"]),
        ({"residual_multiplier": {"moe": 2.0}}, ["the block has no sublayer moe", "  expected: attn, mlp"]),
    ],
)
def test_a_template_is_checked(settings, lines):
    with pytest.raises(AdapterError) as error:
        BlockBridge(name="layers", **settings)
    assert str(error.value).splitlines()[: len(lines)] == lines
    assert str(error.value).splitlines()[-1] == '  fix: BlockBridge(stages=(("attn",), ("mlp",)), ...)'


@pytest.mark.parametrize(
    ("settings", "stages", "is_parallel", "layer_type"),
    [
        ({}, (("attn",), ("mlp",)), False, "attn, mlp"),
        ({"is_parallel": True}, (("attn", "mlp"),), True, "attn+mlp"),
        ({"stages": (("mixer",),)}, (("mixer",),), False, "mixer"),
        ({"stages": (("attn", "mixer"), ("mlp",))}, (("attn", "mixer"), ("mlp",)), False, "attn+mixer, mlp"),
    ],
)
def test_parallel_is_a_reading_of_stages(settings, stages, is_parallel, layer_type):
    block = BlockBridge(name="layers", **settings)
    assert (block.stages, block.is_parallel, block.layer_type) == (stages, is_parallel, layer_type)


def test_names_say_what_a_sublayer_is():
    assert [part_kind(name) for name in ("attn", "attn2", "self_attn", "mlp", "mlp2", "moe", "mixer", "mixer2")] == [
        *("attn", "attn", "attn", "mlp", "mlp", "mlp", "mixer", "mixer")
    ]
    assert required_kind("mlp", GatedMLPBridge()).__name__ == "MLPBridge"
    assert required_kind("moe", OpaqueBridge()) is OpaqueBridge
    assert required_kind("attn2", OpaqueBridge()).__name__ == "GeneralAttentionBridge"


def test_blocks_may_differ_from_layer_to_layer():
    mixed, blocks = {"blocks": PerLayer([BlockBridge(), NormalizationBridge()])}, {"blocks": BlockBridge}
    with pytest.raises(AdapterError, match="blocks is of another kind"):
        check_parts("", mixed, blocks)
    check_parts("", {"blocks": PerLayer([BlockBridge(), BlockBridge()])}, blocks)


def test_norms_are_numbered_by_stage_or_by_sublayer():
    falcon = hybrid("falcon_h1").blocks[0]
    assert [(own.name, own.stage, own.norm.path.rpartition(".")[2], own.shares_norm) for own in falcon.sublayers] == [
        ("mixer", 0, "ln1", True),
        ("attn", 0, "ln1", True),
        ("mlp", 1, "ln2", False),
    ]
    neox = clearspan.boot(build("gpt_neox")).blocks[0]
    assert [(own.stage, own.norm.path.rpartition(".")[2], own.shares_norm) for own in neox.sublayers] == [
        (0, "ln1", False),
        (0, "ln2", False),
    ]
    longcat = hybrid("longcat_flash").blocks[0]
    assert [(own.name, own.norm.path[-3:], own.stage, own.adds_at) for own in longcat.sublayers] == [
        ("attn", "ln1", 0, 0),
        ("moe", "ln2", 1, 3),
        ("mlp", "ln2", 1, 1),
        ("attn2", "ln3", 2, 2),
        ("mlp2", "ln4", 3, 3),
    ]
    assert [own.name for own in longcat.in_order_of_adding] == ["attn", "mlp", "attn2", "moe", "mlp2"]


@pytest.mark.filterwarnings("ignore:the adapter does not fit")
def test_points_of_further_sublayers():
    bridge = hybrid("longcat_flash")
    names = {"hook_attn2_out", "hook_q2_input", "hook_mlp2_in", "hook_moe_in", "hook_resid_mid2", "hook_resid_mid3"}
    assert {f"blocks.1.{name}" for name in names} <= bridge.hook_dict.keys()
    row = next(iter(bridge.points(["blocks.0.hook_mlp2_out"])))
    assert row.value == "what the MLP adds to the residual stream, after any norm, gate or multiplier"
    assert clearspan.get_act_name("mlp2_out", 1) == "blocks.1.hook_mlp2_out"
    assert clearspan.get_act_name("resid_mid2", 1) == "blocks.1.hook_resid_mid2"


def test_a_part_that_a_layer_lacks_is_said():
    bridge = hybrid("jamba")
    for look in (lambda block: block.attn, lambda block: block.sublayer("attn")):
        with pytest.raises(MissingPartError) as error:
            look(bridge.blocks[0])
        lines = str(error.value).splitlines()
        assert lines[0] == "blocks.0 has no attn"
        assert lines[2:] == [
            "  reason: layer 0 has a mixer in place of attention",
            "  fix: bridge.layer_types() lists what each layer has",
        ]
    assert not hasattr(bridge.blocks[0], "attn")
    with pytest.raises(AttributeError, match="'BlockBridge' object has no attribute 'nonsense'"):
        _ = bridge.blocks[0].nonsense
    assert bridge.blocks[1].sublayer("attn").part is bridge.blocks[1].attn


def test_a_write_reaches_one_of_the_sublayers_that_share_a_norm():
    """Falcon-H1's mixer and attention read one norm's output: each has an input of its own."""
    bridge, tokens = hybrid("falcon_h1"), [[5, 6, 7, 8]]
    _, plain = bridge.run_with_cache(tokens)
    _, edited = bridge.run_with_cache(
        tokens, fwd_hooks=[("blocks.0.hook_mixer_in", lambda value, hook: value + 1)], names_filter=None
    )
    assert (edited["attn_out", 0] == plain["attn_out", 0]).all()
    assert (edited["mixer_out", 0] != plain["mixer_out", 0]).any()
    _, edited = bridge.run_with_cache(
        tokens, fwd_hooks=[("blocks.0.hook_v_input", lambda value, hook: value + 1)], names_filter=None
    )
    assert (edited["attn_out", 0] != plain["attn_out", 0]).any()
    assert (edited["mixer_out", 0] == plain["mixer_out", 0]).all()


def test_a_generation_counts_positions_where_no_layer_has_keys():
    bridge, seen = hybrid("mamba"), []
    with bridge.hooks([("blocks.0.hook_mixer_out", lambda value, hook: seen.append((hook.position, value.shape[1])))]):
        bridge.generate([[5, 6, 7, 8]], max_new_tokens=3, do_sample=False)
    assert seen == [(0, 4), (4, 1), (5, 1)]
