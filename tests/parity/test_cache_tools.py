"""The cache's tools on every architecture: what they take apart sums to what the model computed, on raw weights."""

import functools
from typing import NamedTuple

import pytest
import torch
from tests.zoo import MODELS, build
from torch import Tensor

import clearspan
from clearspan import ActivationCache, TransformerBridge
from clearspan.components import MLPBridge
from clearspan.errors import InvalidArgumentError, MissingWeightError

EXACT = 1e-5
"""Relative to the largest value; measured at most 3e-6."""
NO_SUM = ("opt post-norm", "bloom normed residual")
"""Variants whose residual stream is no sum of what was added to it."""
MORE = {
    "opt without a final norm": ("opt", {"_remove_final_layer_norm": True}),
    "gemma2 without a cap": ("gemma2", {"final_logit_softcapping": None}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "granite biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "gemma2 biases": ("gemma2", {"attention_bias": True}),
}
EVERY = [*MODELS, *MORE]


class Run(NamedTuple):
    """A run that no test may leave changed."""

    bridge: TransformerBridge
    tokens: Tensor
    logits: Tensor
    cache: ActivationCache


@functools.cache
def made(variant: str, processed: bool = False) -> Run:
    name, changes = MORE.get(variant, (variant, {}))
    bridge = clearspan.boot(build(name, **changes))
    if processed:
        bridge = bridge.processed(fold_value_biases=None)
    tokens = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Run(bridge, tokens, *bridge.run_with_cache(tokens))


@pytest.fixture(params=EVERY)
def run(request):
    return made(request.param)


@pytest.fixture(params=[variant for variant in EVERY if variant not in NO_SUM])
def summed(request):
    return made(request.param)


def assert_near(found: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def before_cap(run: Run) -> Tensor:
    cap = run.bridge.cfg.output_logits_soft_cap
    return run.logits if cap is None else cap * torch.atanh(run.logits.double() / cap).float()


def stream(run: Run, layer: int, mlp_input: bool) -> Tensor:
    if layer == run.bridge.cfg.n_layers:
        return run.cache[f"blocks.{layer - 1}.hook_resid_post"]
    is_mid = mlp_input and not run.bridge.blocks[layer].is_parallel
    return run.cache[f"blocks.{layer}.hook_resid_{'mid' if is_mid else 'pre'}"]


def assert_are_parts(found: Tensor, parts: Tensor, bias: Tensor | None, added: Tensor) -> None:
    """Checks what parts of a sublayer's output are in the stream, by what their sum became there.

    On the way are at most an RMS norm and a multiplier, which multiply each number by the same in every part.
    """
    whole = parts.sum(0) if bias is None else parts.sum(0) + bias
    is_sound = whole.abs() > whole.abs().mean() / 2  # the quotient of small numbers tells little
    assert_near(found[:, is_sound], (parts * (added / whole))[:, is_sound])


@torch.no_grad()
def test_decompositions_sum_to_the_residual_stream(summed):
    cache = summed.cache
    for layer, mlp_input in ((0, False), (0, True), (1, True), (2, False), (3, False), (-1, True), (None, False)):
        expected = stream(summed, 3 if layer in (-1, None) else layer, mlp_input)
        assert_near(cache.decompose_resid(layer, mlp_input).sum(0), expected)
        for expands in (True, False):
            parts, labels = cache.get_full_resid_decomposition(layer, mlp_input, expands, return_labels=True)
            assert_near(parts.sum(0), expected)
            assert len(labels) == len(set(labels)) == len(parts)


@torch.no_grad()
def test_components_are_the_points_that_they_are_named_after(summed):
    bridge, cache = summed.bridge, summed.cache
    parts, labels = cache.decompose_resid(1, mlp_input=True, return_labels=True)
    points = {
        label: f"hook_{label}" if label.endswith("embed") else f"blocks.{label[0]}.hook{label[1:]}" for label in labels
    }
    for part, label in zip(parts, labels, strict=True):
        assert torch.equal(part, cache[points[label]])
    assert ("1_attn_out" in labels) == (not bridge.blocks[1].is_parallel)
    assert ("pos_embed" in labels) == ("hook_pos_embed" in bridge.hook_dict)
    for mode in ("attn", "mlp"):
        some, names = cache.decompose_resid(2, mode=mode, incl_embeds=False, return_labels=True)
        assert names == [f"0_{mode}_out", f"1_{mode}_out"]
        assert torch.equal(some[1], cache[f"{mode}_out", 1])


@torch.no_grad()
def test_the_stream_at_every_depth(run):
    bridge, cache = run.bridge, run.cache
    stack, labels = cache.accumulated_resid(return_labels=True)
    assert labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    assert all(torch.equal(one, stream(run, layer, False)) for layer, one in enumerate(stack))
    stack, labels = cache.accumulated_resid(1, incl_mid=True, mlp_input=True, return_labels=True)
    is_parallel = bridge.blocks[0].is_parallel
    assert labels == (["0_pre", "1_pre"] if is_parallel else ["0_pre", "0_mid", "1_pre", "1_mid"])
    assert torch.equal(stack[-1], stream(run, 1, True))
    assert cache.accumulated_resid(1, mlp_input=True, return_labels=True)[1] == (
        ["0_pre", "1_pre"] if is_parallel else ["0_pre", "1_pre", "1_mid"]
    )


@torch.no_grad()
def test_heads_are_their_values_through_the_output_weight(summed):
    bridge, cache = summed.bridge, summed.cache
    stack, labels = cache.stack_head_results(return_labels=True)
    assert labels == [f"L{layer}H{head}" for layer in range(3) for head in range(4)]
    assert torch.equal(stack[:4], cache.stack_head_results(1))
    for layer, block in enumerate(bridge.blocks):
        parts = torch.einsum("bphd,hdm->hbpm", cache["z", layer], block.attn.W_O)
        heads = stack[4 * layer : 4 * layer + 4]
        assert_are_parts(heads, parts, block.attn.o.bias_or_none(), cache["attn_out", layer])
    rest = cache.stack_head_results(2, incl_remainder=True)
    assert_near(rest.sum(0), cache["resid_pre", 2])
    assert len(rest) == 9


@torch.no_grad()
def test_neurons_are_their_activations_times_their_output_weights(summed):
    bridge, cache = summed.bridge, summed.cache
    dense = [layer for layer, block in enumerate(bridge.blocks) if isinstance(block.mlp, MLPBridge)]
    for layer in dense:
        block = bridge.blocks[layer]
        parts = torch.einsum("bpn,nm->nbpm", cache["post", layer], block.mlp.W_out)
        found = cache.get_neuron_results(layer).movedim(-2, 0)
        assert_are_parts(found, parts, block.mlp.out.bias_or_none(), cache["mlp_out", layer])
        directions = torch.randn(bridge.cfg.d_model, 3, generator=torch.Generator().manual_seed(2))
        assert_near(cache.get_neuron_results(layer, project_output_onto=directions).movedim(-2, 0), found @ directions)
    if len(dense) < 3:
        lacking = next(layer for layer in range(3) if layer not in dense)
        with pytest.raises(MissingWeightError, match=f"layer {lacking} has no neurons of its own"):
            cache.stack_neuron_results()
        return
    stack, labels = cache.stack_neuron_results(neuron_slice=[3, 5], return_labels=True)
    assert labels == [f"L{layer}N{neuron}" for layer in range(3) for neuron in (3, 5)]
    assert_near(stack[2:4], cache.get_neuron_results(1, [3, 5]).movedim(-2, 0))
    rest = cache.stack_neuron_results(1, incl_remainder=True, mlp_input=True)
    assert_near(rest.sum(0), stream(summed, 1, True))


@torch.no_grad()
def test_through_a_norm_components_sum_to_its_output_less_its_bias(summed):
    bridge, cache = summed.bridge, summed.cache
    for layer, mlp_input in ((0, False), (1, True), (2, False), (3, False)):
        reader = vars(bridge).get("ln_final")
        if layer < 3:
            block = bridge.blocks[layer]
            is_shared = block.is_parallel and "ln2" not in block.submodules
            reader = block.submodules.get("ln2" if mlp_input and not is_shared else "ln1")
        parts, whole = cache.decompose_resid(layer, mlp_input), cache.accumulated_resid(layer, mlp_input=mlp_input)
        by_depth = whole if reader is None else reader.module(whole)
        bias = None if reader is None else reader.bias_or_none()
        expected = by_depth[-1] if bias is None else by_depth[-1] - bias
        assert_near(cache.apply_ln_to_stack(parts, layer, mlp_input).sum(0), expected)
        assert_near(cache.decompose_resid(layer, mlp_input, apply_ln=True).sum(0), expected)
        assert_near(cache.get_full_resid_decomposition(layer, mlp_input, apply_ln=True).sum(0), expected)
        assert_near(cache.apply_ln_to_stack(whole, layer, mlp_input, recompute_ln=True), by_depth)
        streams = cache.accumulated_resid(layer, mlp_input=mlp_input, apply_ln=True)
        if layer == 3:  # before the unembedding each depth is a last stream: it has a scale of its own, and the bias
            assert_near(streams, by_depth)
        else:
            assert_near(streams[-1], expected)


def assert_logits_are_attributed(run: Run, tolerance: float = EXACT) -> None:
    """Every token's logit, and differences of logits, by every decomposition."""
    cache, logits = run.cache, before_cap(run)
    right = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(3))
    wrong = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(4))
    single, difference = (logits.gather(-1, ids[..., None])[..., 0] for ids in (right, wrong))
    difference = single - difference
    for parts in (
        cache.decompose_resid(),
        cache.get_full_resid_decomposition(),
        cache.stack_head_results(incl_remainder=True),
    ):
        found = cache.logit_attrs(parts, right).sum(0) + cache.logit_constant(right)
        assert_near(found, single, tolerance)
        found = cache.logit_attrs(parts, right, wrong).sum(0) + cache.logit_constant(right, wrong)
        assert_near(found, difference, tolerance)
    assert_near(cache.logit_attrs(parts, 7).sum(0) + cache.logit_constant(7), logits[..., 7], tolerance)
    last = cache.get_full_resid_decomposition(pos_slice=-1)
    found = cache.logit_attrs(last, right[:, -1], 3, pos_slice=-1).sum(0) + cache.logit_constant(right[:, -1], 3)
    assert_near(found, single[:, -1] - logits[:, -1, 3], tolerance)


