"""Hooks: how they are attached, called and taken off."""

import itertools

import pytest
import torch
from tests import zoo

import clearspan
from clearspan.errors import HookTypeError, PointNotReachedError
from clearspan.points import HookPoint

Z = "blocks.1.attn.hook_z"


def test_what_a_hook_is_given(bridge, tokens):
    seen = []
    bridge.run_with_hooks(tokens, fwd_hooks=[(Z, lambda value, hook: seen.append((value, hook)))])
    (value, hook) = seen[0]
    assert isinstance(hook, HookPoint)
    assert (hook.name, hook.layer(), value.shape) == (Z, 1, (2, 7, 4, 12))
    assert hook is bridge.hook_dict[Z] is bridge.blocks[1].attn.hook_z


def test_a_hook_sees_the_name_that_it_was_asked_for_by(bridge, tokens):
    seen = []
    alias = "blocks.1.attn.hook_out"
    bridge.run_with_hooks(tokens, fwd_hooks=[(alias, lambda value, hook: seen.append(hook))])
    bridge.run_with_hooks(tokens, fwd_hooks=[(lambda name: name == alias, lambda value, hook: seen.append(hook))])
    assert [hook.name for hook in seen] == [alias, alias]
    seen[0].ctx["shared"] = 1
    assert bridge.hook_dict["blocks.1.hook_attn_out"].ctx == {"shared": 1}


def test_context_lives_until_it_is_cleared(bridge, tokens):
    def count(value, hook):
        hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1

    point = bridge.hook_dict[Z]
    for _ in range(2):
        bridge.run_with_hooks(tokens, fwd_hooks=[(Z, count)])
    assert point.ctx == {"calls": 2}
    bridge.run_with_hooks(tokens, fwd_hooks=[(Z, count)], clear_contexts=True)
    assert point.ctx == {}
    point.ctx["kept"] = True
    bridge.reset_hooks(clear_contexts=False)
    assert point.ctx == {"kept": True}
    bridge.reset_hooks()
    assert point.ctx == {}


def test_a_predicate_reaches_each_point_once(bridge, tokens):
    calls = []
    everywhere = bridge.run_with_hooks(tokens, fwd_hooks=[(lambda name: "attn.hook_out" in name or "attn_out" in name,
                                                           lambda value, hook: calls.append(hook.name))])  # fmt: skip
    assert calls == [f"blocks.{layer}.hook_attn_out" for layer in range(3)]
    assert torch.equal(everywhere, bridge(tokens))


def test_hooks_on_one_point_run_in_order_and_see_each_other(bridge, tokens):
    seen = []

    def add(amount):
        def hook_function(value, hook):
            seen.append(value.flatten()[0].item())
            return value + amount

        return hook_function

    bridge.run_with_hooks(tokens, fwd_hooks=[(Z, add(1.0)), (Z, add(2.0)), (Z, add(0.0))])
    assert [round(b - a, 3) for a, b in itertools.pairwise(seen)] == [1.0, 2.0]
    point = bridge.hook_dict[Z]
    point.add_hook(lambda value, hook: seen.append("last"))
    point.add_hook(lambda value, hook: seen.append("first"), prepend=True)
    seen.clear()
    bridge(tokens)
    assert seen == ["first", "last"]
    bridge.reset_hooks()


def test_a_hook_may_keep_what_it_was_given(bridge, tokens):
    kept = []
    bridge.run_with_hooks(tokens, fwd_hooks=[(Z, lambda value, hook: kept.append(value))])
    before = kept[0].clone()
    bridge.run_with_hooks(tokens, fwd_hooks=[(Z, lambda value, hook: value.zero_())])
    assert torch.equal(kept[0], before)


def test_what_a_hook_returns_stays_its_own(bridge, tokens):
    mine = torch.ones(2, 7, 48)
    for name in (
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_attn_out",
        "blocks.0.hook_mlp_in",
        "blocks.0.hook_resid_post",
    ):
        hooks = [(name, lambda value, hook: mine), ("blocks.0.hook_resid_mid", lambda value, hook: value.mul_(3))]
        bridge.run_with_hooks(tokens, fwd_hooks=hooks)
        assert torch.equal(mine, torch.ones(2, 7, 48)), name


