"""Models whose blocks are not attention and then an MLP: all that walks blocks finds what is there."""

import pytest
import torch
from tests.hybrids import HYBRIDS, hybrid

from clearspan import patching
from clearspan.analysis import (
    ablate_heads,
    ablate_layers,
    detect_heads,
    direct_logit_attribution,
    head_scores,
    singular_readings,
    strongest,
)
from clearspan.circuits import (
    Circuit,
    ComputationalGraph,
    attribution_patch,
    edge_attribution,
    evaluate_circuits,
    patch_edges,
    path_patching,
)
from clearspan.errors import AbsentPointError, InvalidArgumentError, MissingPartError, MissingWeightError
from clearspan.sweep import LogitDifference

TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
OTHER = TOKENS.clone()
OTHER[:, 4] = (OTHER[:, 4] + 7) % 90
METRIC = LogitDifference([5, 6], [7, 8])
SUMS = [name for name in HYBRIDS if name not in ("minimax", "doge")]
"""Those whose stream is the sum of what is added to it."""
WITH_HEADS = ["jamba", "falcon_h1", "nemotron_h", "granitemoehybrid"]
TYPES = {
    "mamba": ["mixer"] * 3,
    "jamba": ["mixer, mlp", "attn, mlp"] * 2,
    "falcon_h1": ["mixer+attn, mlp"] * 2,
    "nemotron_h": ["mixer", "attn", "mlp", "moe", "attn"],
    "qwen3_next": ["mixer, mlp"] * 4,
    "granitemoehybrid": ["mixer, moe+mlp", "attn, moe+mlp"] * 2,
    "longcat_flash": ["attn, moe+mlp, attn2, mlp2"] * 2,
    "minimax": ["mixer, mlp", "attn, mlp"] * 2,
    "doge": ["mixer, mlp"] * 2,
}
QUICK = ("mamba", "jamba", "falcon_h1", "nemotron_h", "longcat_flash")


