"""A cache in a file: it comes back as it was, and a file or a model that does not fit raises."""

import dataclasses
import json

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from tests.conftest import SIZES, tiny_model
from tests.zoo import MODELS, build
from transformers import DynamicCache

import clearspan
from clearspan import ActivationCache
from clearspan.errors import EditedEntryError, InvalidArgumentError
from clearspan.points import Derived, Side


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


def loaded(cache, path, bridge=None):
    cache.save(path)
    return ActivationCache.load(path, bridge or cache.model)


def assert_same(found, expected):
    assert list(found) == list(expected)
    assert found.sizes == expected.sizes
    assert found.nbytes <= expected.nbytes
    assert repr(found).splitlines()[1:] == repr(expected).splitlines()[1:]
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        point = expected.model.hook_dict[name.removesuffix("_grad")]
        if isinstance(point.access, Derived) or point.place.side.is_inside:  # computed of the same, but laid otherwise
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
        else:
            assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("variant", MODELS)
def test_it_comes_back_as_it_was(variant, path):
    bridge = clearspan.boot(build(variant))
    tokens = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens)
        kept = cache.nbytes
        found = loaded(cache, path)
        assert path.stat().st_size < kept + 120_000
        assert_same(found, cache)
        assert found["q", -1].shape == cache["blocks.2.attn.hook_q"].shape
        assert torch.equal(found.logit_lens()[-1], logits)
        parts = found.accumulated_resid()
        assert torch.equal(found.logit_attrs(parts, tokens), cache.logit_attrs(parts, tokens))
        assert torch.equal(found.logit_constant(tokens), cache.logit_constant(tokens))
        if variant not in ("opt post-norm", "bloom normed residual"):
            assert torch.equal(found.get_full_resid_decomposition(), cache.get_full_resid_decomposition())


def test_what_shares_storage_is_written_once_and_shares_it_again(bridge, tokens, path):
    _, cache = bridge.run_with_cache(tokens)
    found = loaded(cache, path)
    parts = [found[name, 1] for name in ("q", "k", "v", "rot_q" if "blocks.1.attn.hook_rot_q" in found else "q")]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert found["resid_post", 0].data_ptr() == found["resid_pre", 1].data_ptr()
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "clearspan activation cache 2"
        assert "transformer.h.1.ln_1:input" in json.loads(file.metadata()["cache"])["views"]
        sizes = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sizes["transformer.wte:output"].shape == (2, 7, 48), "other programs find tensors in their shape"
    assert sum(tensor.nbytes for tensor in sizes.values()) == cache.nbytes


def test_scores_and_patterns_are_not_written(bridge, path):
    tokens = torch.randint(1, 97, (1, 32))
    _, cache = bridge.run_with_cache(tokens, lambda name: name.endswith("hook_pattern"))
    kept, expected = cache.nbytes, cache["pattern", 1].clone()
    found = loaded(cache, path)
    assert found.nbytes <= kept < cache.nbytes
    assert torch.equal(found["pattern", 1], expected)


@pytest.mark.parametrize("variant", ["gpt_bigcode", "llama", "deepseek_v3", "falcon"])
def test_a_generation(variant, path):
    bridge = clearspan.boot(build(variant))
    tokens = torch.randint(1, 97, (2, 5), generator=torch.Generator().manual_seed(1))
    _, cache = bridge.generate(tokens, return_cache=True, max_new_tokens=4, do_sample=False, eos_token_id=None)
    found = loaded(cache, path)
    assert list(found) == list(cache)
    assert found.sizes == {"batch": 2, "pos": 8}
    for name in cache:
        assert torch.equal(found[name], cache[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {"pos_slice": -1},
        {"pos_slice": [0, 3]},
        {"names_filter": ["blocks.1.attn.hook_z", "hook_pos_embed"]},
        {"start_at_layer": 1, "stop_at_layer": 2},
        {"incl_bwd": True, "return_type": "loss"},
        {"device": "cpu"},
    ],
    ids=str,
)
def test_every_kind_of_run(settings, bridge, tokens, path):
    given = tokens
    if "start_at_layer" in settings:
        given = bridge.run_with_cache(tokens)[1]["resid_pre", 1]
    _, cache = bridge.run_with_cache(given, **settings)
    found = loaded(cache, path)
    assert_same(found, cache)
    assert not any(found[name].requires_grad for name in found)
    assert ("hook_embed_grad" in found) == ("incl_bwd" in settings)


