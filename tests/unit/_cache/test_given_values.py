"""Values that are put into a cache, and caches of values that one has: the tools compute with them."""

import copy

import pytest
import torch
from tests import zoo

import clearspan
from clearspan.errors import EditedEntryError, InvalidArgumentError, NotCachedError, UnknownPointError

TOKENS = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bridge():
    return clearspan.boot(zoo.build("gpt2")).processed()


def cached(bridge, **keywords):
    with torch.no_grad():
        return bridge.run_with_cache(TOKENS, **keywords)[1]


def test_a_value_takes_the_place_of_an_entry(bridge):
    cache = cached(bridge)
    value = torch.randn(2, 7, cache.model.cfg.d_model)
    cache.cache_dict["blocks.1.hook_attn_out"] = value
    assert cache["attn_out", 1] is cache.cache_dict["blocks.1.attn.hook_out"] is value
    parts, labels = cache.decompose_resid(return_labels=True)
    assert torch.equal(parts[labels.index("1_attn_out")], value)
    assert list(cache) == list(cached(bridge)), "no entry is there twice"
    cache["attn_out", 1] = value * 2
    assert torch.equal(cache["attn_out", 1], value * 2)
    rows = cache.apply_slice_to_batch_dim(1).apply_slice_to_pos_dim([2, 3])
    assert torch.equal(rows["attn_out", 1], value[1, [2, 3]] * 2)
    assert torch.equal(cache.at(-1)["attn_out", 1], value[:, -1] * 2)
    assert torch.equal(copy.deepcopy(cache)["attn_out", 1], value * 2)
    assert cache.to("meta")["attn_out", 1].is_meta


def test_all_entries_are_changed_while_they_are_gone_through(bridge):
    cache, before = cached(bridge), cached(bridge)
    for name in cache.cache_dict:
        cache.cache_dict[name] = cache.cache_dict[name] * 2
    assert list(cache) == list(before)
    torch.testing.assert_close(cache["pattern", 1], before["pattern", 1] * 2)
    torch.testing.assert_close(cache.accumulated_resid(), before.accumulated_resid() * 2)


def test_a_value_for_a_part_is_not_in_the_whole(bridge):
    cache = cached(bridge)
    part = cache.apply_slice_to_batch_dim(0)
    value = torch.randn(7, cache.model.cfg.d_model)
    part["resid_pre", 0] = value
    assert torch.equal(part["resid_pre", 0], value)
    assert torch.equal(part.apply_slice_to_pos_dim(-1)["resid_pre", 0], value[-1])
    assert not torch.equal(cache["resid_pre", 0][0], value)
    one = cache.at(-1)
    one["resid_pre", 0] = value[:2]
    assert torch.equal(one["resid_pre", 0], value[:2])


