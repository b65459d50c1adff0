"""The cache's methods: choices of rows and positions, graphs, devices, dtypes, text, and errors."""

import functools
import itertools

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from tests.conftest import tiny_model
from tests.zoo import build
from torch import Tensor
from transformers import DynamicCache

import clearspan
from clearspan import ActivationCache, TransformerBridge
from clearspan.errors import ClearspanError, EditedEntryError, InvalidArgumentError, NotCachedError

ROWS, LENGTH = 3, 7
AXES = {"resid_pre": 1, "q": 1, "pattern": 2, "result": 1}
"""Points, with their axis of positions."""


@functools.cache
def run() -> tuple[TransformerBridge, Tensor, ActivationCache]:
    """A run that no test may leave changed."""
    bridge = clearspan.boot(tiny_model())
    tokens = torch.randint(1, 97, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
    return bridge, tokens, cache


def message(error: pytest.ExceptionInfo[ClearspanError]) -> list[str]:
    return str(error.value).splitlines()


def choices(size: int) -> st.SearchStrategy[tuple[object, object]]:
    """Every way to choose places of an axis, with the torch index that means the same."""
    one = st.integers(-size, size - 1)
    some = st.lists(one, min_size=1, max_size=size, unique_by=lambda place: place % size)
    bounds = st.tuples(st.integers(0, size - 1), st.integers(1, size), st.integers(1, 3)).filter(lambda b: b[0] < b[1])
    mask = some.map(lambda places: torch.zeros(size, dtype=torch.bool).index_fill(0, torch.tensor(places) % size, True))
    return st.one_of(
        st.just((None, slice(None))),
        one.map(lambda place: (place, place)),
        bounds.map(lambda b: (b, slice(*b))),
        bounds.map(lambda b: (slice(*b), slice(*b))),
        some.map(lambda places: (places, places)),
        some.map(lambda places: (torch.tensor(places, dtype=torch.int32), places)),
        mask.map(lambda mask: (mask, mask)),
    )


def at(value: Tensor, rows: object, positions: object, axis: int = 1, batch_axis: int = 0) -> Tensor:
    """What torch's own indexing gives: on the axis of positions, then on that of rows."""
    value = value[(slice(None),) * axis + (positions,)]
    return value[(slice(None),) * batch_axis + (rows,)]


def moves(choice: tuple[object, object], size: int) -> bool:
    """Whether a choice leaves an axis as long as it was, but not as it was."""
    places = torch.arange(size)[choice[1]]
    return places.ndim == 1 and len(places) == size and not torch.equal(places, torch.arange(size))


@hypothesis.given(rows=choices(ROWS), positions=choices(LENGTH))
@hypothesis.settings(max_examples=60, deadline=None)
def test_a_cache_of_rows_and_positions_is_that_part_of_each_entry(rows, positions):
    _, _, cache = run()
    part = cache.apply_slice_to_pos_dim(positions[0]).apply_slice_to_batch_dim(rows[0])
    for name, axis in AXES.items():
        assert torch.equal(part[name, 1], at(cache[name, 1], rows[1], positions[1], axis))
    expected = at(torch.zeros(ROWS, LENGTH), rows[1], positions[1])
    assert list(part.sizes.values()) == list(expected.shape)
    assert part.n_rows * part.n_positions == expected.numel()
    assert torch.equal(part.decompose_resid(2), at(cache.decompose_resid(2), rows[1], positions[1], 2, 1))


def reading(stack: Tensor, ids: Tensor) -> Tensor:
    """What components add to the logits of ids `[batch, pos]`, of the whole run."""
    bridge, _, cache = run()
    norm = bridge.ln_final.module
    centred = stack - stack.mean(-1, keepdim=True)
    normed = centred / cache["ln_final.hook_scale"] * norm.weight
    return torch.einsum("cbpd,bpd->cbp", normed, bridge.hf_model.lm_head.weight[ids])


@torch.no_grad()
@hypothesis.given(rows=choices(ROWS), positions=choices(LENGTH))
@hypothesis.settings(max_examples=50, deadline=None)
def test_a_stack_may_be_whole_or_picked(rows, positions):
    _, tokens, cache = run()
    whole, every = cache.decompose_resid(), slice(None)
    slices = {"pos_slice": positions[0], "batch_slice": rows[0]}
    if moves(rows, ROWS) or moves(positions, LENGTH):
        with pytest.raises(InvalidArgumentError, match="may be of all places or of those of"):
            cache.logit_attrs(whole, 5, **slices)
        return
    attributed = at(reading(whole, torch.full_like(tokens, 5)), rows[1], positions[1], 2, 1)
    normed = at(cache.apply_ln_to_stack(whole), rows[1], positions[1], 2, 1)
    for rows_are_picked, positions_are_picked in itertools.product((False, True), repeat=2):
        given = at(whole, rows[1] if rows_are_picked else every, positions[1] if positions_are_picked else every, 2, 1)
        torch.testing.assert_close(cache.logit_attrs(given, 5, **slices), attributed, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cache.apply_ln_to_stack(given, **slices), normed, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@hypothesis.given(rows=choices(ROWS), positions=choices(LENGTH))
@hypothesis.settings(max_examples=50, deadline=None)
def test_tokens_may_be_whole_or_picked(rows, positions):
    _, _, cache = run()
    hypothesis.assume(not (moves(rows, ROWS) or moves(positions, LENGTH)))
    whole = cache.decompose_resid()
    ids = torch.randint(1, 97, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    by_row = ids[:, :1].expand_as(ids)
    asked = [(by_row, ids[:, 0]), (by_row, ids[:, 0][rows[1]]), (ids, ids), (ids, at(ids, rows[1], positions[1]))]
    for meant, given in asked:
        if given.ndim == 1 and isinstance(rows[0], int) and meant is ids:
            continue  # [pos], which is where a cache with rows has [batch]
        expected = at(reading(whole, meant), rows[1], positions[1], 2, 1)
        found = cache.logit_attrs(whole, given, pos_slice=positions[0], batch_slice=rows[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        found = cache.logit_attrs(whole, 3, given, pos_slice=positions[0], batch_slice=rows[0])
        constant = at(reading(whole, torch.full_like(ids, 3)), rows[1], positions[1], 2, 1)
        torch.testing.assert_close(found, constant - expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_logits_of_rows_that_have_one_token_each():
    bridge, tokens, cache = run()
    logits, ids = bridge(tokens), torch.tensor([5, 9, 30])
    parts = cache.decompose_resid(pos_slice=-1)
    found = cache.logit_attrs(parts, ids, 2, pos_slice=-1).sum(0) + cache.logit_constant(ids, 2)
    torch.testing.assert_close(found, logits[range(3), -1, ids] - logits[:, -1, 2], rtol=1e-4, atol=1e-4)
    everywhere = cache.logit_attrs(cache.decompose_resid(), ids, tokens).sum(0) + cache.logit_constant(ids, tokens)
    expected = logits.gather(-1, ids[:, None, None].expand(3, 7, 1)) - logits.gather(-1, tokens[..., None])
    torch.testing.assert_close(everywhere, expected[..., 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_text_as_tokens(embedded):
    logits, cache = embedded.run_with_cache("import os")
    parts = cache.get_full_resid_decomposition()
    found = cache.logit_attrs(parts, " os", " sys").sum(0) + cache.logit_constant(" os", " sys")
    right, wrong = (embedded.to_single_token(text) for text in (" os", " sys"))
    torch.testing.assert_close(found, logits[..., right] - logits[..., wrong], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_without_the_batch_axis_all_is_as_for_one_row():
    bridge, tokens, cache = run()
    _, one = bridge.run_with_cache(tokens[1:2], remove_batch_dim=True)
    for row in (one, cache.apply_slice_to_batch_dim(1)):
        assert row.sizes == {"pos": LENGTH}
        for tool in ("decompose_resid", "get_full_resid_decomposition", "stack_head_results", "accumulated_resid",
                     "stack_neuron_results", "logit_lens"):  # fmt: skip
            found, expected = getattr(row, tool)(), getattr(cache, tool)()[:, 1]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(getattr(row, tool)(pos_slice=2), expected[:, 2], rtol=1e-4, atol=1e-4)
        expected = cache.logit_attrs(cache.decompose_resid(), tokens)[:, 1]
        torch.testing.assert_close(row.logit_attrs(row.decompose_resid(), tokens[1]), expected, rtol=1e-4, atol=1e-4)
        assert row.get_neuron_results(0, [5]).shape == (LENGTH, 1, 48)
        assert torch.equal(row.get_neuron_results(0, 5), row.get_neuron_results(0, [5])[:, 0])
    parts = cache.decompose_resid()[:, 1]
    for own in ({}, {"pos_slice": 3}):
        found = cache.logit_attrs(parts, 5, batch_slice=1, has_batch_dim=False, **own)
        torch.testing.assert_close(found, cache.logit_attrs(cache.decompose_resid(), 5, batch_slice=1, **own))


@torch.no_grad()
def test_one_position_without_a_batch_axis():
    bridge, tokens, cache = run()
    _, one = bridge.run_with_cache(tokens[:1], pos_slice=-1, remove_batch_dim=True)
    assert one.sizes == {"pos": 1}
    one = one.apply_slice_to_pos_dim(0)
    assert one.sizes == {}
    expected = cache.decompose_resid()[:, 0, -1]
    torch.testing.assert_close(one.decompose_resid(), expected, rtol=1e-5, atol=1e-5)
    assert one.stack_head_results().shape == (12, 48)
    found = one.logit_attrs(one.get_full_resid_decomposition(), 5).sum() + one.logit_constant(5)
    torch.testing.assert_close(found, bridge(tokens)[0, -1, 5], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.logit_lens()[-1], bridge(tokens)[0, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_neurons_are_chosen_in_every_way():
    bridge, _, cache = run()
    width = bridge.blocks[0].mlp.W_out.shape[0]
    every = cache.stack_neuron_results(1)
    for chosen, index in (
        (3, [3]),
        (-1, [-1]),
        ((4, 9, 2), slice(4, 9, 2)),
        ([7, 1], [7, 1]),
        (torch.tensor([0]), [0]),
    ):
        found, labels = cache.stack_neuron_results(1, neuron_slice=chosen, return_labels=True)
        torch.testing.assert_close(found, every[index])
        assert labels == [f"L0N{neuron}" for neuron in torch.arange(width)[index].tolist()]


@torch.no_grad()
def test_directions_take_the_last_axis():
    _, _, cache = run()
    directions = torch.randn(48, 5, generator=torch.Generator().manual_seed(3))
    for tool in (cache.stack_neuron_results, cache.get_full_resid_decomposition):
        whole, labels = tool(2, return_labels=True)
        found, named = tool(2, project_output_onto=directions, return_labels=True)
        assert named == labels
        torch.testing.assert_close(found, whole @ directions, rtol=1e-4, atol=1e-4)
        found = tool(2, pos_slice=-1, project_output_onto=directions[:, 0])
        torch.testing.assert_close(found, whole[:, :, -1] @ directions[:, 0], rtol=1e-4, atol=1e-4)
    rest = cache.stack_neuron_results(2, incl_remainder=True, project_output_onto=directions[:, 0])
    torch.testing.assert_close(rest.sum(0), cache["resid_pre", 2] @ directions[:, 0], rtol=1e-4, atol=1e-4)
    one = cache.get_neuron_results(1, [4, 6], project_output_onto=directions[:, 0])
    assert one.shape == (ROWS, LENGTH, 2)
    assert cache.get_neuron_results(1, 4, project_output_onto=directions[:, 0]).shape == (ROWS, LENGTH)


@torch.no_grad()
@pytest.mark.parametrize("layer", [2, 3])
def test_directions_are_behind_the_norm(layer):
    _, _, cache = run()
    directions = torch.randn(48, 5, generator=torch.Generator().manual_seed(3))
    for tool, flags in (
        (cache.get_full_resid_decomposition, {}),
        (cache.get_full_resid_decomposition, {"expand_neurons": False}),
        (cache.stack_neuron_results, {"incl_remainder": True}),
        (cache.stack_neuron_results, {"incl_remainder": True, "mlp_input": True}),
    ):
        if layer == 3 and "mlp_input" in flags:
            continue
        whole = tool(layer, apply_ln=True, **flags)
        found = tool(layer, apply_ln=True, project_output_onto=directions, **flags)
        torch.testing.assert_close(found, whole @ directions, rtol=1e-4, atol=1e-4)
        one = tool(layer, apply_ln=True, project_output_onto=directions[:, 0], pos_slice=-1, **flags)
        torch.testing.assert_close(one, found[:, :, -1, 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_before_the_unembedding_each_depth_is_normed_by_itself():
    bridge, _, cache = run()
    norm = bridge.hf_model.transformer.ln_f
    streams = [*(cache["resid_pre", layer] for layer in range(3)), cache["resid_post", 2]]
    centred = [stream - stream.mean(-1, keepdim=True) for stream in streams]
    expected = torch.stack([
        one / (one.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias for one in centred
    ])  # fmt: skip
    torch.testing.assert_close(cache.accumulated_resid(apply_ln=True), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        cache.accumulated_resid(apply_ln=True, pos_slice=-1), expected[:, :, -1], rtol=1e-4, atol=1e-4
    )
    logits = cache.accumulated_resid(apply_ln=True) @ bridge.W_U + bridge.b_U
    torch.testing.assert_close(logits, cache.logit_lens(), rtol=1e-4, atol=1e-4)
    # Before a layer it is that layer's scale for all.
    scale, weight = cache["scale", 2, "ln1"], bridge.hf_model.transformer.h[2].ln_1.weight
    expected = torch.stack(centred[:3]) / scale * weight
    torch.testing.assert_close(cache.accumulated_resid(2, apply_ln=True), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_stack_may_have_any_number_of_axes_of_components():
    bridge, _, cache = run()
    last = cache["resid_post", -1][:, -1]
    found = cache.apply_ln_to_stack(last, layer=-1, pos_slice=-1)
    expected = (last - last.mean(-1, keepdim=True)) / cache["ln_final.hook_scale"][:, -1]
    torch.testing.assert_close(found, expected * bridge.hf_model.transformer.ln_f.weight, rtol=1e-4, atol=1e-4)
    heads = cache.stack_head_results(pos_slice=-1)
    by_layer = heads.unflatten(0, (3, 4))
    for tool in (cache.apply_ln_to_stack, lambda stack, **flags: cache.logit_attrs(stack, 5, **flags)):
        torch.testing.assert_close(tool(by_layer, pos_slice=-1).flatten(0, 1), tool(heads, pos_slice=-1))
        torch.testing.assert_close(tool(heads[3], pos_slice=-1), tool(heads, pos_slice=-1)[3])


@torch.no_grad()
def test_stacks_of_nothing():
    _, _, cache = run()
    assert cache.stack_head_results(0).shape == cache.stack_neuron_results(0).shape == (0, ROWS, LENGTH, 48)
    assert torch.equal(cache.stack_head_results(0, incl_remainder=True)[0], cache["resid_pre", 0])
    assert cache.decompose_resid(0, return_labels=True)[1] == ["embed", "pos_embed"]
    assert cache.decompose_resid(0, incl_embeds=False).shape == (0, ROWS, LENGTH, 48)
    assert cache.stack_neuron_results(0, project_output_onto=torch.zeros(48, 2)).shape == (0, ROWS, LENGTH, 2)


@torch.no_grad()
def test_activations_of_all_layers():
    _, _, cache = run()
    assert torch.equal(cache.stack_activation("pattern")[2], cache["pattern", 2])
    scales = cache.stack_activation("scale", 2, "ln2")
    assert torch.equal(scales, torch.stack([cache["scale", 0, "ln2"], cache["scale", 1, "ln2"]]))


@torch.no_grad()
def test_tools_need_no_more_than_they_read(bridge, tokens):
    needed = ("hook_embed", "hook_pos_embed", "hook_z", "hook_post", "ln_final.hook_scale")
    _, some = bridge.run_with_cache(tokens, lambda name: name.endswith(needed))
    logits, whole = bridge.run_with_cache(tokens)
    parts = some.get_full_resid_decomposition()
    assert torch.equal(parts, whole.get_full_resid_decomposition())
    found = some.logit_attrs(parts, 5).sum(0) + some.logit_constant(5)
    torch.testing.assert_close(found, logits[..., 5], rtol=1e-4, atol=1e-4)
    assert "blocks.1.attn.hook_result" not in some
    some.compute_head_results()
    assert torch.equal(some["result", 1], whole["result", 1])
    assert "blocks.1.attn.hook_result" not in bridge.run_with_cache(tokens, lambda name: name.endswith(needed))[1]


def test_names_that_transformer_lens_has():
    bridge, _, cache = run()
    assert cache.model is bridge
    assert cache.cache_dict is cache
    assert cache.has_embed
    assert cache.has_pos_embed


@torch.no_grad()
def test_after_a_kv_cache_positions_are_those_of_the_new_tokens():
    bridge, past = clearspan.boot(build("llama")), DynamicCache()
    tokens = torch.randint(1, 97, (2, 7))
    bridge(tokens[:, :5], past_key_values=past)
    _, whole = bridge.run_with_cache(tokens)
    names = ["blocks.0.attn.hook_rot_k", "blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern"]
    _, cache = bridge.run_with_cache(tokens[:, 5:], names, past_key_values=past)
    assert cache.sizes == {"batch": 2, "pos": 2}
    assert repr(cache).splitlines()[4].endswith("[batch 2, head 4, q_pos 2, k_pos 7]")
    expected = whole["resid_post", 1][:, -1]
    torch.testing.assert_close(cache.apply_slice_to_pos_dim(1)["resid_post", 1], expected, rtol=1e-4, atol=1e-4)


# --- graphs ----------------------------------------------------------------------------------------------------------


def gradients(found: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [gradient for gradient in torch.autograd.grad(found, weights) if gradient is not None]


def test_weights_are_on_the_graph_where_that_is_asked_for(bridge, tokens):
    model = bridge.hf_model
    _, cache = bridge.run_with_cache(tokens)
    assert not cache.logit_attrs(cache.get_full_resid_decomposition(), 5).requires_grad
    cache.toggle_autodiff(True)
    assert torch.is_grad_enabled()
    assert not cache["resid_post", 1].requires_grad
    block, norm, head = bridge.blocks[1], bridge.ln_final.module, model.lm_head.weight
    weights = [block.attn.o.module.weight, block.mlp.out.module.weight, block.mlp.out.module.bias, norm.weight, head]
    found = cache.logit_attrs(cache.get_full_resid_decomposition(), 5).sum()
    stream = cache["resid_pre", 1].clone()
    for layer in (1, 2):
        one = bridge.blocks[layer]
        stream = stream + one.attn.o.module(cache["z", layer].flatten(2)) + one.mlp.out.module(cache["post", layer])
    centred = stream - stream.mean(-1, keepdim=True)
    expected = (centred / cache["ln_final.hook_scale"] * norm.weight @ head[5]).sum()
    for one, other in zip(gradients(found, weights), gradients(expected, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients(cache.logit_constant(5), [norm.bias])[0], head[5])
    lens = cache.logit_lens()
    (gradient,) = gradients(lens[-1].sum(), [norm.weight])
    torch.testing.assert_close(gradient, gradients(bridge(tokens).sum(), [norm.weight])[0], rtol=1e-4, atol=1e-4)
    assert cache["result", 0].requires_grad
    with torch.no_grad():
        assert not cache["result", 0].requires_grad
        assert not cache.stack_head_results().requires_grad
    cache.toggle_autodiff()
    for value in (cache["result", 0], cache.stack_head_results(), cache.logit_lens(), cache.logit_constant(5)):
        assert not value.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_cache_has_its_own_mode(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens)
    other = cache.apply_slice_to_batch_dim(0)
    other.toggle_autodiff(True)
    assert other.stack_head_results().requires_grad
    assert not cache.stack_head_results().requires_grad


# --- devices and dtypes ----------------------------------------------------------------------------------------------


def test_on_its_own_device_a_cache_is_the_same(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    moved = cache.to("cpu")
    assert list(moved) == list(cache)
    for name in cache:
        assert moved[name].dtype == cache[name].dtype
        assert torch.equal(moved[name], cache[name])
    assert moved["q", 1].data_ptr() == cache["q", 1].data_ptr()
    assert moved["q_grad", 1].data_ptr() == cache["q_grad", 1].data_ptr()
    moved["resid_post", 1].zero_()
    for one in (cache, moved, cache.to("cpu"), moved.to("cpu")):
        with pytest.raises(EditedEntryError):
            one["resid_post", 1]


def test_a_move_ends_where_the_run_had_its_values_kept(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens, device="cpu")
    assert cache._recording.has_transform
    assert not cache.to("meta")._recording.has_transform, "a pattern looked up there would go back"


@pytest.mark.parametrize("variant", ["gpt_bigcode", "gpt2", "gpt_oss", "falcon"])
def test_elsewhere_what_shares_storage_shares_it_again(variant):
    bridge = clearspan.boot(build(variant))
    tokens = torch.randint(1, 97, (2, 7))
    for cache in (
        bridge.run_with_cache(tokens)[1],
        bridge.generate(tokens, return_cache=True, max_new_tokens=3, do_sample=False, eos_token_id=None)[1],
    ):
        kept, moved = cache.nbytes, cache.to("meta")
        assert list(moved) == list(cache)
        assert moved.nbytes == kept
        for name in ("resid_post", "q", "pos_embed" if "hook_pos_embed" in cache else "z"):
            entry = moved[name] if name == "pos_embed" else moved[name, 1]
            assert entry.is_meta
            assert entry.dtype == torch.float32
        assert cache.nbytes == kept
        assert torch.equal(cache.to("cpu")["pattern", 1], cache["pattern", 1])


def test_a_generations_cache_goes_on_after_a_move(bridge, tokens):
    _, cache = bridge.generate(tokens, return_cache=True, max_new_tokens=3, do_sample=False, eos_token_id=None)
    moved = cache.to("cpu")
    for name in ("q", "pattern", "resid_post"):
        assert torch.equal(moved[name, 1], cache[name, 1])
    torch.testing.assert_close(moved.decompose_resid().sum(0), cache["resid_post", -1], rtol=1e-5, atol=1e-4)
    assert moved.sizes == {"batch": 2, "pos": 9}


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gpt_bigcode", "llama", "gemma2"])
def test_in_half_precision_logits_are_attributed_as_well_as_they_are_computed(variant):
    model = build(variant, **({"final_logit_softcapping": None} if variant == "gemma2" else {}))
    tokens = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(5))
    bridge = clearspan.boot(model.to(torch.bfloat16))
    logits, cache = bridge.run_with_cache(tokens)
    parts = cache.get_full_resid_decomposition()
    assert parts.dtype == cache.apply_ln_to_stack(parts).dtype == torch.bfloat16
    found = cache.logit_attrs(parts, tokens).sum(0) + cache.logit_constant(tokens)
    assert found.dtype == torch.float32
    expected = logits.gather(-1, tokens[..., None])[..., 0].float()
    # Every part was rounded to 8 bits, and so was each sum in the model. Measured: 0.006.
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


# --- text ------------------------------------------------------------------------------------------------------------


def test_as_text(bridge, tokens):
    names = ["hook_embed", "blocks.0.attn.hook_pattern", "blocks.2.attn.hook_pattern", "blocks.1.ln1.hook_scale"]
    _, cache = bridge.run_with_cache(tokens, names)
    kept = 2 * 7 * 48 * 4  # the embedding
    kept += 2 * 7 * 48 * 4  # the norm's input
    kept += 2 * 2 * 7 * (48 + 12 + 12) * 4  # fused queries, keys and values
    assert cache.nbytes == kept
    assert repr(cache).splitlines() == [
        f"ActivationCache: 4 entries, {kept / 1024:.1f} KiB kept; batch 2, pos 7",
        "name                          layers  axes",
        "hook_embed                            [batch 2, pos 7, d_model 48]",
        "blocks.{l}.attn.hook_pattern  0, 2    [batch 2, head 4, q_pos 7, k_pos 7]",
        "blocks.{l}.ln1.hook_scale     1       [batch 2, pos 7, 1]",
    ]
    assert cache.nbytes == kept, "printing computes nothing"
    part = repr(cache.apply_slice_to_batch_dim(0).apply_slice_to_pos_dim((2, 5))).splitlines()
    assert part[0].endswith("; pos 3")
    assert part[2].endswith("[pos 3, d_model 48]")
    assert part[3].endswith("[head 4, q_pos 3, k_pos 7]")
    one = repr(bridge.run_with_cache(tokens[:1], names, pos_slice=-1, remove_batch_dim=True)[1]).splitlines()
    assert one[0] == f"ActivationCache: 4 entries, {(2 * 48 + 2 * 4 * 7) * 4} B kept; pos 1"
    assert one[3].endswith("[head 4, q_pos 1, k_pos 7]")


def test_text_of_gradients_of_a_generation_and_of_what_was_edited(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens, "hook_embed", return_type="loss", incl_bwd=True)
    assert repr(cache).splitlines()[-1] == "hook_embed_grad          [batch 2, pos 7, d_model 48]"
    cache["hook_embed"].zero_()
    assert "hook_embed " in repr(cache)
    _, cache = bridge.generate(tokens, return_cache=True, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert "[batch 2, head 4, q_pos 9, k_pos 9]" in repr(cache)


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "lines"),
    [
        (
            lambda cache: cache.decompose_resid(4),
            ["layer=4 has no input", "  expected: 0 to 3; -1 and None are the last"],
        ),
        (
            lambda cache: cache.decompose_resid(mode="heads"),
            ["no mode 'heads'", "  expected: 'all', 'mlp', 'attn' or 'mixer'"],
        ),
        (
            lambda cache: cache.get_neuron_results(3),
            ["no layer 3", "  expected: -3 to 2"],
        ),
        (
            lambda cache: cache.apply_slice_to_pos_dim(7),
            [
                "pos_slice names no position of this run",
                "  expected: -7 to 6: one, (start, stop[, step]), a list, a slice, or a tensor of indices",
                "  got: 7",
            ],
        ),
        (
            lambda cache: cache.apply_slice_to_batch_dim([3]),
            [
                "batch_slice names no row of this run",
                "  expected: -3 to 2: one, (start, stop[, step]), a list, a slice, or a tensor of indices",
                "  got: [3]",
            ],
        ),
        (
            lambda cache: cache.stack_neuron_results(neuron_slice=1000),
            [
                "neuron_slice names no neuron of this run",
                "  expected: -192 to 191: one, (start, stop[, step]), a list, a slice, or a tensor of indices",
                "  got: 1000",
            ],
        ),
        (
            lambda cache: cache.apply_slice_to_batch_dim(0).apply_slice_to_batch_dim(0),
            ["cannot pick rows", "  reason: this cache has no batch axis"],
        ),
        (
            lambda cache: cache.apply_slice_to_pos_dim(0).decompose_resid(pos_slice=-1),
            ["cannot pick positions", "  reason: this cache holds one position, without its axis"],
        ),
        (
            lambda cache: cache.logit_attrs(torch.zeros(5, 2, 7, 48), 5),
            [
                "the stack does not have the rows and positions of this cache",
                "  expected: [component, batch 3, pos 7, d_model]",
                "  got: [5, 2, 7, 48]",
            ],
        ),
        (
            lambda cache: cache.logit_attrs(torch.zeros(5, 3, 3, 48), 5, pos_slice=[1, 2], batch_slice=0),
            [
                "the stack does not have the rows and positions of this cache",
                "  expected: [component, batch 3, pos 7, d_model], or [component, 2, d_model] after batch_slice=0, "
                "pos_slice=[1, 2]",
                "  got: [5, 3, 3, 48]",
            ],
        ),
        (
            lambda cache: cache.logit_attrs(torch.zeros(5, 3, 7, 48), 5, batch_slice=[2, 1, 0]),
            [
                "the stack may be of all places or of those of batch_slice=[2, 1, 0]: both have this shape",
                "  got: [5, 3, 7, 48]",
                "  fix: cache.apply_slice_to_pos_dim(...) or cache.apply_slice_to_batch_dim(...), and no slice here",
            ],
        ),
        (
            lambda cache: cache.logit_attrs(torch.zeros(5, 7, 48), 5, has_batch_dim=False),
            [
                "a stack without a batch axis is of one row",
                "  got: has_batch_dim=False, and a cache of 3 rows",
                "  fix: batch_slice=row",
            ],
        ),
        (
            lambda cache: cache.logit_attrs(cache.decompose_resid(), 97),
            [
                "these are no tokens",
                "  expected: text of one token, or ids from 0 to 96: one, [batch] or [batch, pos]",
                "  got: 97",
            ],
        ),
        (
            lambda cache: cache.logit_attrs(cache.decompose_resid(), torch.tensor([1, 2])),
            [
                "the tensor of tokens does not have the rows and positions of this cache",
                "  expected: [batch 3]",
                "  got: [2]",
            ],
        ),
    ],
)
def test_what_is_wrong_is_said(tool, lines):
    with pytest.raises(InvalidArgumentError) as error:
        tool(run()[2])
    assert message(error) == lines


def test_weights_that_were_changed_since_the_run_are_not_computed_with(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens)
    parts = cache.get_full_resid_decomposition()
    changed = {
        "blocks.1.attn.o": cache.stack_head_results,
        "blocks.2.mlp.out": cache.stack_neuron_results,
        "unembed": lambda: cache.logit_constant(5),
        "ln_final": lambda: cache.apply_ln_to_stack(parts),
    }
    for path, tool in changed.items():
        tool()
        part = next(part for component in bridge.components for part in component.walk() if part.path == path)
        with torch.no_grad():
            part.module.weight.mul_(2)
        with pytest.raises(EditedEntryError) as error:
            tool()
        assert message(error) == [
            f"the weights of {path} are not those of the cache's run",
            "  reason: they were changed since, or the cache is from a file of another checkpoint's",
            "  fix: run_with_cache again, or compute it before changing the weights",
        ]
    bridge.blocks[0].attn.o.module.weight = torch.nn.Parameter(bridge.blocks[0].attn.o.module.weight.detach())
    with pytest.raises(EditedEntryError):
        cache["result", 0]
    assert cache["q", 0].any()
    bridge.run_with_cache(tokens)[1].logit_attrs(parts, 5)


def test_weights_that_count_no_edits_are_known_by_their_parameters(tokens):
    with torch.inference_mode():
        bridge = clearspan.boot(tiny_model())
        _, cache = bridge.run_with_cache(tokens)
        assert torch.equal(cache.stack_head_results(1)[2], cache["result", 0][:, :, 2])
        out = bridge.blocks[0].attn.o.module
        out.weight = torch.nn.Parameter(out.weight.clone())
    with pytest.raises(EditedEntryError):
        cache.stack_head_results()


def test_patterns_with_sinks_that_were_changed_since_the_run_are_not_computed():
    bridge = clearspan.boot(build("gpt_oss"))
    tokens = torch.randint(1, 97, (1, 7))
    _, cache = bridge.run_with_cache(tokens)
    kept = cache["pattern", 0].clone()
    with torch.no_grad():
        for block in bridge.blocks:
            block.attn.module.sinks.add_(1)
    assert torch.equal(cache["pattern", 0], kept), "it was computed before"
    with pytest.raises(EditedEntryError, match="hook_pattern is computed with weights that are not those"):
        cache["pattern", 1]


def test_what_a_tool_lacks_is_named(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens, ["blocks.2.hook_resid_post"])
    with pytest.raises(NotCachedError, match=r"ln_final\.hook_scale exists, but is not in this cache"):
        cache.logit_attrs(cache["resid_post", 2][None], 5)
    with pytest.raises(NotCachedError, match=r"blocks\.0\.attn\.hook_z exists, but is not in this cache"):
        cache.stack_head_results()


@torch.no_grad()
@pytest.mark.parametrize("one", [np.int64(-1), np.array(-1), torch.tensor(-1)])
def test_one_place_is_one_number_however_it_is_given(one):
    bridge, tokens, cache = run()
    assert torch.equal(cache.decompose_resid(pos_slice=one), cache.decompose_resid()[:, :, -1])
    assert torch.equal(cache.apply_slice_to_batch_dim(one)["q", 0], cache["q", 0][-1])
    assert torch.equal(cache.get_neuron_results(0, one), cache.get_neuron_results(0)[:, :, -1])
    assert bridge.run_with_cache(tokens, pos_slice=one)[1]["q", 0].shape == (ROWS, 1, 4, 12)
