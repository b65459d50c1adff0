"""Hooks, caches, segments and exceptions together: what one leaves must not reach the other."""

import copy

import pytest
import torch
from tests.conftest import tiny_model
from tests.releases import start_checkpointing
from tests.zoo import build
from transformers import DynamicCache

import clearspan
from clearspan.errors import InputError, InvalidArgumentError, NotCachedError, PointNotReachedError, UnwritableError


def double(value, hook):
    return value * 2


@pytest.mark.parametrize(
    ("written", "where"),
    [
        ("blocks.0.ln1.hook_scale", "blocks.0.ln1.hook_normalized"),
        ("blocks.0.hook_q_input", "blocks.0.ln1.hook_out"),
        ("blocks.0.attn.hook_result", "blocks.0.attn.o.hook_in"),
    ],
)
def test_an_edit_of_a_run_that_was_broken_off_is_gone(written, where, bridge, tokens):
    base = bridge(tokens.flip(1))
    is_on = [True]

    def edit(value, hook):
        return value * 2 if is_on[0] else None

    def fail(value, hook):
        if is_on[0]:
            raise RuntimeError

    bridge.add_hook(written, edit)
    bridge.add_hook(where, fail)
    with pytest.raises(RuntimeError):
        bridge(tokens)
    is_on[0] = False
    torch.testing.assert_close(bridge(tokens.flip(1)), base)
    bridge.reset_hooks()
    assert not bridge.taps._passage.pending


def test_a_plain_forward_inside_a_hook_is_the_models_own(bridge, tokens):
    other = tokens.flip(0).flip(1)[:1]
    expected, alone = bridge(other), []

    def run_inside(value, hook):
        alone.append((bridge.hf_model(other, use_cache=False).logits, bridge(other)))

    _, plain = bridge.run_with_cache(tokens)
    hooks = [("blocks.0.hook_resid_post", run_inside), ("blocks.1.attn.hook_pattern", run_inside)]
    with bridge.hooks(fwd_hooks=hooks):
        _, cache = bridge.run_with_cache(tokens)
    assert all(torch.equal(logits, expected) for pair in alone for logits in pair)
    assert len(alone) == 2
    for name in cache:
        torch.testing.assert_close(cache[name], plain[name], rtol=1e-5, atol=1e-5)


def test_a_run_with_hooks_inside_a_hook_is_refused(bridge, tokens):
    for inner in (bridge.run_with_cache, bridge.run_with_hooks):
        with pytest.raises(InvalidArgumentError, match="started inside a hook function"):
            bridge.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda value, hook, inner=inner: inner(tokens))])
    bridge.run_with_cache(tokens)


def test_a_hook_may_take_itself_off(bridge, tokens):
    calls = []
    point = bridge.hook_dict["blocks.1.attn.hook_z"]

    def once(value, hook):
        calls.append("once")
        point.remove(listener)

    listener = point.add_hook(once)
    point.add_hook(lambda value, hook: calls.append("always"))
    bridge(tokens)
    bridge(tokens)
    assert calls == ["once", "always", "always"]
    bridge.reset_hooks()


def test_a_later_hook_gets_a_dense_tensor_that_is_nobodys(bridge, tokens):
    saved = torch.ones(2, 7, 4, 12)

    def edit_first_position(value, hook):
        assert value.is_contiguous()
        value[:, 0] = 0

    seen = []
    z = "blocks.1.attn.hook_z"
    bridge.run_with_hooks(tokens, fwd_hooks=[(z, lambda value, hook: saved), (z, edit_first_position)])
    assert saved.all()
    mean = lambda value, hook: value.mean(1, keepdim=True).expand_as(value)  # noqa: E731
    keep = lambda value, hook: seen.append(value)  # noqa: E731
    bridge.run_with_hooks(tokens, fwd_hooks=[(z, mean), (z, edit_first_position), (z, keep)])
    assert not seen[0][:, 0].any()
    assert seen[0][:, 1].any()