@torch.no_grad()
def test_attributions_and_the_constant_sum_to_logits(summed):
    assert_logits_are_attributed(summed)


@torch.no_grad()
@pytest.mark.parametrize("variant", [variant for variant in EVERY if variant not in NO_SUM])
def test_they_do_so_on_processed_weights(variant):
    assert_logits_are_attributed(made(variant, processed=True))


@torch.no_grad()
def test_a_bias_of_the_unembedding_is_scaled_as_logits_are():
    bridge = clearspan.boot(build("granite"))
    bridge.hf_model.lm_head.bias = torch.nn.Parameter(torch.randn(97, generator=torch.Generator().manual_seed(5)))
    tokens = torch.randint(1, 97, (2, 6))
    assert_logits_are_attributed(Run(bridge, tokens, *bridge.run_with_cache(tokens)))


@torch.no_grad()
def test_a_bias_of_a_projection_before_the_unembedding_is_in_the_constant():
    bridge = clearspan.boot(build("opt post-norm"))
    bias = torch.nn.Parameter(torch.randn(32, generator=torch.Generator().manual_seed(5)))
    bridge.hf_model.model.decoder.project_out.bias = bias
    tokens = torch.randint(1, 97, (2, 6))
    logits, cache = bridge.run_with_cache(tokens)
    found = cache.logit_attrs(cache.accumulated_resid()[-1:], 5)[0] + cache.logit_constant(5)
    assert_near(found, logits[..., 5])


