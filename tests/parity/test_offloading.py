"""Models whose weights accelerate brings in only while a module runs."""

import pytest
import torch
from accelerate import cpu_offload
from tests.zoo import build

import clearspan
from clearspan.errors import UnreadableWeightError


@pytest.mark.parametrize("variant", ["llama", "gpt_bigcode", "deepseek_v3", "falcon sequential", "mixtral"])
def test_an_offloaded_model_reads_and_writes_but_for_what_needs_its_weights(variant):
    model = build(variant)
    ids = torch.randint(1, 97, (2, 7))
    with torch.no_grad():
        whole = clearspan.boot(model)
        expected, kept = whole.run_with_cache(ids)
        kept = {name: kept[name] for name in kept}
        steered = whole.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_resid_mid", lambda value, hook: value * 2)])
        cpu_offload(model, execution_device="cpu")
        bridge = clearspan.boot(model)
        assert next(model.parameters()).is_meta
        logits, cache = bridge.run_with_cache(ids)
        assert torch.equal(logits, expected)
        for name in ("q", "pattern", "z", "attn_out", "resid_mid", "mlp_out"):
            torch.testing.assert_close(cache[name, 1], kept[f"blocks.1.{where(name)}hook_{name}"], rtol=0, atol=0)
        again = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_resid_mid", lambda value, hook: value * 2)])
        assert torch.equal(again, steered)
        with pytest.raises(UnreadableWeightError) as error:
            _ = cache["result", 1]
    first, place, reason, fix = str(error.value).splitlines()
    assert first == "the weight of blocks.1.attn.o cannot be read"
    assert place.startswith("  where: ")
    assert reason == "  reason: the module is offloaded: its weights are in memory only while it runs"
    assert fix == "  fix: load the model without offloading and quantisation, or use points that need no weight"


def where(name: str) -> str:
    return "attn." if name in ("q", "pattern", "z") else ""


def test_verification_says_what_raises():
    model = build("llama")
    cpu_offload(model, execution_device="cpu")
    found = clearspan.boot(model).verify()
    assert found.passed, str(found)
    assert found.forwards <= 40
    names = {check.what.partition(":")[0] for check in found.unavailable if check.group == "writes"}
    assert {"blocks.1.hook_q_input", "blocks.1.ln1.hook_scale", "ln_final.hook_normalized"} <= names
    assert "blocks.1.attn.hook_q" not in names
    assert "of writes could not be checked" in str(found)


def test_writing_what_needs_an_offloaded_weight_raises_by_name():
    model = build("llama")
    cpu_offload(model, execution_device="cpu")
    bridge = clearspan.boot(model)
    for name, part in (("blocks.1.hook_q_input", "blocks.1.attn.q"), ("blocks.1.ln1.hook_scale", "blocks.1.ln1")):
        with pytest.raises(UnreadableWeightError, match=f"the weight of {part} cannot be read"):
            bridge.run_with_hooks(torch.tensor([[1, 2, 3]]), fwd_hooks=[(name, lambda value, hook: value * 2)])


def test_a_quantised_weight_is_not_read_as_numbers():
    bridge = clearspan.boot(build("gpt2"))
    module = bridge.blocks[0].attn.o.module
    packed = torch.nn.Parameter(torch.ones(48, 48, dtype=torch.int8), requires_grad=False)
    module._parameters["weight"] = packed
    with pytest.raises(UnreadableWeightError, match=r"it is quantised, and held as torch\.int8"):
        _ = bridge.blocks[0].attn.W_O


@torch.no_grad()
def test_a_cache_is_saved_and_loaded_beside_an_offloaded_model(tmp_path):
    model, path = build("llama"), tmp_path / "run.safetensors"
    ids = torch.randint(1, 97, (2, 7))
    whole = clearspan.boot(model)
    _, expected = whole.run_with_cache(ids)
    kept = {name: expected[name] for name in ("blocks.1.attn.hook_pattern", "blocks.1.hook_resid_mid")}
    heads = expected.stack_head_results()
    expected.save(path)
    loaded = clearspan.ActivationCache.load(path, whole)
    cpu_offload(model, execution_device="cpu")
    bridge = clearspan.boot(model)
    _, own = bridge.run_with_cache(ids)
    own.save(tmp_path / "own.safetensors")
    for cache in (clearspan.ActivationCache.load(path, bridge), own, loaded,
                  clearspan.ActivationCache.load(tmp_path / "own.safetensors", bridge)):  # fmt: skip
        for name, value in kept.items():
            torch.testing.assert_close(cache[name], value, rtol=1e-5, atol=1e-5)
        for _ in range(2):
            with pytest.raises(UnreadableWeightError, match=r"the weight of blocks\.0\.attn\.o cannot be read"):
                cache.stack_head_results()
    fresh = clearspan.boot(build("llama"))
    assert torch.equal(clearspan.ActivationCache.load(path, fresh).stack_head_results(), heads)