@torch.no_grad()
def test_heads_results_are_those_that_were_put_in(bridge):
    cache, n_heads = cached(bridge), bridge.cfg.n_heads
    before = cache.stack_head_results()
    z = torch.randn_like(cache["z", 0])
    cache["z", 0] = z
    made = torch.einsum("bphd,hdm->hbpm", z, bridge.W_O[0])
    torch.testing.assert_close(cache.stack_head_results()[:n_heads], made, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.stack_head_results()[n_heads:], before[n_heads:])
    cache.compute_head_results()
    torch.testing.assert_close(cache["result", 0].movedim(2, 0), made, rtol=1e-4, atol=1e-4)
    cache["result", 0] = cache["result", 0] * 2
    torch.testing.assert_close(cache.stack_head_results()[:n_heads], made * 2, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_tools_on_values_that_one_has(bridge):
    run = cached(bridge)
    own = clearspan.ActivationCache(dict(run), bridge)
    assert own.keys() == run.keys()
    assert own.sizes == run.sizes == {"batch": 2, "pos": 7}
    for tool in ("accumulated_resid", "decompose_resid", "stack_head_results", "get_full_resid_decomposition"):
        for keywords in ({}, {"apply_ln": True}, {"layer": 1, "pos_slice": -1}):
            found, expected = getattr(own, tool)(**keywords), getattr(run, tool)(**keywords)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found = own.logit_attrs(own.decompose_resid(), TOKENS[:, 0], 5)
    torch.testing.assert_close(found, run.logit_attrs(run.decompose_resid(), TOKENS[:, 0], 5), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.logit_lens(), run.logit_lens(), rtol=1e-4, atol=1e-4)
    # A difference of two runs is such a cache too.
    mean = {name: value.mean(0) for name, value in run.items() if value.is_floating_point()}
    alone = clearspan.ActivationCache(mean, bridge, has_batch_dim=False)
    torch.testing.assert_close(alone.decompose_resid(), run.decompose_resid().mean(1), rtol=1e-4, atol=1e-4)
    assert alone["pattern", 0].shape == (bridge.cfg.n_heads, 7, 7)
    assert alone.apply_slice_to_pos_dim(-1).sizes == {}
    last = {name: value[:, -1] for name, value in run.items() if "resid" in name}
    streams = clearspan.ActivationCache(last, bridge)
    assert streams.sizes == {"batch": 2}
    torch.testing.assert_close(streams.accumulated_resid(), run.accumulated_resid(pos_slice=-1))


def test_what_is_not_among_the_values_is_not_there(bridge):
    own = clearspan.ActivationCache({"blocks.0.attn.hook_z": cached(bridge)["z", 0]}, bridge)
    assert list(own) == ["blocks.0.attn.hook_z"]
    with pytest.raises(NotCachedError, match=r"hook_resid_pre exists, but is not in this cache"):
        own.accumulated_resid()
    own.compute_head_results()
    assert own["result", 0].shape == (2, 7, bridge.cfg.n_heads, bridge.cfg.d_model)
    assert "blocks.1.attn.hook_result" not in own
    assert len(clearspan.ActivationCache({}, bridge)) == 0


def test_gradients_go_in_too(bridge):
    cache = cached(bridge)
    cache["resid_pre_grad", 1] = gradient = torch.ones(2, 7, bridge.cfg.d_model)
    assert cache["blocks.1.hook_resid_pre_grad"] is gradient
    assert ("resid_pre_grad", 1) in cache
    assert list(cache)[-1] == "blocks.1.hook_resid_pre_grad"
    del cache["resid_pre_grad", 1]
    assert ("resid_pre_grad", 1) not in cache


def test_an_entry_is_taken_out_with_its_tensor(bridge):
    cache = cached(bridge, names_filter=["hook_embed", "blocks.0.hook_resid_post"])
    bytes_before = cache.nbytes
    value = cache.cache_dict.pop("blocks.0.hook_resid_post")
    assert cache.nbytes == bytes_before - value.nbytes
    assert list(cache) == ["hook_embed"]
    with pytest.raises(NotCachedError):
        del cache["resid_post", 0]
    cache.cache_dict.update({"blocks.0.hook_resid_post": value})
    assert cache["resid_post", 0] is value
    cache.clear()
    assert not list(cache)
    assert cache.nbytes == 0


def test_what_does_not_fit(bridge, tmp_path):
    cache = cached(bridge)
    with pytest.raises(InvalidArgumentError) as error:
        cache["resid_pre", 0] = torch.zeros(3, 7, 48)
    assert str(error.value).splitlines() == [
        "a value for blocks.0.hook_resid_pre has other axes in this cache",
        "  expected: [batch 2, pos 7, d_model 48]",
        "  got: [3, 7, 48]",
    ]
    with pytest.raises(UnknownPointError, match="hook_resid_pr"):
        cache.cache_dict["blocks.0.hook_resid_pr"] = torch.zeros(2, 7, 48)
    values = {"hook_embed": torch.zeros(2, 7, 48), "blocks.0.hook_resid_pre": torch.zeros(2, 6, 48)}
    with pytest.raises(InvalidArgumentError) as error:
        clearspan.ActivationCache(values, bridge)
    assert str(error.value).splitlines() == [
        "the value of blocks.0.hook_resid_pre has another size than those before it",
        "  expected: pos 7",
        "  got: pos 6",
    ]
    values["blocks.0.hook_resid_pre"] = torch.zeros(2, 48)
    with pytest.raises(InvalidArgumentError, match="some values have an axis of positions, and others do not"):
        clearspan.ActivationCache(values, bridge)
    with pytest.raises(InvalidArgumentError) as error:
        clearspan.ActivationCache({"hook_embed": torch.zeros(48)}, bridge)
    assert str(error.value).splitlines() == [
        "the value of hook_embed has other axes", "  expected: [batch, pos, d_model]", "  got: [48]"
    ]  # fmt: skip
    cache["hook_embed"] = cache["hook_embed"] * 2
    with pytest.raises(InvalidArgumentError) as error:
        cache.save(tmp_path / "run.safetensors")
    assert str(error.value).splitlines() == [
        "a cache with values that were put into it cannot be saved",
        "  got: hook_embed",
        "  fix: safetensors.torch.save_file(dict(cache), path), and ActivationCache(values, bridge)",
    ]


def test_weights_are_those_of_the_run_where_streams_are_read_and_those_of_a_value_that_is_put_in(tmp_path):
    bridge = clearspan.boot(zoo.build("gpt2"))
    streams, z = [f"blocks.{layer}.hook_resid_post" for layer in range(2)], "blocks.0.attn.hook_z"
    norm, out = bridge.blocks[0].ln1.module, bridge.blocks[0].attn.o.module
    cache, other = cached(bridge, names_filter=streams), cached(bridge, names_filter=streams)
    cache.save(tmp_path / "run.safetensors")
    stack, value = cache["resid_post", 0], torch.randn_like(cached(bridge)[z])

    def heads(cache):
        cache[z] = value
        return cache.stack_head_results(1)

    found = heads(cache)
    assert torch.equal(heads(clearspan.ActivationCache.load(tmp_path / "run.safetensors", bridge)), found)
    with torch.no_grad():
        out.weight.mul_(2)
    torch.testing.assert_close(heads(other), 2 * found)
    for left in (cache, clearspan.ActivationCache.load(tmp_path / "run.safetensors", bridge)):
        with pytest.raises(EditedEntryError, match=r"blocks.0.attn.o are not those of the cache's run"):
            heads(left)
    for part, tool in {
        norm: lambda: other.apply_ln_to_stack(stack, layer=0, recompute_ln=True),
        bridge.unembed.module: lambda: other.logit_constant(5),
    }.items():
        tool()
        with torch.no_grad():
            part.weight.mul_(2)
        with pytest.raises(EditedEntryError):
            tool()