def test_runs_with_hooks_a_kv_cache_padding_or_dropout(bridge, tokens, path):
    def double(value, hook):
        value *= 2

    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    bridge.add_hook("blocks.1.attn.hook_pattern", double)
    bridge.add_hook("blocks.1.ln2.hook_scale", double)
    assert_same(loaded(cache := bridge.run_with_cache(tokens, attention_mask=mask)[1], path), cache)
    bridge.reset_hooks()
    assert_same(loaded(cache := bridge.run_with_cache(tokens, attention_mask=mask)[1], path), cache)
    past = DynamicCache()
    bridge(tokens[:, :4], past_key_values=past)
    assert_same(loaded(cache := bridge.run_with_cache(tokens[:, 4:], past_key_values=past)[1], path), cache)
    dropping = clearspan.boot(tiny_model(attn_pdrop=0.5).train())
    assert_same(loaded(cache := dropping.run_with_cache(tokens)[1], path), cache)
    with torch.inference_mode():
        _, cache = bridge.run_with_cache(tokens)
    assert_same(loaded(cache, path), cache)
    assert_same(cache.to("cpu"), cache)


def test_chosen_rows_and_positions_stay_chosen(bridge, tokens, path):
    _, cache = bridge.run_with_cache(tokens)
    for part in (
        cache.apply_slice_to_batch_dim([1]).apply_slice_to_pos_dim((2, 6)).apply_slice_to_pos_dim([0, 3]),
        cache.apply_slice_to_batch_dim(1),
        cache.apply_slice_to_pos_dim(-1),
    ):
        assert_same(loaded(part, path), part)
    one = bridge.run_with_cache(tokens[:1], remove_batch_dim=True)[1]
    assert_same(loaded(one, path), one)


def test_half_precision_and_a_loaded_cache_again(tokens, path, tmp_path):
    bridge = clearspan.boot(tiny_model().to(torch.bfloat16))
    _, cache = bridge.run_with_cache(tokens)
    found = loaded(cache, path)
    assert_same(found, cache)
    again = loaded(found, tmp_path / "again.safetensors")
    assert_same(again, cache)
    assert torch.equal(again.stack_head_results(), cache.stack_head_results())


def test_a_call_that_cannot_be_written_is_computed(bridge, tokens, path):
    _, cache = bridge.run_with_cache(tokens)
    expected = {name: cache[name, 1].clone() for name in ("attn_scores", "pattern")}
    _, cache = bridge.run_with_cache(tokens)
    calls = cache._recording._calls
    name = bridge.blocks[1].attn.inside(Side.PATTERN).module
    calls[name] = dataclasses.replace(calls[name], kwargs={**calls[name].kwargs, "odd": object()})
    found = loaded(cache, path)
    assert name not in found._recording._calls
    for point, value in expected.items():
        assert torch.equal(found[point, 1], value)


def test_on_another_device(bridge, tokens, path):
    _, cache = bridge.run_with_cache(tokens)
    cache.save(path)
    assert ActivationCache.load(path, bridge, device="cpu")["q", 1].device.type == "cpu"
    with pytest.raises(InvalidArgumentError) as error:
        cache.to("meta").save(path)
    assert str(error.value).splitlines() == [
        "a cache on the meta device cannot be saved",
        "  reason: it has no values",
    ]


def test_entries_of_a_loaded_cache_know_of_edits(bridge, tokens, path):
    _, cache = bridge.run_with_cache(tokens)
    found = loaded(cache, path)
    found["resid_post", 0].zero_()
    with pytest.raises(EditedEntryError):
        found["resid_pre", 1]
    with pytest.raises(EditedEntryError):
        found.save(path)


