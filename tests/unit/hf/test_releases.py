"""What releases of transformers call differently, and what one that is too new says."""

import pytest
import torch
from tests.zoo import build
from torch import nn
from transformers import DynamicCache

import clearspan
from clearspan.errors import InvalidArgumentError, LeftOutWarning, UnknownArgumentError, UntestedReleaseWarning
from clearspan.hf import keywords, releases, segments
from clearspan.hf.attention import AttentionCall
from clearspan.hf.keywords import KV_CACHE, KV_CACHE_NAMES, kv_cache_in, kv_cache_keyword, without_kv_cache


def named(name):
    """Returns a model whose forward calls its KV cache so."""
    scope = {"nn": nn}
    exec(f"class Named(nn.Module):\n    def forward(self, input_ids, {name}=None): ...", scope)
    return scope["Named"]()


@pytest.mark.parametrize("name", KV_CACHE_NAMES)
def test_the_kv_cache_has_the_name_of_the_models_own_forward(name):
    assert kv_cache_keyword(named(name)) == name
    past = DynamicCache()
    assert kv_cache_in({"input_ids": 1, name: past}) is past
    assert without_kv_cache({"input_ids": 1, name: past}) == {"input_ids": 1}


def test_a_forward_without_a_kv_cache_is_named():
    assert kv_cache_in({"input_ids": 1, "past_key_values": None}) is None
    with pytest.raises(InvalidArgumentError) as error:
        kv_cache_keyword(named("state"))
    assert str(error.value).splitlines() == [
        "this model takes no KV cache",
        "  expected: one of past_key_values, cache, cache_params among the parameters of its forward",
        "  got: self, input_ids, state",
        "  where: Named",
    ]


@pytest.mark.parametrize("name", KV_CACHE_NAMES[1:])
def test_the_bridge_has_one_keyword_for_it(name, bridge, tokens):
    past = DynamicCache()
    for call in (bridge, bridge.run_with_cache, bridge.generate):
        with pytest.raises(UnknownArgumentError) as error:
            call(tokens, **{name: past})
        assert str(error.value).splitlines() == [
            f"the bridge does not take {name!r}",
            "  fix: past_key_values=..., whatever the model's own forward calls it",
        ]


def test_each_way_to_go_on_from_a_kv_cache_is_the_same(bridge, tokens):
    with torch.no_grad():
        whole = bridge(tokens)
        past = DynamicCache()
        bridge(tokens[:, :4], past_key_values=past)
        assert past.get_seq_length() == 4
        torch.testing.assert_close(bridge(tokens[:, 4:], past_key_values=past), whole[:, 4:], rtol=1e-4, atol=1e-5)
        expected = bridge.generate(tokens, max_new_tokens=3)
        filled = DynamicCache()
        bridge(tokens[:, :-1], past_key_values=filled)
        assert torch.equal(bridge.generate(tokens, max_new_tokens=3, past_key_values=filled), expected)
        assert filled.get_seq_length() == tokens.shape[1] + 2


@pytest.mark.parametrize(
    "made",
    [lambda value: value, lambda value: (value, None), lambda value: (value, None, None), lambda value: [value, 1]],
)
def test_what_a_block_returns_is_learnt_without_a_trace(made):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.none = nn.Dropout(0.5), None
            self.register_module("absent", None)

        def forward(self, hidden_states, scale=1):
            return made(self.part(hidden_states) * scale)

    block, heard = Block(), []
    for module in block.modules():
        module.register_forward_hook(lambda *_: heard.append("hook"))
        module.register_forward_pre_hook(lambda *_: heard.append("hook"))
    state = torch.get_rng_state()
    given = torch.zeros(1, 3, 48, requires_grad=True)
    there = made(given)
    found = segments._returned(block, (given,), {"scale": 2})
    assert found == (segments._Returned(type(there), len(there)) if isinstance(there, tuple | list) else None)
    assert not heard
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("variant", ["gptj", "falcon", "bloom", "mpt", "llama", "gpt2"])
def test_what_blocks_return_is_learnt_from_them(variant):
    """Also where nothing was learnt yet, and with a hook of the user's own on a block that is skipped."""
    bridge = clearspan.boot(build(variant))
    segments._RETURNS.clear()
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    heard = []
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids, "blocks.2.hook_resid_pre")
        bridge.blocks[0].module.register_forward_pre_hook(lambda *_: heard.append("skipped"))
        assert torch.equal(bridge(cache["resid_pre", 2], start_at_layer=2), logits)
        assert torch.equal(bridge(cache["resid_pre", 2], start_at_layer=2), logits)
    assert len(heard) == 2


def test_a_release_that_is_too_new_is_said_once(monkeypatch):
    monkeypatch.setattr(releases, "NEWEST", (5, 22))
    releases._warn_of.cache_clear()
    with pytest.warns(UntestedReleaseWarning) as warned:
        releases._warn_of("5.23.0")
    releases._warn_of("5.23.0")
    assert [str(one.message) for one in warned] == [
        "clearspan is tested with transformers 5.20 to 5.22, and this is 5.23.0. Releases have moved what this library "
        "reads. bridge.verify() checks it on your model; pip install 'transformers<5.23' installs what is tested."
    ]
    releases._warn_of("5.22.1")
    releases._warn_of("5.20.0")
    releases._warn_of.cache_clear()


def test_a_cap_that_is_left_out_is_said():
    """sdpa runs Gemma 2 so in transformers 5.20; later releases do not, unless they are made to."""
    model = build("gemma2")
    model.config._attn_implementation_internal = "sdpa"
    with pytest.warns(LeftOutWarning, match=r"does not cap attention's scores at 2, .*'eager'\) caps them"):
        bridge = clearspan.boot(model)
    module = model.model.layers[0].self_attn
    capped, plain = inside(bridge, module, softcap=0.5), inside(bridge, module)
    assert all(torch.equal(one, other) for one, other in zip(capped, plain, strict=True))


def inside(bridge, module, **keywords):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 5, 16, generator=generator), torch.randn(1, 2, 5, 16, generator=generator)
    return AttentionCall(module, query, key, key, None, {"scaling": 0.25, "dropout": 0.0, **keywords}).inside()


def test_no_keyword_is_asked_for_that_generate_renames(bridge):
    known = keywords.generation_keywords(bridge.hf_model)
    assert known.isdisjoint(KV_CACHE_NAMES[1:])
    assert KV_CACHE in known
