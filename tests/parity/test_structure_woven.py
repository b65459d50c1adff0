"""Blocks that are called several times in a forward, or lie between other modules: each call is a place of its own."""

import itertools

import pytest
import torch
from tests.structures import assert_verified

import clearspan
from clearspan import zoo
from clearspan.errors import WholeForwardError


@pytest.fixture(scope="module", params=["hrm_text", "blt"])
def woven(request):
    model = zoo.build(request.param)
    return clearspan.boot(model, adapter=clearspan.structure.derive(model))


@pytest.fixture(scope="module")
def looped():
    model = zoo.build("hrm_text")
    return clearspan.boot(model, adapter=clearspan.structure.derive(model))


def calls_of(model, path, tokens):
    """Returns what each call of a module is given and gives, in a forward of the bare model."""
    seen = []
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    with torch.no_grad():
        model(tokens, use_cache=False)
    handle.remove()
    return seen


TOKENS = torch.randint(5, 90, (2, 8), generator=torch.Generator().manual_seed(0))


def test_verify_finds_no_fault(woven):
    if woven.cfg.architecture == "HrmTextForCausalLM":
        assert_verified(woven, level="quick")
    else:
        failed = {check.what for check in woven.verify(level="quick").failures}
        assert failed == {"row of 9 tokens padded on the left to 12", "a short generation"}


def test_a_block_in_a_loop_is_a_layer_each_time(looped):
    paths = [(block.module_path.rpartition(".layers")[0][-8:], block.call) for block in looped.blocks]
    lows, highs = [("L_module", call) for call in range(4)], [("H_module", call) for call in range(2)]
    assert paths == [*lows[:2], highs[0], *lows[2:], highs[1]]


def test_the_stream_of_each_call_is_shown(looped):
    calls = calls_of(looped.hf_model, "model.L_module.layers.0", TOKENS)
    _, cache = looped.run_with_cache(TOKENS)
    for layer, (entered, left) in zip((0, 1, 3, 4), calls, strict=True):
        assert torch.equal(cache["resid_pre", layer], entered)
        assert torch.equal(cache["resid_post", layer], left)
    patterns = [cache["pattern", layer] for layer in (0, 1, 3, 4)]
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(patterns))


def test_a_write_is_in_one_call_alone(looped):
    name = "blocks.1.attn.hook_pattern"
    _, plain = looped.run_with_cache(TOKENS)
    with looped.hooks(fwd_hooks=[(name, lambda value, hook: value.flip(-1))]):
        _, cache = looped.run_with_cache(TOKENS)
    torch.testing.assert_close(cache[name], plain[name].flip(-1))
    torch.testing.assert_close(cache["pattern", 0], plain["pattern", 0])
    assert not torch.allclose(cache["pattern", 3], plain["pattern", 3].flip(-1))
    assert not torch.allclose(cache["hook_logits"], plain["hook_logits"])


def test_a_saved_cache_keeps_the_calls_apart(looped, tmp_path):
    _, cache = looped.run_with_cache(TOKENS)
    cache.save(tmp_path / "cache.safetensors")
    again = clearspan.ActivationCache.load(tmp_path / "cache.safetensors", looped)
    for layer in range(looped.cfg.n_layers):
        assert torch.equal(again["pattern", layer], cache["pattern", layer])


def test_runs_of_some_blocks_are_refused(looped):
    with pytest.raises(WholeForwardError) as caught:
        looped(TOKENS, stop_at_layer=2)
    assert str(caught.value) == (
        "blocks of this model are not run apart from the whole forward\n"
        "  got: start_at_layer=None, stop_at_layer=2\n"
        "  reason: blocks are called several times in a forward, and such a run could not tell their calls apart\n"
        "  fix: a run of the whole model; what blocks enter and leave with is in its cache, hook_resid_pre and "
        "hook_resid_post"
    )
    with pytest.raises(WholeForwardError, match="this HrmTextAttention is not called alone"):
        looped.blocks[0].attn(torch.zeros(1, 3, looped.cfg.d_model))


def test_what_enters_after_something_else_than_a_block_is_not_taken_for_a_sum(looped):
    assert [bool(block.seam) for block in looped.blocks] == [True] * 6
    _, cache = looped.run_with_cache(TOKENS)
    with pytest.raises(clearspan.errors.InvalidArgumentError, match="sum"):
        cache.decompose_resid()
