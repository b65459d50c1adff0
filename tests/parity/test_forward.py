"""The bridge's forward is the model's own, bit for bit, with nobody listening and with readers."""

import pytest
import torch
from tests.conftest import tiny_model
from transformers import DynamicCache

import clearspan
from clearspan.hf.keywords import kv_cache_in
from clearspan.points import Side


def hf_logits(bridge, tokens, **kwargs):
    return bridge.hf_model(tokens, use_cache=False, **kwargs).logits


def test_logits_are_bit_identical(variant, tokens):
    assert torch.equal(variant(tokens), hf_logits(variant, tokens))


def test_logits_are_bit_identical_with_readers_outside_attention(variant, tokens):
    names = [point.name for point in variant.index if point.place.side not in (Side.SCORES, Side.PATTERN)]
    seen = {}

    def read(value, hook):
        seen[hook.name] = value

    logits = variant.run_with_hooks(tokens, fwd_hooks=[(name, read) for name in names])
    assert torch.equal(logits, hf_logits(variant, tokens))
    assert set(seen) == set(names)


def test_logits_are_bit_identical_while_everything_is_cached(variant, tokens):
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            logits, _ = variant.run_with_cache(tokens)
            assert torch.equal(logits, hf_logits(variant, tokens))


def test_a_layer_whose_pattern_is_read_equals_eager(tokens, make_bridge):
    bridge = make_bridge(attn_implementation="sdpa")
    logits = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda value, hook: None)])
    torch.testing.assert_close(logits, hf_logits(bridge, tokens), rtol=1e-5, atol=1e-5)
    assert bridge.hf_model.config._attn_implementation == "sdpa"
    assert all(block.attn.config is bridge.hf_model.config for block in bridge.hf_model.transformer.h)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, tokens):
    bridge = clearspan.boot(tiny_model().to(dtype))
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens)
        assert torch.equal(logits, hf_logits(bridge, tokens))
    for name in cache:
        if "embed.hook_in" not in name:
            assert cache[name].dtype == dtype, name


def test_loss_is_hugging_faces(variant, tokens):
    theirs = variant.hf_model(tokens, labels=tokens, use_cache=False).loss
    logits, loss = variant(tokens, return_type="both")
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(variant(tokens, return_type="loss"), theirs)
    per_token = variant(tokens, return_type="loss", loss_per_token=True)
    assert per_token.shape == (2, 6)
    torch.testing.assert_close(per_token.mean(), theirs)
    assert torch.equal(logits, variant(tokens))
    assert variant(tokens, return_type=None) is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_padded_row_equals_the_row_alone(variant, tokens, side):
    mask = torch.ones_like(tokens)
    real = slice(2, 7) if side == "left" else slice(0, 5)
    mask[0] = 0
    mask[0, real] = 1
    padded = tokens.clone()
    padded[mask == 0] = 5
    logits, cache = variant.run_with_cache(padded, attention_mask=mask)
    alone, cache_alone = variant.run_with_cache(tokens[:1, real])
    torch.testing.assert_close(logits[:1, real], alone, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(logits[1:], variant(tokens[1:]), rtol=1e-5, atol=2e-5)
    pattern = cache["pattern", 1][:1, :, real, real]
    torch.testing.assert_close(pattern, cache_alone["pattern", 1], rtol=1e-5, atol=2e-6)
    losses = variant(padded, return_type="loss", loss_per_token=True, attention_mask=mask)
    torch.testing.assert_close(
        losses[0].sum(), variant(tokens[:1, real], return_type="loss", loss_per_token=True).sum()
    )


def test_patterns_equal_output_attentions_under_eager(tokens):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for implementation in ("sdpa", "eager"):
        bridge = clearspan.boot(tiny_model(attn_implementation=implementation))
        reference = tiny_model(attn_implementation="eager")
        theirs = reference(tokens, attention_mask=mask, position_ids=positions, output_attentions=True).attentions
        _, cache = bridge.run_with_cache(tokens, attention_mask=mask)
        heard = {}
        hooks = [(f"blocks.{i}.attn.hook_pattern", lambda v, hook: heard.update({hook.layer(): v})) for i in range(3)]
        bridge.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=mask)
        for layer in range(3):
            torch.testing.assert_close(cache["pattern", layer], theirs[layer], rtol=1e-5, atol=5e-6)
            torch.testing.assert_close(heard[layer], theirs[layer], rtol=1e-5, atol=5e-6)


