"""Inside attention: masks of every implementation, and what happens where no softmax is seen."""

import pytest
import torch
from tests.conftest import tiny_model
from tests.zoo import build
from torch import nn
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

import clearspan
from clearspan.errors import NotSeenError
from clearspan.hf.attention import AttentionCall, additive_mask
from clearspan.hf.observers import observed
from clearspan.hf.watch import SoftmaxWatch
from clearspan.points import Side


def visible(mask, q_len, k_len, *, is_causal=True, **kwargs):
    """Returns where a query may look, as a boolean `[batch, q_pos, k_pos]`."""
    module = nn.Module()
    module.is_causal = is_causal
    query, key = torch.zeros(1, 2, q_len, 4), torch.zeros(1, 1, k_len, 4)
    return additive_mask(mask, query, key, module, kwargs)[:, 0] == 0


def test_no_mask_is_causal():
    assert torch.equal(visible(None, 4, 4)[0], torch.ones(4, 4).tril().bool())
    assert visible(None, 1, 5).all()
    assert visible(None, 4, 4, is_causal=False).all()
    assert visible(None, 4, 4, is_causal=False).all()


def test_no_mask_over_a_cache_of_fixed_length_hides_what_is_still_empty():
    assert torch.equal(visible(None, 3, 8)[0], torch.ones(3, 8).tril().bool())


def test_a_boolean_mask_is_taken_as_it_is():
    allowed = torch.rand(2, 1, 3, 5) > 0.5
    assert torch.equal(visible(allowed, 3, 5), allowed[:, 0])


def test_an_additive_mask_is_handed_on():
    mask = torch.randn(1, 1, 3, 3)
    assert additive_mask(mask, torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), nn.Module(), {}) is mask


def test_a_mask_of_padding_alone_is_causal_too_and_aligned_with_the_last_keys():
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    seen = visible(padding, 2, 5)
    assert torch.equal(seen[0], torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).bool())
    assert torch.equal(seen[1], torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool())


def test_a_sliding_window():
    seen = visible(None, 4, 4, sliding_window=2)[0]
    assert torch.equal(seen, torch.ones(4, 4).tril().triu(-1).bool())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_hidden_is_finite_in_the_softmax(dtype):
    query = torch.zeros(1, 1, 2, 4, dtype=dtype)
    mask = additive_mask(None, query, query, nn.Module(), {"is_causal": True})
    assert mask.dtype == dtype
    assert torch.isfinite(mask.float()).all()


def test_masks_of_the_user_reach_a_watched_layer(bridge, tokens):
    allowed = torch.ones(7, 7).tril().bool().expand(2, 1, 7, 7).clone()
    allowed[:, :, 4:, 1] = False
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    for mask in (allowed, additive):
        _, cache = bridge.run_with_cache(tokens, attention_mask=mask)
        assert not cache["pattern", 1][:, :, 4:, 1].any()
        heard = []
        bridge.run_with_hooks(
            tokens,
            fwd_hooks=[("blocks.1.attn.hook_pattern", lambda value, hook, heard=heard: heard.append(value))],
            attention_mask=mask,
        )
        torch.testing.assert_close(heard[0], cache["pattern", 1], rtol=1e-5, atol=1e-5)


def test_attention_without_one_softmax_is_an_error():
    module = nn.Linear(1, 1)
    watch = SoftmaxWatch({}, lambda: False)
    with watch:
        torch.zeros(2, 2).softmax(-1)
    with pytest.raises(NotSeenError) as error:
        watch.check(module)
    assert str(error.value).splitlines() == [
        "attention's scores and pattern cannot be reached here",
        "  expected: one softmax and a matrix product of its result",
        "  got: 1 softmaxes, no product after",
        "  where: Linear",
    ]


def test_attention_without_an_eager_function_is_an_error():
    value = torch.zeros(1, 1, 2, 2)
    with pytest.raises(NotSeenError, match="has no eager attention function of its own"):
        AttentionCall(nn.Linear(1, 1), value, value, value, None, {}).inside()


def test_observers_see_a_call_in_turn_and_the_native_one_runs(tokens):
    model = tiny_model()
    attention = model.transformer.h[0].attn
    base, order = model(tokens, use_cache=False).logits, []

    def observer(name):
        def observe(call):
            order.append(name)
            return call.run()

        return observe

    with observed({attention: observer("a")}), observed({attention: observer("b")}):
        assert torch.equal(model(tokens, use_cache=False).logits, base)
        assert attention.config.hidden_size == 48
    assert order == ["a", "b"]
    assert attention.config is model.config
    assert Side.SCORES == "scores"


