"""Generation is Hugging Face's own, and hooks fire at each step."""

import pytest
import torch
from transformers import CompileConfig

from clearspan.errors import UnknownArgumentError

OPTIONS = {"max_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}, {"repetition_penalty": 1.5}])
def test_tokens_give_hugging_faces_tokens(options, bridge, tokens):
    theirs = bridge.hf_model.generate(tokens, attention_mask=torch.ones_like(tokens), **OPTIONS, **options)
    assert torch.equal(bridge.generate(tokens, **OPTIONS, **options), theirs)


def test_sampling_follows_the_seed(bridge, tokens):
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(bridge.generate(tokens, max_new_tokens=6, do_sample=True, temperature=0.7, top_k=20, top_p=0.9))
    assert torch.equal(*runs)


def test_text_gives_text(embedded):
    text = embedded.generate("import o", **OPTIONS)
    assert isinstance(text, str)
    assert text.startswith("import o")
    texts = embedded.generate(["import o", "def area(self):\n    return"], **OPTIONS)
    assert texts == [embedded.generate(t, **OPTIONS) for t in ("import o", "def area(self):\n    return")]


def test_hugging_faces_output_object(bridge, tokens):
    output = bridge.generate(tokens, **OPTIONS, return_dict_in_generate=True, output_scores=True)
    assert len(output.scores) == 6


def test_hooks_fire_at_each_step_and_change_what_is_generated(bridge, tokens):
    shapes = []

    def to_token_seven(value, hook):
        shapes.append(tuple(value.shape))
        value[:] = 0
        value[..., 7] = 1

    with bridge.hooks(fwd_hooks=[("hook_logits", to_token_seven)]):
        generated = bridge.generate(tokens, **OPTIONS)
    assert shapes[1:] == [(2, 1, 97)] * 5
    assert (generated[:, 7:] == 7).all()
    assert not torch.equal(bridge.generate(tokens, **OPTIONS), generated)


def test_a_pattern_hook_with_a_kv_cache_equals_one_without(bridge, tokens):
    def first_head_off(value, hook):
        value[:, 0] = 0

    results = []
    for use_cache in (True, False):
        with bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", first_head_off)]):
            results.append(bridge.generate(tokens, **OPTIONS, use_cache=use_cache))
    assert torch.equal(*results)


def test_a_static_cache(bridge, tokens):
    with bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda value, hook: None)]):
        generated = bridge.generate(tokens, **OPTIONS, cache_implementation="static", disable_compile=True)
    assert torch.equal(generated, bridge.generate(tokens, **OPTIONS))


def test_hooks_fire_where_generation_would_compile_the_model(bridge, tokens):
    compiling = CompileConfig(backend="eager", fullgraph=False, mode=None)
    compiling._compile_all_devices = True
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "compile_config": compiling}
    generated = bridge.generate(tokens, eos_token_id=None, **options)  # compiled while nobody listens
    steps = []
    hooks = [("blocks.1.hook_resid_mid", lambda value, hook: steps.append(hook.step))]
    assert torch.equal(bridge.generate(tokens, eos_token_id=None, fwd_hooks=hooks, **options), generated)
    assert steps == [0, 1, 2, 3]


def test_unknown_options_are_refused(bridge, tokens):
    with pytest.raises(UnknownArgumentError, match="unknown keyword 'max_new_tokns'"):
        bridge.generate(tokens, max_new_tokns=3)


def test_embeddings_are_continued_and_padding_needs_no_token_of_its_own(make_bridge, tokens):
    bridge = make_bridge(pad_token_id=None)
    continued = bridge.generate(bridge.W_E[tokens].detach(), **OPTIONS)
    assert torch.equal(continued, bridge.generate(tokens, **OPTIONS)[:, tokens.shape[1] :])
    assert torch.equal(bridge.generate(tokens, **OPTIONS), make_bridge().generate(tokens, **OPTIONS))
