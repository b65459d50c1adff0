"""The cache of a generation is that of one forward over its sequence, and hooks know where in it they are."""

from typing import Any

import pytest
import torch
from tests.releases import on
from tests.zoo import build
from torch import Tensor
from transformers import DynamicCache

import clearspan
from clearspan import ActivationCache, TransformerBridge
from clearspan.errors import NotCachedError, PointNotReachedError

VARIANTS = [
    "gpt_bigcode",
    "gpt_bigcode multi-head",
    "llama",
    "gemma2",
    "gptj",
    "opt",
    "bloom",
    "falcon",
    "falcon alibi",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
]
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
WAYS: list[dict[str, Any]] = [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}]


def boot(variant: str) -> TransformerBridge:
    """Returns a bridge to a model that ends no sequence early."""
    bridge = clearspan.boot(build(variant))
    bridge.hf_model.generation_config.eos_token_id = None
    return bridge


@pytest.fixture(params=[False, True], ids=["whole rows", "left-padded"])
def mask(request: pytest.FixtureRequest) -> Tensor:
    """A mask of two rows of seven tokens."""
    mask = torch.ones(2, 7, dtype=torch.long)
    if request.param:
        mask[0, :3] = 0
    return mask


def assert_same(cache: ActivationCache, expected: ActivationCache, bridge: TransformerBridge, mask: Tensor) -> None:
    """Asserts that all entries agree at the positions that are no padding."""
    assert list(cache) == list(expected)
    for name in expected:
        value, wanted = cache[name], expected[name]
        assert value.shape == wanted.shape, name
        if "q_pos" in bridge.index.find(name).axes:
            value, wanted = value.movedim(2, 1), wanted.movedim(2, 1)
        value, wanted = value[mask.bool()].double(), wanted[mask.bool()].double()
        hidden = wanted < -1e30  # scores of keys that the mask hides
        assert torch.equal(hidden, value < -1e30), name
        scale = wanted[~hidden].abs().max()
        assert (value - wanted)[~hidden].abs().max() <= 1e-5 * scale, name


def compare(bridge: TransformerBridge, tokens: Tensor, mask: Tensor, **options: Any) -> ActivationCache:
    """Asserts that a generation's cache is that of a plain run over the sequence; returns it."""
    generated, cache = bridge.generate(tokens, attention_mask=mask, return_cache=True, **OPTIONS, **options)
    assert torch.equal(generated, bridge.generate(tokens, attention_mask=mask, **OPTIONS, **options))
    mask = torch.cat([mask, mask.new_ones(2, 5)], 1)
    _, expected = bridge.run_with_cache(generated[:, :-1], attention_mask=None if mask.all() else mask)
    assert_same(cache, expected, bridge, mask)
    return cache


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_point_equals_a_plain_run_over_the_sequence(variant, tokens, mask):
    cache = compare(boot(variant), tokens, mask)
    assert cache["resid_post", 1].shape[1] == 12
    assert cache["pattern", 1].shape[2:] == (12, 12)
    assert cache["logits"].shape[1] == 12


@pytest.mark.parametrize("variant", ["gpt_bigcode", "gemma2", "deepseek_v3", "falcon"])
@pytest.mark.parametrize("options", WAYS[1:], ids=lambda options: next(iter(options)))
def test_other_ways_through_the_sequence(options, variant, tokens, mask):
    compare(boot(variant), tokens, mask, **options)


def test_keys_in_a_cache_of_fixed_length_that_the_prompt_fills(tokens):
    """The window is as long as the prompt, so that the prompt's keys are all that the cache holds, and are moved."""
    compare(boot("gemma2"), tokens[:, :4], torch.ones(2, 4, dtype=torch.long), cache_implementation="static")


def test_it_is_made_in_one_pass(tokens):
    bridge = boot("llama")
    lengths = []
    handle = bridge.hf_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    bridge.generate(tokens, return_cache=True, **OPTIONS)
    handle.remove()
    assert lengths == [7, 1, 1, 1, 1, 1]