def test_permanent_hooks(bridge, tokens):
    calls = []
    bridge.add_hook(Z, lambda value, hook: calls.append("permanent"), is_permanent=True)
    bridge.add_hook(Z, lambda value, hook: calls.append("passing"))
    bridge.reset_hooks()
    bridge(tokens)
    assert calls == ["permanent"]
    bridge.reset_hooks(including_permanent=True)
    bridge(tokens)
    assert calls == ["permanent"]
    assert repr(bridge.hook_dict[Z]) == "HookPoint(blocks.1.attn.hook_z: [batch, pos, head, d_head])"


def test_directions_are_reset_apart(bridge, tokens):
    calls = []
    bridge.add_hook(Z, lambda value, hook: calls.append("fwd"))
    bridge.add_hook(Z, lambda value, hook: calls.append("bwd"), dir="bwd")
    assert repr(bridge.hook_dict[Z]).endswith("2 listening)")
    bridge.reset_hooks(direction="bwd")
    bridge(tokens, return_type="loss").backward()
    assert calls == ["fwd"]
    bridge.reset_hooks()


def test_hooks_that_stay_after_the_run(bridge, tokens):
    calls = []
    bridge.run_with_hooks(tokens, fwd_hooks=[(Z, lambda value, hook: calls.append(1))], reset_hooks_end=False)
    bridge(tokens)
    assert calls == [1, 1]
    bridge.reset_hooks()


def test_the_context_manager_takes_off_its_own_hooks_alone(bridge, tokens):
    calls = []
    bridge.add_hook(Z, lambda value, hook: calls.append("mine"))
    with bridge.hooks(fwd_hooks=[(Z, lambda value, hook: calls.append("inner"))]) as same:
        assert same is bridge
        bridge(tokens)
    bridge(tokens)
    assert calls == ["mine", "inner", "mine"]
    bridge.reset_hooks()


def test_hooks_fire_when_the_model_itself_is_called(bridge, tokens):
    with bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_mid", lambda value, hook: value * 0)]):
        through_model = bridge.hf_model(tokens, use_cache=False).logits
        assert torch.equal(through_model, bridge(tokens))
    assert not torch.allclose(through_model, bridge(tokens))


def test_read_only_mapping_of_hooks(bridge):
    assert "blocks.0.attn.hook_out" in bridge.hook_dict
    assert (
        bridge.hook_dict["blocks.0.attn.hook_out"] is bridge.blocks[0].hook_attn_out is bridge.blocks[0].attn.hook_out
    )


@pytest.mark.parametrize("variant", ["gpt2", "mixtral"])
def test_a_predicate_of_backward_hooks_leaves_out_what_has_no_gradient(variant, tokens):
    bridge, seen = clearspan.boot(zoo.build(variant)), set()

    def note(gradient, hook):
        assert gradient.is_floating_point()
        seen.add(hook.name)

    bridge.add_hook(lambda name: True, note, dir="bwd")
    bridge(tokens, return_type="loss").backward()
    bridge.reset_hooks()
    added, seen = seen, set()
    bridge.run_with_hooks(tokens, bwd_hooks=[(lambda name: True, note)], return_type="loss").backward()
    whole = {"embed.hook_in", "pos_embed.hook_in", *(name for name in bridge.hook_dict if name.endswith("_indices"))}
    assert "blocks.1.hook_resid_pre" in added
    assert added == seen
    assert not added & whole
    with pytest.raises(PointNotReachedError, match="whole numbers have no gradient"):
        bridge.run_with_hooks(tokens, bwd_hooks=[("embed.hook_in", note)], return_type="loss")


def test_a_backward_hook_may_return_the_gradient_in_a_tuple(bridge, tokens):
    def embedding(change):
        with bridge.hooks(bwd_hooks=[("blocks.1.hook_resid_pre", change)]):
            return torch.autograd.grad(bridge(tokens, return_type="loss"), bridge.hf_model.transformer.wte.weight)[0]

    plain = embedding(lambda gradient, hook: gradient * 0.5)
    torch.testing.assert_close(embedding(lambda gradient, hook: (gradient * 0.5,)), plain, rtol=0, atol=0)
    assert not torch.allclose(embedding(lambda gradient, hook: (gradient,)), plain)
    with pytest.raises(HookTypeError, match="something that is not a tensor"):
        embedding(lambda gradient, hook: (gradient, gradient))