def test_beside_other_weights_what_needs_no_weights_is_there_and_the_rest_raises(bridge, tokens, path):
    _, cache = bridge.run_with_cache(tokens)
    cache.save(path)
    same = clearspan.boot(tiny_model())
    assert torch.equal(ActivationCache.load(path, same).stack_head_results(), cache.stack_head_results())
    other = clearspan.boot(tiny_model())
    with torch.no_grad():
        other.blocks[1].attn.W_O[2] *= 1.001
    found = ActivationCache.load(path, other)
    assert torch.equal(found["pattern", 1], cache["pattern", 1])
    assert torch.equal(found["result", 0], cache["result", 0])
    for _ in range(2):
        with pytest.raises(
            EditedEntryError, match=r"blocks\.1\.attn\.hook_result is computed with weights that are not"
        ):
            found["result", 1]
        with pytest.raises(
            EditedEntryError, match=r"the weights of blocks\.1\.attn\.o are not those of the cache's run"
        ):
            found.stack_head_results()
    assert found.stack_neuron_results(pos_slice=-1).any()
    with torch.no_grad():
        other.blocks[1].attn.W_O[2] /= 1.001
    other.hf_model.load_state_dict(bridge.hf_model.state_dict())
    late = ActivationCache.load(path, other)
    other.hf_model.load_state_dict(bridge.hf_model.state_dict())
    assert torch.equal(late["result", 1], cache["result", 1]), "weights are compared when they are used"
    other.hf_model.load_state_dict(bridge.hf_model.state_dict())
    with pytest.raises(EditedEntryError):
        late["result", 1]
    again = loaded(found, path, clearspan.boot(tiny_model()))
    with pytest.raises(EditedEntryError):
        again.stack_head_results()
    processed = ActivationCache.load(path, same.processed())
    with pytest.raises(EditedEntryError):
        processed.logit_attrs(processed.decompose_resid(), 5)


def test_the_same_weights_in_another_precision_are_the_same(tokens, path):
    half = tiny_model().to(torch.bfloat16)
    _, cache = clearspan.boot(half).run_with_cache(tokens)
    cache.save(path)
    found = ActivationCache.load(path, clearspan.boot(half.float()))
    assert found["q", 1].dtype == torch.bfloat16
    assert found.stack_head_results().dtype == torch.bfloat16


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_a_model_of_another_size_or_architecture(bridge, make_bridge, tokens, path):
    bridge.run_with_cache(tokens)[1].save(path)
    with pytest.raises(InvalidArgumentError) as error:
        ActivationCache.load(path, make_bridge(n_layer=2, n_head=2))
    assert str(error.value).splitlines() == [
        "run.safetensors is of another model than the bridge's",
        "  expected: n_layers 2, n_heads 2, d_head 24",
        "  got: n_layers 3, n_heads 4, d_head 12",
        "  where: a cache of GPTBigCodeForCausalLM",
    ]
    with pytest.raises(InvalidArgumentError, match="expected: architecture GPT2LMHeadModel"):
        ActivationCache.load(path, clearspan.boot(build("gpt2", vocab_size=SIZES["vocab_size"])))


def test_a_model_without_a_point_of_the_cache(path):
    tokens = torch.randint(1, 97, (1, 5))
    plain, denser = (clearspan.boot(build("qwen3_moe", mlp_only_layers=layers)) for layers in ([1], [1, 2]))
    denser.run_with_cache(tokens)[1].save(path)
    with pytest.raises(InvalidArgumentError) as error:
        ActivationCache.load(path, plain)
    assert str(error.value).splitlines() == [
        "run.safetensors is of a model with other hook points than the bridge's",
        "  got: blocks.2.mlp.hook_pre, blocks.2.mlp.hook_pre_linear, blocks.2.mlp.hook_post, ...",
        "  where: Qwen3MoeForCausalLM",
    ]


def test_files_that_are_no_cache(bridge, tokens, path, tmp_path):
    with pytest.raises(FileNotFoundError):
        ActivationCache.load(tmp_path / "nothing", bridge)
    path.write_text("a cache")
    with pytest.raises(InvalidArgumentError) as error:
        ActivationCache.load(path, bridge)
    first, expected, got = str(error.value).splitlines()
    assert first == "run.safetensors is no activation cache"
    assert expected == "  expected: a file written by cache.save, of format 'clearspan activation cache 2'"
    assert got.startswith("  got: no safetensors file (")
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(InvalidArgumentError, match="got: format None"):
        ActivationCache.load(path, bridge)
    save_file({"weight": torch.zeros(2)}, path, {"format": "clearspan activation cache 9"})
    with pytest.raises(InvalidArgumentError, match="got: format 'clearspan activation cache 9'"):
        ActivationCache.load(path, bridge)