def test_rows_that_end_early(tokens):
    bridge = boot("llama")
    ends = bridge.generate(tokens, **OPTIONS)[:, 9].tolist()
    generated, cache = bridge.generate(tokens, return_cache=True, eos_token_id=ends, pad_token_id=0, **OPTIONS)
    assert generated.shape[1] < 13
    _, expected = bridge.run_with_cache(generated[:, :-1])
    assert_same(cache, expected, bridge, torch.ones(2, generated.shape[1] - 1))


def test_text_a_filter_and_hugging_faces_output_object(embedded):
    text, cache = embedded.generate("import o", return_cache=True, names_filter=["blocks.1.attn.hook_z"], **OPTIONS)
    assert text == embedded.generate("import o", **OPTIONS)
    assert list(cache) == ["blocks.1.attn.hook_z"]
    with pytest.raises(NotCachedError):
        cache["q", 1]
    tokens = embedded.to_tokens("import o")
    output, cache = embedded.generate(tokens, return_cache=True, return_dict_in_generate=True, **OPTIONS)
    sequences = output.sequences[:, :-1]
    assert_same(cache, embedded.run_with_cache(sequences)[1], embedded, torch.ones_like(sequences))
    assert embedded.generate(tokens, return_cache=True, **OPTIONS)[1].remove_batch_dim()["z", 0].ndim == 3


def test_only_logits_asked_for_are_computed(tokens):
    bridge = boot("llama")
    shapes = []
    with bridge.hooks(fwd_hooks=[("unembed.hook_in", lambda value, hook: shapes.append(value.shape[1]))]):
        bridge.generate(tokens, return_cache=True, names_filter="hook_embed", **OPTIONS)
        bridge.generate(tokens, return_cache=True, names_filter="hook_logits", **OPTIONS)
    assert shapes == [1] * 6 + [7] + [1] * 5


def test_it_keeps_each_position_once(tokens):
    bridge = boot("llama")
    for names in ("blocks.1.attn.hook_rot_k", "blocks.1.attn.hook_z"):
        _, cache = bridge.generate(tokens, return_cache=True, names_filter=names, max_new_tokens=40, do_sample=False)
        entry = cache._recording.nbytes()
        assert entry == cache[names].nbytes == cache._recording.nbytes()


@pytest.mark.parametrize(
    "name",
    [
        "blocks.1.hook_resid_mid",
        "blocks.1.ln2.hook_normalized",
        "blocks.1.ln2.hook_scale",
        "blocks.1.attn.hook_result",
        "blocks.1.hook_q_input",
        "blocks.1.attn.hook_pattern",
        "hook_pos_embed",
    ],
)
def test_it_shows_what_each_step_went_on_with(name, bridge, tokens):
    """Positions 8 and 10 alone are written, so that most forwards leave a derived value to be computed later."""
    bridge.hf_model.generation_config.eos_token_id = None

    def write(value, hook):
        dim = 2 if name.endswith("pattern") else 1
        for position in (8, 10):
            if hook.position <= position < hook.position + value.shape[dim]:
                value.select(dim, position - hook.position).mul_(1.5)

    generated, cache = bridge.generate(tokens, return_cache=True, fwd_hooks=[(name, write)], **OPTIONS)
    plain = bridge.run_with_cache(generated[:, :-1])[1]
    with bridge.hooks(fwd_hooks=[(name, write)]):
        expected = bridge.run_with_cache(generated[:, :-1])[1]
    assert_same(cache, expected, bridge, torch.ones(2, 12))
    assert not torch.allclose(expected[name], plain[name])


def test_hooks_are_there_for_the_generation_alone(bridge, tokens):
    def to_token_seven(value, hook):
        value[:] = 0
        value[..., 7] = 1

    before = bridge.generate(tokens, **OPTIONS)
    assert (bridge.generate(tokens, fwd_hooks=[("hook_logits", to_token_seven)], **OPTIONS)[:, 7:] == 7).all()
    assert torch.equal(bridge.generate(tokens, **OPTIONS), before)
    assert not any(point.is_listening for point in bridge.index)
    assert not bridge.hf_model._forward_pre_hooks
    assert not bridge.hf_model._forward_hooks