def test_a_write_in_place_goes_before_other_torch_hooks(bridge, tokens):
    expected = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_mid", double)])
    norm = bridge.hf_model.transformer.h[1].ln_2
    handle = norm.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    assert torch.equal(bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_mid", double)]), expected)
    handle.remove()


def test_a_component_alone_leaves_its_input(bridge, tokens):
    value = bridge(tokens, stop_at_layer=1).detach().requires_grad_()
    before = value.detach().clone()
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", lambda value, hook: value.zero_())]):
        bridge.blocks[1].ln2(value)
    assert torch.equal(value, before)


def test_two_bridges_listen_inside_one_attention(tokens):
    model = tiny_model()
    one, two = clearspan.boot(model), clearspan.boot(model)
    pattern, scores = "blocks.0.attn.hook_pattern", "blocks.0.attn.hook_attn_scores"
    halve = lambda value, hook: value * 0.5  # noqa: E731
    both = one.run_with_hooks(tokens, fwd_hooks=[(pattern, halve), (scores, double)])
    base = one(tokens)
    one.add_hook(pattern, halve)
    two.add_hook(scores, double)
    torch.testing.assert_close(model(tokens, use_cache=False).logits, both)
    _, cache = two.run_with_cache(tokens)
    torch.testing.assert_close(cache["logits"], both)
    one.reset_hooks()
    two.reset_hooks()
    assert torch.equal(model(tokens, use_cache=False).logits, base)
    assert all(block.attn.config is model.config for block in model.transformer.h)


def test_a_copy_of_a_model_that_is_listened_to_is_listened_to_by_nobody(bridge, tokens):
    base = bridge(tokens)
    with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", double)]):
        twin = copy.deepcopy(bridge.hf_model)
    torch.testing.assert_close(twin(tokens, use_cache=False).logits, base)


@pytest.mark.parametrize("name", ["ln_final.hook_scale", "blocks.1.hook_q_input", "blocks.1.hook_attn_in",
                                  "blocks.1.attn.hook_result", "blocks.1.ln2.hook_normalized"])  # fmt: skip
def test_gradients_recorded_beside_an_edit_are_those_at_the_edited_value(name, tokens):
    bridge = clearspan.boot(tiny_model().double())
    offset = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    with bridge.hooks(fwd_hooks=[(name, lambda value, hook: value * 1.5 + offset)]):
        _, cache = bridge.run_with_cache(tokens, [name], incl_bwd=True)
        expected = torch.autograd.grad(bridge(tokens, return_type="loss"), offset)[0]
    torch.testing.assert_close(cache[name + "_grad"].sum(), expected[0], rtol=1e-4, atol=1e-7)


def test_zeroed_gradients_of_later_parts_are_missing_in_earlier_ones(bridge, tokens):
    seen = {}
    zero = lambda gradient, hook: torch.zeros_like(gradient)  # noqa: E731
    parts = [(f"blocks.1.hook_{part}_input", zero) for part in "qkv"]
    hooks = [*parts, ("blocks.1.hook_attn_in", lambda gradient, hook: seen.update(attn_in=gradient))]
    bridge.run_with_hooks(tokens, bwd_hooks=hooks, return_type="loss").backward()
    assert not seen["attn_in"].any()


def test_an_edited_gradient_is_seen_by_points_before_it(bridge, tokens):
    seen = {}
    scaled = [("blocks.1.ln2.hook_normalized", lambda gradient, hook: gradient * 0)]
    read = [("blocks.1.hook_mlp_in", lambda gradient, hook: seen.update(mlp_in=gradient))]
    bridge.run_with_hooks(tokens, bwd_hooks=[*scaled, *read], return_type="loss").backward()
    assert not seen["mlp_in"].any()


def test_edited_gradients_are_the_same_in_each_backward(bridge, tokens):
    for name in ("blocks.1.ln1.hook_normalized", "blocks.1.hook_q_input"):
        loss = bridge.run_with_hooks(tokens, bwd_hooks=[(name, double)], return_type="loss")
        weight = bridge.blocks[0].attn.o.module.weight
        first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
        plain = torch.autograd.grad(bridge(tokens, return_type="loss"), weight)[0]
        assert torch.equal(first, second)
        assert not torch.allclose(first, plain)


def test_gradients_beside_a_constant_and_of_a_frozen_model(bridge, tokens):
    name = "blocks.1.hook_mlp_out"
    with bridge.hooks(fwd_hooks=[(name, lambda value, hook: torch.zeros_like(value))]):
        _, cache = bridge.run_with_cache(tokens, [name, "blocks.2.hook_resid_post"], incl_bwd=True)
    assert cache[name + "_grad"].any()
    _, expected = bridge.run_with_cache(tokens, incl_bwd=True)
    bridge.requires_grad_(False)
    _, frozen = bridge.run_with_cache(tokens, incl_bwd=True)
    for layer in range(3):
        for short in ("resid_pre", "q", "pattern", "q_input", "mlp_out"):
            torch.testing.assert_close(frozen[f"{short}_grad", layer], expected[f"{short}_grad", layer])


def test_a_gradient_that_would_miss_a_write_is_left_out(bridge, tokens):
    with bridge.hooks(fwd_hooks=[("blocks.1.ln1.hook_out", double)]):
        _, cache = bridge.run_with_cache(tokens, incl_bwd=True)
    assert "blocks.1.hook_q_input_grad" not in cache
    assert "blocks.0.hook_q_input_grad" in cache
    assert cache["blocks.1.ln1.hook_out_grad"].any()


def test_autocast(bridge, tokens):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
    assert cache["result", 1].shape == (2, 7, 4, 48)


INSIDE = ("blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_result")
CASTS = {"under autocast": (True, False), "outside of it": (False, True)}


def looked_up(make, is_cast):
    """Returns what a cache shows, looked up under autocast or not."""
    with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
        cache = make()
        return {name: cache[name] for name in INSIDE if name in cache}


@pytest.mark.parametrize("how", ["run", "in a file", "elsewhere", "generated"])
@pytest.mark.parametrize("where", CASTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom"])
def test_a_look_up_is_the_runs_own_whatever_autocast_is_on_by_then(family, where, how, tmp_path):
    bridge = clearspan.boot(build(family))
    ids = torch.randint(1, 97, (2, 9))
    was_on, is_on = CASTS[where]

    def made():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=was_on):
            if how == "generated":
                return bridge.generate(ids, max_new_tokens=3, do_sample=False, return_cache=True)[1]
            return bridge.run_with_cache(ids)[1]

    def stored():
        cache = made()
        if how == "in a file":
            cache.save(tmp_path / "cache")
            return clearspan.ActivationCache.load(tmp_path / "cache", bridge)
        return cache.to("cpu") if how == "elsewhere" else cache

    own, later = looked_up(made, was_on), stored()
    found = looked_up(lambda: later, is_on)
    assert found.keys() == own.keys()
    for name in own:
        assert found[name].dtype == own[name].dtype
        assert torch.equal(found[name], own[name]), name
    assert torch.is_autocast_cache_enabled()
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_bigcode", "gpt_neox"])
@pytest.mark.parametrize("name", ["blocks.1.hook_q_input", "blocks.1.attn.hook_result", "blocks.1.attn.hook_z"])
def test_torch_func_differentiates_through_a_write(family, name):
    bridge = clearspan.boot(build(family))
    ids = torch.randint(1, 97, (2, 5))
    direction = torch.randn(bridge.hook_dict[name].sizes.get("d_model", bridge.cfg.d_head))

    def total(factor):
        added = [(name, lambda value, hook: value + factor * direction)]
        return bridge.run_with_hooks(ids, fwd_hooks=added).square().mean()

    factor = torch.tensor(0.5)
    leaf = factor.clone().requires_grad_()
    expected = torch.autograd.grad(total(leaf), leaf)[0]
    assert expected
    torch.testing.assert_close(torch.func.grad(total)(factor), expected)
    assert torch.equal(bridge.blocks[1].attn.W_O[0], bridge.W_O[1, 0])


def test_a_forward_that_somebody_put_on_a_block_is_still_there(bridge, tokens):
    block = bridge.hf_model.transformer.h[0]
    own = block.forward
    vars(block)["forward"] = own
    bridge(bridge(tokens, stop_at_layer=2), start_at_layer=2)
    assert vars(block)["forward"] is own


def test_points_that_were_not_passed(bridge, tokens):
    embeddings = bridge.W_E[tokens]
    _, cache = bridge.run_with_cache(embeddings)
    assert "hook_embed" not in cache
    assert "hook_embed" not in list(cache)
    with pytest.raises(NotCachedError):
        cache["hook_embed"]
    with pytest.raises(PointNotReachedError, match="hook_embed was not reached"):
        bridge.run_with_cache(embeddings, ["hook_embed"])


def test_a_predicate_is_asked_about_what_is_run(bridge, tokens):
    seen = []
    everywhere = [(lambda name: name.endswith("hook_resid_pre"), lambda value, hook: seen.append(hook.layer()))]
    bridge.run_with_hooks(tokens, fwd_hooks=everywhere, stop_at_layer=2)
    assert seen == [0, 1]
    bridge.run_with_hooks(
        tokens, bwd_hooks=[(lambda name: True, lambda value, hook: None)], return_type="loss"
    ).backward()


def test_filters_of_every_kind(bridge, tokens):
    names = ["blocks.1.attn.hook_z", "hook_embed"]
    for given in (tuple(names), set(names), iter(names), names * 2):
        assert set(bridge.run_with_cache(tokens, given)[1]) == set(names)
    assert set(bridge.run_with_cache(tokens, tuple(names))[1]) == set(names)
    for wrong in ([], [3], 7):
        with pytest.raises((InvalidArgumentError, TypeError)):
            bridge.run_with_cache(tokens, wrong)


@pytest.mark.parametrize("wrong", [7, -8, [], [9], (), torch.tensor([True]), True, 2.5])
def test_positions_that_are_none(wrong, bridge, tokens):
    with pytest.raises(InvalidArgumentError, match="pos_slice names no position of this run"):
        bridge.run_with_cache(tokens, pos_slice=wrong)


def test_a_kv_cache_goes_with_whole_runs(bridge, tokens):
    past = DynamicCache()
    with pytest.raises(InvalidArgumentError, match="a KV cache goes with a run of the whole model"):
        bridge(tokens, past_key_values=past, stop_at_layer=1)
    assert past.get_seq_length() == 0


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 7), (2, 5)])
def test_masks_of_other_shapes(shape, bridge, tokens):
    with pytest.raises(InputError, match="the attention mask does not fit the input"):
        bridge(tokens, attention_mask=torch.ones(shape))


