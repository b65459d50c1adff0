"""The cache: what it keeps, what it does not, and every way to look something up."""

import numpy as np
import pytest
import torch
from tests.conftest import tiny_model

import clearspan
from clearspan import get_act_name
from clearspan.errors import InvalidArgumentError, UnknownPointError


def test_every_way_to_name_an_entry(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens)
    for same in (
        cache["q", 2],
        cache["q", -1],
        cache["blocks.2.attn.hook_q"],
        cache[get_act_name("q", 2)],
        cache["q2"],
    ):
        assert torch.equal(same, cache["q", 2])
    assert torch.equal(cache["scale", 0, "ln2"], cache["blocks.0.ln2.hook_scale"])
    assert torch.equal(cache["embed"], cache["hook_embed"])
    assert torch.equal(cache["normalized"], cache["ln_final.hook_normalized"])
    for layer in (torch.tensor(1), np.int64(1), np.array(1)):
        assert torch.equal(cache["attn", layer], cache["blocks.1.attn.hook_pattern"])
    assert torch.equal(cache["embed", None], cache["hook_embed"])
    assert torch.equal(cache["resid_pre", 1, None], cache["blocks.1.hook_resid_pre"])
    assert ("embed", None) in cache
    assert ("nonsense", None) not in cache
    with pytest.raises(InvalidArgumentError, match="the point 'q' is in a block"):
        cache["q", None]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("q", 3), "blocks.3.attn.hook_q"),
        (("resid_post", 0), "blocks.0.hook_resid_post"),
        (("post", 1), "blocks.1.mlp.hook_post"),
        (("attn", 2), "blocks.2.attn.hook_pattern"),
        (("q3",), "blocks.3.attn.hook_q"),
        (("scale2ln1",), "blocks.2.ln1.hook_scale"),
        (("scale", 4, "ln2"), "blocks.4.ln2.hook_scale"),
        (("normalized",), "ln_final.hook_normalized"),
        (("pos_embed",), "hook_pos_embed"),
        (("in", 2), "blocks.2.hook_in"),
        (("out", 0, "mlp"), "blocks.0.mlp.hook_out"),
        (("in", None, "embed"), "embed.hook_in"),
        (("blocks.1.attn.hook_z",), "blocks.1.attn.hook_z"),
        (("hook_embed",), "hook_embed"),
        (("logits",), "hook_logits"),
        (("q_input", 2), "blocks.2.hook_q_input"),
        (("mlp_in", 2), "blocks.2.hook_mlp_in"),
        (("mlp_post", 2), "blocks.2.mlp.hook_post"),
        (("query", 2), "blocks.2.attn.hook_q"),
        (("key", 2), "blocks.2.attn.hook_k"),
        (("value", 2), "blocks.2.attn.hook_v"),
        (("z", 2, "attention"), "blocks.2.attn.hook_z"),
    ],
)
def test_get_act_name(arguments, name):
    assert get_act_name(*arguments) == name


def test_filters(bridge, tokens):
    for names in ("blocks.1.attn.hook_q", ["blocks.1.attn.hook_q"], lambda name: name == "blocks.1.attn.hook_q"):
        assert list(bridge.run_with_cache(tokens, names)[1]) == ["blocks.1.attn.hook_q"]
    _, cache = bridge.run_with_cache(tokens, ["blocks.1.hook_out", "blocks.0.hook_resid_pre"])
    assert list(cache) == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"]
    assert "blocks.1.hook_out" in cache
    assert "blocks.2.hook_out" not in cache
    assert "nonsense" not in cache
    _, cache = bridge.run_with_cache(tokens, lambda name: name.endswith("attn.hook_out"))
    assert list(cache) == [f"blocks.{layer}.hook_attn_out" for layer in range(3)]


def test_everything_is_kept_once(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens)
    assert list(cache) == [point.name for point in bridge.index]
    assert len(cache) == len(list(cache))
    part = [cache[name, 1] for name in ("q", "k", "v")]
    assert len({tensor.untyped_storage().data_ptr() for tensor in part}) == 1
    assert torch.equal(torch.cat([p.flatten(2) for p in part], -1), cache["blocks.1.attn.qkv.hook_out"])


def test_derived_values_are_not_kept(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens, lambda name: "hook_result" in name)
    kept = cache._recording.nbytes()
    assert kept == 3 * tokens.numel() * 48 * 4
    assert cache["result", 0].nbytes == 4 * tokens.numel() * 48 * 4
    assert cache._recording.nbytes() == kept
    assert repr(cache).splitlines()[0] == f"ActivationCache: 3 entries, {kept / 2**10:.1f} KiB kept; batch 2, pos 7"


def test_patterns_cost_no_memory_until_they_are_looked_up(bridge):
    tokens = torch.randint(1, 97, (1, 32))
    _, cache = bridge.run_with_cache(tokens, lambda name: "hook_pattern" in name)
    before = cache._recording.nbytes()
    pattern = cache["pattern", 0]
    assert cache._recording.nbytes() == before + pattern.nbytes
    assert cache["pattern", 0].data_ptr() == pattern.data_ptr()


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_entries_are_detached_and_safe_from_what_follows(context, bridge, tokens):
    with context():
        _, cache = bridge.run_with_cache(tokens)
        kept = {name: cache[name].clone() for name in cache}
        assert not any(cache[name].requires_grad for name in cache)
        names = ["hook_embed", "blocks.0.hook_resid_mid", "blocks.1.attn.hook_q", "blocks.2.hook_resid_post"]
        bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: value.zero_()) for name in names])
        bridge(tokens.flip(1))
    assert all(torch.equal(cache[name], value) for name, value in kept.items())