@pytest.mark.parametrize("options", WAYS, ids=lambda options: next(iter(options), "a KV cache"))
def test_the_position_of_each_step(options, bridge, tokens):
    bridge.hf_model.generation_config.eos_token_id = None
    seen, names = [], ["hook_embed", "blocks.2.attn.hook_q", "blocks.1.hook_out", "hook_logits"]

    def note(value, hook):
        seen.append((hook.name, hook.step, hook.position))

    bridge.generate(tokens, fwd_hooks=[(name, note) for name in names], max_new_tokens=4, **options)
    positions = {"use_cache": [0, 0, 0, 0], "prefill_chunk_size": [0, 2, 4, 6, 7, 8, 9]}
    expected = positions.get(next(iter(options), ""), [0, 7, 8, 9])
    in_order = ["hook_embed", "blocks.1.hook_out", "blocks.2.attn.hook_q", "hook_logits"]
    assert seen == [(name, step, position) for step, position in enumerate(expected) for name in in_order]


def test_the_position_in_other_forwards(bridge, tokens):
    seen = []

    def note(value, hook):
        seen.append((hook.step, hook.position))

    past = DynamicCache()
    point = bridge.blocks[1].hook_resid_post
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_post", note)]):
        bridge(tokens[:, :4], past_key_values=past)
        bridge(tokens[:, 4:], past_key_values=past)
        bridge.hf_model(tokens, past)
        bridge(tokens)
        bridge.hf_model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2)
        assert seen == [(None, 0), (None, 4), (None, 7), (None, 0), (None, 0), (None, 7)]
        seen.clear()
        bridge.generate(tokens, max_new_tokens=2)
        assert seen == [(0, 0), (1, 7)]
        assert len(bridge.hf_model._forward_hooks) == 1
        seen.clear()
        with pytest.raises(RuntimeError):
            bridge.hf_model(tokens, **on(bridge.hf_model, past), position_ids=torch.ones(1, 2, 3, 4, 5))
        bridge.blocks[1].module(bridge.W_E[tokens])
        assert seen == [(None, 0)]
    assert (point.step, point.position) == (None, 0)


def test_a_forward_inside_a_hook_does_not_move_the_position(bridge, tokens):
    seen = []

    def note(value, hook):
        bridge(tokens[:, :3])
        bridge.generate(tokens[:, :3], max_new_tokens=2)
        seen.append((hook.step, hook.position))

    _, cache = bridge.generate(tokens, fwd_hooks=[("blocks.0.mlp.hook_pre", note)], return_cache=True, max_new_tokens=3)
    assert seen == [(0, 0), (1, 7), (2, 8)]
    assert cache["resid_post", 2].shape[1] == 9


def test_the_position_in_backward(bridge, tokens):
    seen, past = [], DynamicCache()
    with bridge.hooks(bwd_hooks=[("blocks.1.hook_out", lambda grad, hook: seen.append((hook.name, hook.position)))]):
        bridge(tokens[:, :4], past_key_values=past)
        bridge(tokens[:, 4:], past_key_values=past)[:, -1].sum().backward()
    assert seen[0] == ("blocks.1.hook_out", 4)


def test_a_hook_that_never_fires(bridge, tokens):
    hooks = [("blocks.1.attn.hook_q", lambda value, hook: None)]
    bridge.blocks[1].module.attn.forward = lambda *args, **kwargs: (torch.zeros_like(args[0]), None)
    with pytest.raises(PointNotReachedError, match=r"the hook on blocks\.1\.attn\.hook_q did not fire"):
        bridge.generate(tokens, fwd_hooks=hooks, **OPTIONS)
    with pytest.raises(PointNotReachedError, match=r"the hook on blocks\.1\.attn\.hook_q did not fire"):
        bridge.generate(tokens, fwd_hooks=hooks, return_cache=True, names_filter="hook_embed", **OPTIONS)
    with pytest.raises(PointNotReachedError, match=r"blocks\.1\.attn\.hook_q was not reached"):
        bridge.generate(tokens, return_cache=True, names_filter="blocks.1.attn.hook_q", **OPTIONS)
    assert not any(module._forward_hooks for module in bridge.hf_model.modules())
