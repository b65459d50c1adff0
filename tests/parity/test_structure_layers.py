"""Blocks that read more than the stream, or are unlike each other: Gemma 4 and its kin."""

import pytest
import torch
from tests.structures import assert_verified
from torch import nn

import clearspan
from clearspan import zoo
from clearspan.components import MLPBesideMixtureBridge, PerLayerInputBridge, SharedKeysAttentionBridge
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Intervention, Zero
from clearspan.structure import adapter_of, derive, source
from clearspan.sweep import LogitDifference, Sweep, grid

TOKENS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore::clearspan.errors.DerivedWarning")


def booted(model_type):
    model = zoo.build(model_type)
    return clearspan.boot(model, adapter=derive(model))


@pytest.fixture(scope="module")
def own_inputs():
    """Inputs of each layer, keys shared by layers, heads and MLPs of two widths."""
    return booted("gemma4_text")


@pytest.fixture(scope="module")
def keys_as_values():
    """Values that are keys through another norm, and keys shared by layers."""
    return booted("gemma4_unified_text")


@pytest.fixture(scope="module")
def beside():
    """A dense MLP beside a mixture."""
    return booted("gemma4")


def changed(bridge, name, *seen):
    """Returns which of some points change when one is written."""
    _, before = bridge.run_with_cache(TOKENS, list(seen))
    hooks = [(name, lambda value, hook: value + torch.linspace(-1, 1, value.shape[-1]))]
    _, after = bridge.run_with_cache(TOKENS, list(seen), fwd_hooks=hooks)
    return [one for one in seen if not torch.allclose(before[one], after[one], rtol=1e-4, atol=1e-6)]


# --- what is derived -------------------------------------------------------------------------------------------------


def test_a_layers_own_input_is_a_stage(own_inputs):
    block = own_inputs.blocks[2]
    assert block.stages == (("attn",), ("mlp",), ("ple",))
    assert block.residual_multiplier == {"attn": 1.0, "mlp": 1.0, "ple": "layer_scalar"}
    assert block.stream_multiplier == [1.0, 1.0, "layer_scalar"]
    assert isinstance(block.ple, PerLayerInputBridge)
    assert block.ple.W_gate.shape == (64, 16)


def test_layers_differ_in_width(own_inputs):
    shapes = [tuple(own_inputs.hook_dict[f"blocks.{layer}.attn.hook_rot_k"].sizes.values()) for layer in range(4)]
    assert [shape[-1] for shape in shapes] == [24, 32, 24, 32]
    assert [own_inputs.blocks[layer].mlp.W_out.shape[0] for layer in range(4)] == [80, 80, 160, 160]
    assert own_inputs.hook_dict["blocks.1.attn.v_norm.hook_out"].sizes["d_head"] == 32


def test_layers_say_whose_keys_they_use(own_inputs):
    attentions = [block.attn for block in own_inputs.blocks]
    assert [one.source for one in attentions if isinstance(one, SharedKeysAttentionBridge)] == [0, 1]
    reason = "it attends to keys and values of layer 0: blocks.0.attn.hook_k; hook_rot_k has them as multiplied"
    assert own_inputs.why_absent("blocks.2.attn.hook_k") == reason


def test_a_mixture_beside_a_dense_mlp_is_told_apart(beside):
    mlp = beside.blocks[0].mlp
    assert isinstance(mlp, MLPBesideMixtureBridge)
    assert (mlp.shared.name, mlp.router.name, mlp.experts.name) == ("mlp", "router", "experts")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_inputs", "keys_as_values", "beside"])
def test_verify_finds_no_fault(name, request):
    assert_verified(request.getfixturevalue(name), "full")


def test_a_number_that_is_one_is_found_to_multiply_the_stream():
    model = zoo.build("gemma4_unified_text")
    for layer in model.model.layers:
        layer.layer_scalar.fill_(1)
    assert derive(model).parts["blocks"].templates[0].stream_multiplier == [1.0, "layer_scalar"]
    assert all(float(layer.layer_scalar) == 1 for layer in model.model.layers)


def test_norms_without_weights_are_told_apart():
    model = zoo.build("gemma4_unified_text")
    nn.init.ones_(model.model.layers[1].self_attn.k_norm.weight)
    parts = derive(model).parts["blocks"].templates[1].submodules["attn"].submodules
    assert (parts["k_norm"].name, parts["v_norm"].name, "v" in parts) == ("k_norm", "v_norm", False)


def test_half_precision_rounds_a_large_stream_and_is_taken_apart():
    model = zoo.build("gemma4_text")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(4)  # the stream is then much larger than what blocks add
    blocks = derive(model.bfloat16()).parts["blocks"].templates
    assert {block.stages for block in blocks} == {(("attn",), ("mlp",), ("ple",))}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4"])
def test_an_adapter_is_written(model_type):
    model = zoo.build(model_type)
    structure = derive(model)
    adapter = adapter_of(source(structure, model))
    assert_verified(clearspan.boot(model, adapter=adapter), "quick")


# --- what a write reaches --------------------------------------------------------------------------------------------