def test_hooks_on_the_bridge_survive_and_are_seen(bridge, tokens):
    calls = []

    def double(value, hook):
        calls.append(hook.name)
        value *= 2

    _, plain = bridge.run_with_cache(tokens)
    bridge.add_hook("blocks.1.attn.hook_z", double)
    _, cache = bridge.run_with_cache(tokens)
    torch.testing.assert_close(cache["z", 1], plain["z", 1] * 2)
    assert torch.equal(cache["z", 0], plain["z", 0])
    torch.testing.assert_close(cache["result", 1].sum(2) + bridge.b_O[1], cache["attn_out", 1], rtol=1e-5, atol=1e-4)
    bridge(tokens)
    assert calls == ["blocks.1.attn.hook_z"] * 2
    bridge.reset_hooks()
    bridge(tokens)
    assert len(calls) == 2


def test_each_point_of_a_tensor_has_the_value_at_its_turn(bridge, tokens):
    def raise_by(amount):
        return lambda value, hook: value + amount

    hooks = [("blocks.1.hook_resid_mid", raise_by(torch.arange(48.0))), ("blocks.1.hook_mlp_in", raise_by(1.0)),
             ("blocks.1.ln2.hook_scale", raise_by(0.5))]  # fmt: skip
    _, plain = bridge.run_with_cache(tokens)
    with bridge.hooks(fwd_hooks=hooks):
        _, cache = bridge.run_with_cache(tokens)
    torch.testing.assert_close(cache["resid_mid", 1], plain["resid_mid", 1] + torch.arange(48.0))
    torch.testing.assert_close(cache["mlp_in", 1], cache["resid_mid", 1] + 1)
    unedited = bridge.blocks[1].ln2.scale(cache["mlp_in", 1])
    torch.testing.assert_close(cache["scale", 1, "ln2"], unedited + 0.5)
    centred = cache["mlp_in", 1] - cache["mlp_in", 1].mean(-1, keepdim=True)
    torch.testing.assert_close(cache["normalized", 1, "ln2"], centred / cache["scale", 1, "ln2"])


@pytest.mark.parametrize(
    ("pos_slice", "index"),
    [
        (2, [2]),
        (-1, [-1]),
        ((1, 5), slice(1, 5)),
        ((0, 7, 3), slice(0, 7, 3)),
        ([0, 4], [0, 4]),
        (slice(2, None), slice(2, None)),
        (torch.tensor([3, 1]), [3, 1]),
    ],
)
def test_positions(pos_slice, index, bridge, tokens):
    _, whole = bridge.run_with_cache(tokens)
    _, cache = bridge.run_with_cache(tokens, pos_slice=pos_slice)
    for point in bridge.index:
        axis = next(i for i, name in enumerate(point.axes) if name in ("pos", "q_pos"))
        expected = whole[point.name][(slice(None),) * axis + (index,)]
        torch.testing.assert_close(cache[point.name], expected, rtol=1e-5, atol=1e-5)
    if isinstance(pos_slice, int):
        assert cache._recording.nbytes() < whole._recording.nbytes() / 2


def test_device(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens, "blocks.0.hook_resid_pre", device="meta")
    assert cache["resid_pre", 0].device.type == "meta"
    _, cache = bridge.run_with_cache(tokens, device="cpu")
    torch.testing.assert_close(cache["pattern", 1], bridge.run_with_cache(tokens)[1]["pattern", 1])


def test_one_row_without_its_axis(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens[:1], remove_batch_dim=True)
    assert cache["q", 0].shape == (7, 4, 12)
    assert cache["pattern", 0].shape == (4, 7, 7)
    assert bridge.run_with_cache(tokens[:1])[1].remove_batch_dim()["z", 0].shape == (7, 4, 12)


def test_dropout_is_in_the_pattern_that_was_used(tokens):
    bridge = clearspan.boot(tiny_model(attn_pdrop=0.5).train())
    _, cache = bridge.run_with_cache(tokens)
    pattern = cache["pattern", 1]
    assert (pattern == 0).sum() > (torch.ones_like(pattern).triu(1) == 1).sum()
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, cache["v", 1].expand(-1, -1, 4, -1))
    torch.testing.assert_close(z, cache["z", 1], rtol=1e-5, atol=1e-5)


def test_return_types(bridge, tokens):
    loss, _ = bridge.run_with_cache(tokens, return_type="loss")
    torch.testing.assert_close(loss, bridge(tokens, return_type="loss"))
    output, cache = bridge.run_with_cache(tokens, return_type=None, incl_bwd=True)
    assert output is None
    assert cache["resid_post_grad", 1].shape == (2, 7, 48)
    for name in ("nonsense_grad", "blocks.1.nonsense_grad"):
        with pytest.raises(UnknownPointError):
            cache[name]


def test_a_run_without_listeners_leaves_no_hooks(bridge, tokens):
    bridge.run_with_cache(tokens)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bridge.hf_model.modules())
