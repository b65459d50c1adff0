"""Bridges and caches that are copied or pickled: what they compute, and that they share nothing."""

import copy
import pickle

import pytest
import torch
from tests.zoo import MODELS, build

import clearspan
from clearspan.errors import EditedEntryError, NotPicklableError
from clearspan.hf.storages import storages

TOKENS = torch.tensor([[5, 9, 2, 40, 7]])
QUICK = ["gpt_bigcode", "bloom", "gemma3", "qwen3_moe"]
STEPS = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"))


def unpickled(thing):
    return pickle.loads(pickle.dumps(thing))


def torch_hooks(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@pytest.mark.parametrize(
    "variant", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
def test_a_copied_bridge_is_a_plain_one_to_a_copied_model(variant, copied):
    bridge = clearspan.boot(build(variant))
    plain = bridge(TOKENS)
    with bridge.hooks(fwd_hooks=[(point.name, lambda value, hook: None) for point in bridge.index]):
        other, model = copied(bridge), copied(bridge.hf_model)
    assert not torch_hooks(other.hf_model)
    assert torch.equal(other(TOKENS), plain)
    assert torch.equal(model(TOKENS).logits, plain)
    with torch.no_grad():
        other.hf_model.get_input_embeddings().weight.zero_()
    assert torch.equal(bridge(TOKENS), plain)
    processed = bridge.processed(**STEPS)
    again = copied(processed)
    assert again.processing == processed.processing
    assert torch.equal(again(TOKENS), processed(TOKENS))
    other.add_hook("blocks.0.hook_resid_post", lambda value, hook: value * 0)
    assert not bridge.hook_dict["blocks.0.hook_resid_post"].is_listening


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
def test_a_copied_bridge_has_the_tokenizer_and_settings(copied, embedded):
    bridge = copy.copy(embedded)
    bridge.cfg.default_prepend_bos = not embedded.cfg.default_prepend_bos
    other = copied(bridge)
    assert other.to_tokens("import os").equal(bridge.to_tokens("import os"))
    assert embedded.to_tokens("import os").numel() != other.to_tokens("import os").numel()


def test_a_shallow_copy_is_another_bridge_to_the_same_model(bridge, tokens):
    other = copy.copy(bridge)
    assert other.hf_model is bridge.hf_model
    assert other.taps is not bridge.taps
    assert torch.equal(other(tokens), bridge(tokens))


@pytest.mark.parametrize("variant", QUICK)
def test_a_deep_copy_of_a_cache_shares_nothing(variant):
    bridge = clearspan.boot(build(variant))
    _, cache = bridge.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    other = copy.deepcopy(cache)
    assert other.nbytes == cache.nbytes
    assert all(torch.equal(other[name], cache[name]) for name in cache)
    own, others = list(cache.values()), list(other.values())  # held, so that no storage takes another's address
    assert not storages(own).keys() & storages(others).keys()


def test_a_deep_copy_of_a_part_and_of_a_generation(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens)
    part = copy.deepcopy(cache.apply_slice_to_pos_dim(-1).apply_slice_to_batch_dim(0))
    assert torch.equal(part["resid_post", 1], cache["resid_post", 1][0, -1])
    generated = bridge.generate(tokens, max_new_tokens=3, do_sample=False, return_cache=True)[1]
    other = copy.deepcopy(generated)
    assert all(torch.equal(other[name], generated[name]) for name in generated)


def test_an_edited_cache_is_not_copied(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens)
    cache["q", 1].zero_()
    with pytest.raises(EditedEntryError, match="was written after it was kept"):
        copy.deepcopy(cache)


def test_a_cache_is_not_pickled(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens)
    with pytest.raises(NotPicklableError) as error:
        pickle.dumps(cache)
    assert str(error.value).splitlines() == [
        "a cache cannot be pickled",
        "  reason: it computes with its model, which would be written with it",
        "  fix: cache.save(path), and clearspan.ActivationCache.load(path, bridge)",
    ]
    assert isinstance(error.value, TypeError)


@pytest.mark.parametrize("variant", QUICK)
def test_entries_are_known_to_be_written_under_inference_mode_too(variant):
    """Whatever raises after an entry was edited under no_grad raises after it was edited under inference mode."""
    bridge = clearspan.boot(build(variant))

    def raising(context, name):
        with context():
            _, cache = bridge.run_with_cache(TOKENS)
            cache[name].zero_()
            return {other for other in cache if is_edited(cache, other)}

    def is_edited(cache, name):
        try:
            cache[name]
        except EditedEntryError:
            return True
        return False

    names = ["resid_post", "q", "pattern", "mlp_out", "scale"]
    for name in names:
        full = clearspan.get_act_name(name, 1, *(["ln1"] if name == "scale" else []))
        found = raising(torch.inference_mode, full)
        assert found == raising(torch.no_grad, full)
        assert name == "scale" or full in found


def test_an_edit_after_inference_mode_is_known(bridge, tokens):
    with torch.inference_mode():
        _, cache = bridge.run_with_cache(tokens)
    moved = cache.to("cpu")
    cache["resid_post", 1].zero_()
    for one in (cache, moved, cache.to("cpu")):
        for key in (("resid_pre", 2), ("resid_post", 1), ("normalized", 2, "ln1")):
            with pytest.raises(EditedEntryError):
                one[key]
    assert cache["resid_post", 0].any()