def test_a_layers_own_input_multiplies_the_gate(own_inputs):
    path = "blocks.1.ple"
    _, cache = own_inputs.run_with_cache(TOKENS)
    pre, linear, post = (cache[f"{path}.{name}"] for name in ("hook_pre", "hook_pre_linear", "hook_post"))
    act = own_inputs.blocks[1].ple.act.module
    torch.testing.assert_close(act(pre) * linear, post)
    seen = (f"{path}.hook_pre", f"{path}.hook_post", "blocks.2.ple.hook_pre_linear", "hook_logits")
    assert changed(own_inputs, f"{path}.hook_pre_linear", *seen) == [f"{path}.hook_post", "hook_logits"]


def test_a_write_of_values_reaches_the_layers_that_use_them(own_inputs):
    seen = ("blocks.2.attn.hook_v", "blocks.2.attn.hook_pattern", "blocks.2.attn.hook_rot_k", "blocks.3.attn.hook_v")
    assert "blocks.2.attn.hook_v" in changed(own_inputs, "blocks.0.attn.hook_v", *seen)
    assert changed(own_inputs, "blocks.2.attn.hook_v", "blocks.2.attn.hook_z", *seen[1:3]) == ["blocks.2.attn.hook_z"]


def test_keys_and_values_of_one_map_are_written_apart(keys_as_values):
    path = "blocks.1.attn"
    seen = (f"{path}.hook_rot_k", f"{path}.hook_v", f"{path}.hook_attn_scores")
    assert changed(keys_as_values, f"{path}.hook_k", *seen) == [seen[0], seen[2]]
    assert changed(keys_as_values, f"{path}.hook_v", *seen) == [f"{path}.hook_v"]


def test_what_the_mlps_read_is_written_at_once(beside):
    path = "blocks.0.mlp"
    seen = (
        f"{path}.hook_router_logits",
        f"{path}.shared.hook_pre",
        f"{path}.experts.hook_in",
        "blocks.0.hook_resid_mid",
    )
    assert changed(beside, "blocks.0.hook_mlp_in", *seen) == list(seen[:3])


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_generation_under_hooks_shows_all_positions(own_inputs):
    seen = []
    hooks = [("blocks.3.attn.hook_z", lambda value, hook: seen.append((int(hook.position), value.shape[1])))]
    made = own_inputs.generate(TOKENS, max_new_tokens=2, do_sample=False, fwd_hooks=hooks)
    assert seen == [(0, 9), (9, 1)]
    bare = own_inputs.hf_model.generate(TOKENS, max_new_tokens=2, do_sample=False)
    assert torch.equal(made, bare)
    _, cache = own_inputs.run_with_cache(TOKENS, logits_to_keep=1)
    assert cache["blocks.3.hook_resid_post"].shape[1] == 9


def test_a_run_starts_where_it_has_the_keys(keys_as_values):
    stream = torch.randn(1, 5, 64)
    with pytest.raises(InvalidArgumentError) as error:
        keys_as_values(stream, start_at_layer=2)
    assert str(error.value).splitlines() == [
        "a run cannot start at layer 2",
        "  reason: layer 2 uses what layer 0 found, such as its keys, which is not run",
        "  fix: start_at_layer=0, or a run of the whole model",
    ]
    assert keys_as_values(stream, start_at_layer=0).shape == (1, 5, 97)


def test_a_run_of_blocks_with_inputs_of_their_own_needs_the_tokens(own_inputs):
    with pytest.raises(InvalidArgumentError) as error:
        own_inputs(torch.randn(1, 5, 64), start_at_layer=0)
    assert str(error.value).splitlines() == [
        "a run that starts at layer 0 needs the tokens",
        "  got: the residual stream alone",
        "  reason: blocks have inputs of their own besides the stream, which the model makes of the tokens",
        "  fix: bridge.run_with_hooks(tokens, ...) with a hook on hook_resid_pre that writes the stream",
    ]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (lambda block: block.attn, "blocks.2.attn attends to keys and values of layer 0"),
        (lambda block: block.ple, "it multiplies by blocks.2.ple.hook_pre_linear, which the model makes of the tokens"),
    ],
)
def test_what_needs_more_than_its_input_does_not_run_alone(own_inputs, part, reason):
    with pytest.raises(InvalidArgumentError, match="cannot run alone") as error:
        part(own_inputs.blocks[2])(torch.randn(1, 5, 64))
    assert f"  reason: {reason}" in str(error.value).splitlines()
    assert own_inputs.blocks[2].mlp(torch.randn(1, 5, 64)).shape == (1, 5, 64)


def test_sweeps_run_from_where_the_keys_are(own_inputs, keys_as_values):
    for bridge in (own_inputs, keys_as_values):
        cells = grid("resid_pre", Zero(), layer=range(4), position=[3, 7])
        sweep = Sweep(bridge, TOKENS, cells, LogitDifference(1, 2))
        sweep.run(progress=False)
        assert sweep.check(cells=8) < 1e-4


def test_a_sweep_that_changes_embeddings_which_blocks_read_otherwise_runs_whole_forwards(own_inputs):
    cells = {"embed": Intervention("hook_embed", Zero()), "a position": Intervention("hook_embed", Zero(), positions=3)}
    sweep = Sweep(own_inputs, TOKENS, cells, LogitDifference(1, 2))
    assert "whole forwards, since blocks have inputs of their own that the model makes of the embeddings" in str(
        sweep.plan()
    )
    sweep.run(progress=False)
    assert sweep.check(cells=2) < 1e-4