@pytest.mark.parametrize("wrong", [None, b"x", {"labels": [1]}, 3, 2.5, [1, "a"]])
def test_inputs_of_other_kinds(wrong, bridge):
    with pytest.raises(InputError, match=r"a run has one input|cannot run this input|a mapping is no input"):
        bridge(wrong)


def test_gradient_checkpointing_and_hooks_that_change_the_graph(bridge, tokens):
    model = bridge.train().hf_model
    start_checkpointing(model)
    pattern = [("blocks.1.attn.hook_pattern", lambda value, hook: None)]
    for hooks in ({"fwd_hooks": pattern}, {"bwd_hooks": [("blocks.1.hook_resid_post", lambda value, hook: None)]}):
        with pytest.raises(UnwritableError, match="would be missing when the forward is made again"):
            bridge.run_with_hooks(tokens, **hooks)


def test_generation_does_not_run_past_the_context(bridge, tokens):
    with pytest.raises(InputError, match="longer than the model's context"):
        bridge.generate(tokens, max_new_tokens=40)


def test_several_sequences_of_one_text(embedded):
    texts = embedded.generate("import", max_new_tokens=3, do_sample=True, num_return_sequences=3)
    assert len(texts) == 3
    assert all(text.startswith("import") for text in texts)


def test_an_explicit_bos_stays(embedded):
    assert embedded.to_single_token("<|endoftext|>") == 0
    assert embedded.to_tokens("<|endoftext|>x", prepend_bos=False)[0, 0] == 0
    with pytest.raises(InvalidArgumentError, match="unknown padding_side 'Left'"):
        embedded.to_tokens(["a", "b c"], padding_side="Left")