@torch.no_grad()
def test_a_stream_that_is_no_sum_is_read_all_the_same(run):
    parts = run.cache.accumulated_resid()[-1:]
    found = run.cache.logit_attrs(parts, run.tokens)[0] + run.cache.logit_constant(run.tokens)
    assert_near(found, before_cap(run).gather(-1, run.tokens[..., None])[..., 0])


@torch.no_grad()
@pytest.mark.parametrize("variant", NO_SUM)
def test_a_stream_that_is_no_sum_is_not_taken_apart(variant):
    cache = made(variant).cache
    for tool in (cache.decompose_resid, cache.stack_head_results, cache.stack_neuron_results,
                 cache.get_full_resid_decomposition):  # fmt: skip
        with pytest.raises(InvalidArgumentError) as error:
            tool()
        assert str(error.value).splitlines() == [
            "the residual stream of this model is not the sum of what its parts added",
            f"  where: {made(variant).bridge.cfg.architecture}",
            "  reason: the residual branch itself goes through norms",
            "  fix: cache.accumulated_resid() for the stream itself, cache['result', layer] for a layer's heads",
        ]


@torch.no_grad()
def test_the_last_depth_of_the_logit_lens_is_the_models_logits(run):
    bridge, cache = run.bridge, run.cache
    lens, labels = cache.logit_lens(incl_mid=True, return_labels=True)
    assert labels == cache.accumulated_resid(incl_mid=True, return_labels=True)[1]
    assert torch.equal(lens[-1], run.logits)
    assert torch.equal(lens[0], bridge(cache["resid_pre", 0], start_at_layer=3))
    assert torch.equal(
        cache.logit_lens(pos_slice=-2)[1], bridge(cache["resid_pre", 1][:, -2:-1], start_at_layer=3)[:, 0]
    )


@torch.no_grad()
def test_a_run_of_chosen_positions_is_taken_apart_as_they_are_in_the_whole(summed):
    bridge, tokens, cache = summed.bridge, summed.tokens, summed.cache
    for given, positions in ((-1, [-1]), ([0, 4], [0, 4])):
        _, some = bridge.run_with_cache(tokens, pos_slice=given)
        assert_near(some.decompose_resid(), cache.decompose_resid(pos_slice=positions))
        found, expected = some.get_full_resid_decomposition(), cache.get_full_resid_decomposition(pos_slice=positions)
        assert_near(found, expected)
        assert_near(some.logit_attrs(found, 5, 6), cache.logit_attrs(expected, 5, 6, pos_slice=positions))
        assert_near(some.logit_lens(), cache.logit_lens(pos_slice=positions))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["opt post-norm", "olmo2"])
def test_where_no_norm_reads_the_stream_it_is_read_as_it_is(variant):
    cache = made(variant).cache
    for layer, mlp_input in ((1, False), (2, True)):
        stack = cache.accumulated_resid(layer, mlp_input=mlp_input)
        assert torch.equal(cache.accumulated_resid(layer, mlp_input=mlp_input, apply_ln=True), stack)
        assert torch.equal(cache.apply_ln_to_stack(stack, layer, mlp_input, recompute_ln=True), stack)