def test_hidden_states_are_the_residual_stream(variant, tokens):
    theirs = variant.hf_model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    _, cache = variant.run_with_cache(tokens)
    for layer in range(3):
        assert torch.equal(cache["resid_pre", layer], theirs[layer])


def test_a_kv_cache_is_extended_and_its_positions_seen(variant, tokens):
    full, cached = variant.run_with_cache(tokens)
    past = DynamicCache()
    first = variant(tokens[:, :4], past_key_values=past)
    logits, cache = variant.run_with_cache(tokens[:, 4:], past_key_values=past)
    assert past.get_seq_length() == 7
    torch.testing.assert_close(torch.cat([first, logits], 1), full, rtol=1e-5, atol=2e-5)
    assert cache["k", 1].shape[1] == 3
    torch.testing.assert_close(cache["pattern", 1], cached["pattern", 1][:, :, 4:], rtol=1e-5, atol=5e-6)


def test_without_asking_no_kv_cache_is_made(bridge, tokens):
    made = []
    handle = bridge.hf_model.register_forward_hook(lambda _, __, output: made.append(kv_cache_in(output)))
    bridge(tokens)
    handle.remove()
    assert made == [None]


def test_start_and_stop(variant, tokens):
    with torch.no_grad():
        full, cache = variant.run_with_cache(tokens)
        ran = []
        handles = [
            block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
            for index, block in enumerate(variant.hf_model.transformer.h)
        ]
        for layer in range(4):
            ran.clear()
            residual = variant(tokens, stop_at_layer=layer)
            assert ran == list(range(layer))
            expected = cache["resid_post", 2] if layer == 3 else cache["resid_pre", layer]
            assert torch.equal(residual, expected)
            ran.clear()
            assert torch.equal(variant(residual, start_at_layer=layer), full)
            assert ran == list(range(layer, 3))
        ran.clear()
        middle = variant(cache["resid_pre", 1], start_at_layer=1, stop_at_layer=-1)
        assert ran == [1]
        assert torch.equal(middle, cache["resid_post", 1])
        assert torch.equal(variant(middle, start_at_layer=2, stop_at_layer=2), middle)
        for handle in handles:
            handle.remove()
        assert torch.equal(variant(tokens), full)


def test_a_cache_of_a_segment_has_that_segment(bridge, tokens):
    _, whole = bridge.run_with_cache(tokens)
    _, cache = bridge.run_with_cache(whole["resid_pre", 1], start_at_layer=1, stop_at_layer=2)
    assert {name.split(".")[1] for name in cache} == {"1"}
    assert torch.equal(cache["resid_post", 1], whole["resid_post", 1])


def test_embeddings_instead_of_tokens(bridge, tokens):
    assert torch.equal(bridge(bridge.W_E[tokens]), bridge(tokens))


def test_keywords_of_the_model_pass(bridge, tokens):
    assert torch.equal(bridge(tokens, logits_to_keep=2), bridge(tokens)[:, -2:])


def test_the_model_is_untouched(tokens):
    model = tiny_model()
    modules, state = (
        dict(model.named_modules()),
        {name: (p.data_ptr(), p.clone()) for name, p in model.state_dict().items()},
    )
    bridge = clearspan.boot(model)
    bridge.run_with_cache(tokens)
    bridge.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, lambda value, hook: None)])
    assert bridge.hf_model is model
    assert dict(model.named_modules()) == modules
    assert all(model.state_dict()[name].data_ptr() == pointer for name, (pointer, _) in state.items())
    assert all(torch.equal(model.state_dict()[name], value) for name, (_, value) in state.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