def test_resized_embeddings(bridge):
    bridge.hf_model.resize_token_embeddings(120)
    assert bridge(torch.tensor([[110, 3]])).shape == (1, 2, 120)


@pytest.mark.parametrize("name", ["attn_scores", "pattern", "rot_q"])
@pytest.mark.parametrize("variant", ["llama", "gptj"])
def test_a_cache_of_one_bridge_shows_what_another_one_wrote(variant, name):
    """Two bridges on one model: the cache has what the model went on with, whichever was there first."""
    model = build(variant)
    first, second = clearspan.boot(model), clearspan.boot(model)
    ids = torch.randint(1, 97, (2, 7))
    where = f"blocks.1.attn.hook_{name}"

    def change(value, hook):
        return value * 0.5

    with torch.no_grad(), first.hooks([(where, change)]):
        _, alone = first.run_with_cache(ids)
        logits, cache = second.run_with_cache(ids)
    expected = alone[where]
    torch.testing.assert_close(cache[where], expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    found = torch.einsum(
        "bhqk,bkhd->bqhd", cache["pattern", 1], cache["v", 1].repeat_interleave(4 // cache["v", 1].shape[2], dim=2)
    )
    torch.testing.assert_close(found, cache["z", 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, first.run_with_hooks(ids, fwd_hooks=[(where, change)]), rtol=1e-5, atol=1e-5)


def test_a_model_that_returns_tuples_is_refused_by_name(bridge, tokens):
    bridge.hf_model.config.return_dict = False
    with pytest.raises(InvalidArgumentError, match=r"(?s)set to return tuples.*config.return_dict = True"):
        bridge(tokens)


# transformers has torch compile the making of the mask in a way that torch calls old.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flex_attention_shows_the_patterns_of_eager_attention():
    model, reference = build("gemma2"), build("gemma2")
    reference.load_state_dict(model.state_dict())
    model.set_attn_implementation("flex_attention")
    reference.set_attn_implementation("eager")
    ids = torch.randint(1, 97, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    found = {}

    def keep(value, hook):
        found[hook.layer()] = value

    # A listener on every layer: no layer runs flex attention itself, whose kernel would have to be compiled first. The
    # mask, which transformers compiles, is made eagerly.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        clearspan.boot(model).run_with_hooks(
            ids, attention_mask=mask, fwd_hooks=[(lambda name: name.endswith("hook_pattern"), keep)]
        )
        expected = reference(ids, attention_mask=mask, output_attentions=True).attentions
    for layer, pattern in found.items():
        torch.testing.assert_close(pattern[0, :, 2:], expected[layer][0, :, 2:])
        torch.testing.assert_close(pattern[1], expected[layer][1])
    assert len(found) == len(expected)