@pytest.mark.parametrize(
    ("names", "eager"),
    [
        (["blocks.1.attn.hook_pattern"], 1),
        (["blocks.1.attn.hook_attn_scores", "blocks.2.attn.hook_pattern"], 2),
        (["blocks.1.attn.hook_rot_q", "blocks.0.attn.hook_rot_k", "blocks.2.attn.hook_z"], 0),
        (["blocks.1.attn.hook_q"], 0),
    ],
)
def test_only_layers_listened_to_inside_run_eagerly(monkeypatch, names, eager):
    """Counted at the model's own eager function and at sdpa: a listener on one layer's pattern costs one layer's."""
    calls = {"eager": 0, "sdpa": 0}

    def counted(kind, function):
        def count(*args, **kwargs):
            calls[kind] += 1
            return function(*args, **kwargs)

        return count

    own = modeling_llama.eager_attention_forward
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", counted("eager", own))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted("sdpa", fused))
    bridge = clearspan.boot(build("llama"))
    tokens = torch.tensor([[1, 2, 3, 4]])
    bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: None) for name in names])
    assert calls == {"eager": eager, "sdpa": 3 - eager}
    _, cache = bridge.run_with_cache(tokens)
    assert calls == {"eager": eager, "sdpa": 6 - eager}, "a cache of everything runs natively"
    assert cache["pattern", 1].shape == (1, 4, 4, 4)
    assert calls["eager"] == eager + 1, "and computes a pattern when it is looked up"


def test_a_module_that_is_no_attention_is_named():
    """What a module computes cannot be seen where it computes it by other functions."""
    bridge = clearspan.boot(build("mixtral"))
    router = bridge.blocks[1].mlp.submodules["router"].module
    router.forward = lambda hidden_states: type(router).forward(router, hidden_states)  # as another library would
    heard = []
    bridge.run_with_hooks(
        torch.tensor([[1, 2, 3]]),
        fwd_hooks=[("blocks.1.mlp.hook_router_logits", lambda value, hook: heard.append(value.shape))],
    )
    assert heard == [(1, 3, 4)]
    weight = router.weight

    def without_linear(hidden_states):
        logits = (hidden_states[:, None] * weight).sum(-1)
        top, chosen = logits.softmax(-1).topk(2)
        return logits, top, chosen

    router.forward = without_linear
    with pytest.raises(NotSeenError, match="the router's logits cannot be reached here") as error:
        bridge.run_with_hooks(
            torch.tensor([[1, 2, 3]]), fwd_hooks=[("blocks.1.mlp.hook_router_logits", lambda value, hook: None)]
        )
    assert "got: 0 of them" in str(error.value)
    assert router.forward is without_linear, "what another library put there is back"


def test_scores_of_another_run_can_be_written_where_there_are_sinks(monkeypatch):
    """The model subtracts the maximum over scores and sink: written after that, scores would move the sink."""
    model = build("gpt_oss")
    for block in model.model.layers:
        nn.init.normal_(block.self_attn.sinks, std=3.0)
    torch.manual_seed(0)
    here, there = torch.randint(1, 97, (2, 2, 9)).unbind()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    layer = model.model.layers[1].self_attn
    kept = {}

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        groups = module.num_key_value_groups
        keys, values = (one.repeat_interleave(groups, dim=1) for one in (key, value))
        scores = query @ keys.mT * scaling + attention_mask
        if module is layer:
            scores = kept.setdefault("scores", scores)
        sinks = module.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        pattern = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        return (pattern @ values).transpose(1, 2).contiguous(), pattern

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(modeling_gpt_oss, "eager_attention_forward", attend)
        model(there, attention_mask=mask)
        expected = model(here, attention_mask=mask).logits
    bridge = clearspan.boot(model)
    name = "blocks.1.attn.hook_attn_scores"
    _, cache = bridge.run_with_cache(there, names_filter=name, attention_mask=mask)
    torch.testing.assert_close(cache[name], kept["scores"], rtol=1e-5, atol=1e-5)
    written = [(name, lambda value, hook: cache[name])]
    found = bridge.run_with_hooks(here, fwd_hooks=written, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
    patch = clearspan.Intervention("attn_scores", clearspan.interventions.Patch("there"), layer=1)
    found = bridge(here, attention_mask=mask, interventions=[patch], sources={"there": cache})
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[real], bridge(here, attention_mask=mask)[real], atol=1e-3)