def each(*names):
    """Returns parameters of which those besides one of each kind of wiring are slow tests."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


pytestmark = [
    pytest.mark.filterwarnings("ignore:the adapter does not fit"),  # LongCat's latents, which are not shown here
]


@pytest.fixture(scope="module")
def bridges():
    made = {}

    def made_once(name):
        if name not in made:
            made[name] = hybrid(name)
        return made[name]

    return made_once


@pytest.mark.parametrize("name", each(*HYBRIDS))
def test_a_hybrid_is_verified(name, bridges):
    bridge = bridges(name)
    assert bridge.layer_types() == TYPES[name]
    found = bridge.verify()
    # LongCat expands keys and values from a tensor of another layout, which its adapter here does not show.
    unknown = ("hook_v", "kv_b", "the width of", "axes of") if name == "longcat_flash" else ()
    failed = [check.what for check in found.failures if not any(part in check.what for part in unknown)]
    assert not failed
    assert len(found.checks) > 100


@pytest.mark.parametrize("name", each(*SUMS))
def test_decompositions_sum_to_the_stream_at_each_depth(name, bridges):
    bridge = bridges(name)
    _, cache = bridge.run_with_cache(TOKENS)
    depths = [(depth, False) for depth in range(bridge.cfg.n_layers + 1)]
    depths += [(depth, True) for depth, block in enumerate(bridge.blocks) if block.of_kind("mlp")]
    for depth, mlp_input in depths:
        if depth == bridge.cfg.n_layers:
            stream = cache["resid_post", depth - 1]
        else:
            block = bridge.blocks[depth]
            stream = cache[block.stream_before(block.reader(mlp_input=mlp_input).stage)]
        for tool in (cache.decompose_resid, cache.get_full_resid_decomposition):
            torch.testing.assert_close(tool(depth, mlp_input=mlp_input).sum(0), stream, rtol=1e-5, atol=1e-6)
    _, labels = cache.decompose_resid(return_labels=True)
    parts = [f"{layer}_{own.name}_out" for layer, block in enumerate(bridge.blocks) for own in block.in_order_of_adding]
    assert labels == ["embed", *parts]
    _, labels = cache.decompose_resid(mode="mixer", return_labels=True)
    assert labels == ["embed", *(part for part in parts if part.endswith("mixer_out"))]


def test_labels_say_which_sublayer(bridges):
    _, cache = bridges("longcat_flash").run_with_cache(TOKENS)
    heads, labels = cache.stack_head_results(1, return_labels=True)
    assert labels == [f"L0H{head}" for head in range(4)] + [f"L0.attn2.H{head}" for head in range(4)]
    torch.testing.assert_close(heads[4:].sum(0), cache["blocks.0.hook_attn2_out"], rtol=1e-5, atol=1e-6)
    _, labels = cache.accumulated_resid(1, incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "0_mid2", "0_mid3", "1_pre"]


@pytest.mark.parametrize("name", ["minimax", "doge"])
def test_a_stream_that_is_multiplied_is_no_sum(name, bridges):
    bridge = bridges(name)
    _, cache = bridge.run_with_cache(TOKENS)
    reason = {"minimax": "goes through norms", "doge": "is multiplied by a factor"}[name]
    with pytest.raises(InvalidArgumentError, match=reason):
        cache.decompose_resid()
    with pytest.raises(InvalidArgumentError, match="is not the sum of what its parts write"):
        ComputationalGraph.of(bridge)


def test_a_factor_may_be_a_parameter(bridges):
    bridge = bridges("doge")
    block = bridge.blocks[0]
    first, _ = (identity for identity in block.identities() if len(identity.terms) > 1)
    assert str(first) == (
        "blocks.0.hook_resid_pre * model.layers.0.input_residual + blocks.0.hook_mixer_out == blocks.0.hook_resid_mid"
    )
    _, cache = bridge.run_with_cache(TOKENS)
    added = cache["resid_pre", 0] * block.module.input_residual + cache["mixer_out", 0]
    torch.testing.assert_close(added, cache["resid_mid", 0])


# --- weights and processing ------------------------------------------------------------------------------------------


def test_weights_of_the_layers_that_have_them(bridges):
    bridge = bridges("jamba")
    with pytest.raises(MissingWeightError) as error:
        _ = bridge.W_Q
    assert str(error.value).splitlines() == [
        "W_Q cannot be stacked: layers 0, 2 do not have it",
        "  where: JambaMambaDecoderLayer",
        "  reason: layer 0 has a mixer in place of attention",
        "  fix: bridge.stacked('W_Q', [1, 3]), for the layers that have it",
    ]
    assert torch.equal(bridge.stacked("W_Q", [1, -1]), bridge.stacked("W_Q"))
    assert torch.equal(bridge.stacked("W_O")[1], bridge.blocks[3].attn.W_O)
    for wrong in ("W_E", "nonsense"):
        with pytest.raises(InvalidArgumentError, match=f"no weight '{wrong}' is of a layer"):
            bridge.stacked(wrong)
    with pytest.raises(InvalidArgumentError, match="there is no layer 9"):
        bridge.stacked("W_Q", [9])
    with pytest.raises(MissingPartError, match="no layer has 'attn'"):
        bridges("mamba").stacked("W_Q")
    with pytest.raises(MissingWeightError, match=r"layer 1|blocks\.1\.mlp has no W_out"):
        _ = bridge.blocks[1].mlp.W_out


def test_writes_into_stacked_weights_reach_the_model():
    bridge = hybrid("jamba")
    with torch.no_grad():
        bridge.stacked("W_O")[1, 2] = 0
    assert not bridge.blocks[3].attn.W_O[2].any()
    assert bridge.blocks[1].attn.W_O[2].any()


@pytest.mark.parametrize(("name", "folded", "kept"), [("jamba", 5, 4), ("falcon_h1", 3, 2), ("nemotron_h", 4, 2)])
def test_norms_are_folded_where_linear_maps_read_them(name, folded, kept, bridges):
    bridge = bridges(name)
    processed = bridge.processed()
    said = {step.name: step.done for step in processed.processing}["fold_ln"]
    assert said == f"{folded} norms folded; {kept} kept, which parts read that are not known to be linear maps"
    expected = bridge(TOKENS).log_softmax(-1)
    torch.testing.assert_close(processed(TOKENS).log_softmax(-1), expected, rtol=1e-5, atol=1e-5)
    read = [block.of_kind("attn")[0].norm for block in processed.blocks if block.of_kind("attn") and name == "jamba"]
    assert all(torch.equal(norm.w, torch.ones_like(norm.w)) for norm in read)


# --- sweeps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jamba", "falcon_h1", "nemotron_h", "longcat_flash"])
def test_sweeps_give_what_one_forward_for_each_cell_gives(name, bridges):
    bridge = bridges(name)
    _, clean = bridge.run_with_cache(TOKENS)
    points = ["resid_pre", "mlp_out", *(["moe_out"] if name in ("nemotron_h", "longcat_flash") else [])]
    points += ["mlp2_out", "resid_mid3"] if name == "longcat_flash" else ["mixer_out"]
    for point in points:
        found = patching.activation_patching(
            bridge, TOKENS, OTHER, METRIC, point, ("layer", "position"), position=[4, 8], progress=False
        )
        layers = bridge.index.layers_with(f"blocks.0.hook_{point}")
        assert found.axes["layer"] == tuple(layers)
        for place, layer in enumerate(layers):
            for column, position in enumerate((4, 8)):

                def patch(value, hook, position=position):
                    value[:, position] = clean[hook.name][:, position]

                logits = bridge.run_with_hooks(OTHER, fwd_hooks=[(f"blocks.{layer}.hook_{point}", patch)])
                at = logits[:, -1]
                expected = torch.stack([at[0, 5] - at[0, 7], at[1, 6] - at[1, 8]])
                torch.testing.assert_close(found.of()[place, column], expected, rtol=1e-4, atol=1e-5)


def test_sequences_with_mixers_run_whole(bridges):
    assert bridges("longcat_flash").whole_sequences is None
    assert bridges("mamba").whole_sequences == (
        "layers 0, 1, 2 have a mixer, whose state after the first positions is not kept"
    )
    assert bridges("nemotron_h").whole_sequences == (
        "layer 0 has a mixer, whose state after the first positions is not kept"
    )


def test_absent_layers_are_left_out_by_label_and_nan_by_index(bridges):
    bridge = bridges("jamba")
    assert ablate_heads(bridge, TOKENS, progress=False).axes["layer"] == (1, 3)
    parts = ablate_layers(bridge, TOKENS, progress=False)
    assert parts.axes == {"layer": (0, 1, 2, 3), "part": ("mixer", "mlp", "attn")}
    lacking = parts.mean().isnan()
    assert lacking.tolist() == [[False, False, True], [True, False, False]] * 2
    _, clean = bridge.run_with_cache(TOKENS)
    heads = patching.get_act_patch_attn_head_out_by_pos(bridge, OTHER, clean, METRIC)
    assert heads.shape == (4, 9, 4)
    assert heads[[0, 2]].isnan().all()
    assert not heads[[1, 3]].isnan().any()
    every = patching.get_act_patch_block_every(bridge, OTHER, clean, METRIC)
    assert every.isnan()[:, :, 0].tolist() == [[False] * 4, [True, False] * 2, [False] * 4]
    scores = head_scores(bridge, rows=2, period=4)
    assert scores.induction.isnan().all(1).tolist() == [True, False, True, False]
    assert {head.layer for head in strongest(scores.induction, 8)} == {1, 3}
    found = detect_heads(bridge, TOKENS, "previous_token").mean()
    assert found.isnan().all(1).tolist() == [True, False, True, False]


def test_ablated_parts_are_those_of_single_forwards(bridges):
    bridge = bridges("nemotron_h")
    found = ablate_layers(bridge, TOKENS, METRIC, progress=False)
    assert found.axes["part"] == ("mixer", "attn", "mlp", "moe")
    logits = bridge.run_with_hooks(TOKENS, fwd_hooks=[("blocks.3.hook_moe_out", lambda value, hook: value * 0)])[:, -1]
    expected = torch.stack([logits[0, 5] - logits[0, 7], logits[1, 6] - logits[1, 8]])
    torch.testing.assert_close(found.select(layer=3, part="moe").of(), expected, rtol=1e-4, atol=1e-5)


# --- what is not there -----------------------------------------------------------------------------------------------


def test_errors_name_the_layers_that_have_the_part(bridges):
    bridge = bridges("jamba")
    asked = [
        lambda: detect_heads(bridge, TOKENS, "previous_token", heads=[(0, 1)]),
        lambda: singular_readings(bridge, "OV", layer=0, head=0),
    ]
    for ask in asked:
        with pytest.raises(MissingPartError) as error:
            ask()
        assert str(error.value).splitlines()[:2] == ["layer 0 has no 'attn'", "  expected: a layer with it: 1, 3"]
        assert "reason: layer 0 has a mixer in place of attention" in str(error.value)
    with pytest.raises(AbsentPointError) as error:
        bridge.run_with_cache(TOKENS, "blocks.2.attn.hook_pattern")
    assert str(error.value).splitlines()[1] == "  expected: a layer that has it: 1, 3"
    assert bridge.why_absent("blocks.2.hook_attn_out") == "layer 2 has a mixer in place of attention"
    with pytest.raises(InvalidArgumentError) as error:
        ComputationalGraph.of(bridge).node("L2H1")
    assert "expected: a head of layer 1, 3" in str(error.value)
    assert "reason: layer 2 has no attention" in str(error.value)
    with pytest.raises(MissingPartError, match="no layer has 'attn'"):
        head_scores(bridges("mamba"))
    _, cache = bridges("nemotron_h").run_with_cache(TOKENS)
    with pytest.raises(MissingPartError) as error:
        cache.decompose_resid(1, mlp_input=True)
    assert str(error.value).splitlines()[:2] == ["layer 1 has no 'mlp'", "  expected: a layer with it: 2"]


def test_points_say_in_which_layers_they_are(bridges):
    found = bridges("nemotron_h").points().layers()
    assert found["blocks.{l}.attn.hook_q"] == [1, 4]
    assert found["blocks.{l}.hook_mixer_out"] == [0]
    assert found["blocks.{l}.hook_moe_out"] == [3]
    assert found["blocks.{l}.hook_resid_post"] == [0, 1, 2, 3, 4]
    assert "blocks.{l}.hook_resid_mid" not in found
    why = bridges("nemotron_h").why_absent
    assert why("blocks.0.hook_resid_mid") == "mixer is all that the block has: no residual stream lies inside it"
    assert why("blocks.3.mlp.hook_post") == "layer 3 has moe, and no mlp"
    assert why("blocks.2.attn.hook_z") == "layer 2 has an MLP alone, and no attn"
    assert why("blocks.2.hook_mixer_in") == "layer 2 has an MLP alone, and no mixer"


# --- attribution and circuits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", each(*WITH_HEADS))
@pytest.mark.parametrize("unit", ["component", "layer", "head"])
def test_attributions_sum_to_the_logit(name, unit, bridges):
    found = direct_logit_attribution(bridges(name), TOKENS, 5, unit=unit)
    assert found.gap.abs().max() < 1e-5
    if unit == "head":
        assert found.by_head.shape == (len(bridges(name).attentions), 4)


@pytest.mark.parametrize("name", each("jamba", "falcon_h1", "mamba", "granitemoehybrid"))
def test_an_edge_is_where_the_receiver_sees_the_sender(name, bridges):
    """What a sender adds is changed, and the streams that receivers read are looked at."""
    bridge = bridges(name)
    graph = ComputationalGraph.of(bridge)
    streams = [graph.stream_of(receiver) for receiver in graph.receivers]
    with torch.no_grad():
        _, before = bridge.run_with_cache(TOKENS, list(dict.fromkeys(streams)))
        for place, sender in enumerate(graph.senders[1:], start=1):
            point = f"blocks.{sender.layer}.hook_{sender.sublayer}_out"
            with bridge.hooks([(point, lambda value, hook: value + 1)]):
                _, after = bridge.run_with_cache(TOKENS, list(dict.fromkeys(streams)))
            seen = torch.tensor([not torch.equal(before[stream], after[stream]) for stream in streams])
            assert torch.equal(graph.mask[place], seen), sender


@pytest.mark.parametrize("name", each("jamba", "falcon_h1", "mamba", "granitemoehybrid"))
def test_circuits_of_all_and_of_no_edges_are_both_runs(name, bridges):
    bridge = bridges(name)
    graph = ComputationalGraph.of(bridge)
    every, none = Circuit(graph, frozenset(graph.edges())), Circuit(graph, frozenset())
    found = evaluate_circuits(bridge, TOKENS, OTHER, METRIC, {"every": every, "none": none})
    assert found.faithfulness.tolist() == pytest.approx([1, 0], abs=1e-4)
    assert Circuit.from_json(every.to_json()) == every
    assert every.plot() is not None


@pytest.mark.parametrize("name", ["jamba", "falcon_h1"])
def test_an_edge_out_of_a_mixer_is_patched_exactly(name, bridges):
    bridge = bridges(name)
    _, clean = bridge.run_with_cache(TOKENS)
    _, other = bridge.run_with_cache(OTHER)
    found = patch_edges(bridge, TOKENS, OTHER, METRIC, ["L0.mixer->L1.mlp", "L0.mixer->logits"], progress=False)
    change = clean["mixer_out", 0] - other["mixer_out", 0]
    last = f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post"
    for edge, point in (("L0.mixer->L1.mlp", "blocks.1.hook_mlp_in"), ("L0.mixer->logits", last)):
        at = bridge.run_with_hooks(OTHER, fwd_hooks=[(point, lambda value, hook: value + change)])[:, -1]
        expected = torch.stack([at[0, 5] - at[0, 7], at[1, 6] - at[1, 8]])
        torch.testing.assert_close(found.select(edge=edge).of(), expected, rtol=1e-4, atol=1e-5)


def test_paths_through_mlps_freeze_mixers():
    bridge = hybrid("jamba")
    with torch.no_grad():
        for name, parameter in bridge.hf_model.named_parameters():
            if parameter.ndim == 2 and "mamba" in name:
                parameter *= 10  # so that what goes through a mixer is far from rounding
    _, clean = bridge.run_with_cache(TOKENS)
    _, base = bridge.run_with_cache(OTHER)
    found = path_patching(bridge, TOKENS, OTHER, METRIC, ["L0.mixer"], ["logits"], freeze="attention", progress=False)

    def measured(*names):
        hooks = [(name, lambda value, hook: base[hook.name]) for name in names]
        first = ("blocks.0.hook_mixer_out", lambda value, hook: clean[hook.name])
        at = bridge.run_with_hooks(OTHER, fwd_hooks=[first, *hooks])[:, -1]
        return torch.stack([at[0, 5] - at[0, 7], at[1, 6] - at[1, 8]])

    attentions = ("blocks.1.hook_attn_out", "blocks.3.hook_attn_out")
    expected, without = measured(*attentions, "blocks.2.hook_mixer_out"), measured(*attentions)
    torch.testing.assert_close(found.of().flatten(0, 1)[0], expected, rtol=1e-4, atol=1e-5)
    assert (expected - without).abs().max() > 1e-3


@pytest.mark.parametrize("name", each("falcon_h1", "granitemoehybrid", "mamba"))
def test_edge_scores_are_gradients_times_changes(name, bridges):
    """For a mixer's edge into the last stream, that is its change times the gradient there."""
    bridge = bridges(name)
    found = edge_attribution(bridge, TOKENS, OTHER, METRIC)
    last = f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post"
    _, clean = bridge.run_with_cache(TOKENS)
    _, base = bridge.run_with_cache(OTHER, [last, "blocks.0.hook_mixer_out"])
    stream = base[last].clone().requires_grad_()
    at = bridge(stream, start_at_layer=bridge.cfg.n_layers)[:, -1]
    (gradient,) = torch.autograd.grad(at[0, 5] - at[0, 7] + at[1, 6] - at[1, 8], stream)
    expected = ((clean["mixer_out", 0] - base["mixer_out", 0]) * gradient).sum((1, 2)).mean()
    assert found.score("L0.mixer->logits") == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


def test_attribution_takes_mixers_as_units(bridges):
    bridge = bridges("jamba")
    found = attribution_patch(bridge, TOKENS, OTHER, METRIC, "mixer_out", grad_drop=True)
    assert found.axes["layer"] == (0, 2)
    exact = attribution_patch(bridge, TOKENS, OTHER, METRIC, "mixer_out").compared_with_exact(4)
    assert exact.agreement is not None
