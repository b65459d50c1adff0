"""Quantised models: points read and write as always, weights are dequantised on reading, and refuse writes."""

import pytest
import torch
from tests.zoo import build
from torch import nn

import clearspan
from clearspan.errors import UnreadableWeightError, UnwritableError

# Both libraries say at import what they cannot use on this machine.
pytestmark = pytest.mark.filterwarnings("ignore")


def by_torchao(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # noqa: PLC0415 (it takes long, and warns)

    quantize_(
        model, Int8WeightOnlyConfig(), filter_fn=lambda part, path: isinstance(part, nn.Linear) and "lm_" not in path
    )


def by_bitsandbytes(kind):
    def quantise(model):
        import bitsandbytes  # noqa: PLC0415 (the same)

        for path, part in list(model.named_modules()):
            if isinstance(part, nn.Linear) and "lm_head" not in path:
                has_bias = part.bias is not None
                if kind == 4:
                    new = bitsandbytes.nn.Linear4bit(part.in_features, part.out_features, has_bias, quant_type="nf4")
                else:
                    new = bitsandbytes.nn.Linear8bitLt(
                        part.in_features, part.out_features, has_bias, has_fp16_weights=False
                    )
                new.load_state_dict(part.state_dict())
                model.set_submodule(path, new.to("cpu"))

    return quantise


@pytest.fixture(
    params=[by_torchao, by_bitsandbytes(4), by_bitsandbytes(8)], ids=["torchao int8", "bnb 4 bit", "bnb 8 bit"]
)
def quantise(request):
    return request.param


@pytest.mark.parametrize("variant", ["llama", "gpt_bigcode", "qwen2"])
def test_weights_are_dequantised_and_give_what_the_model_computes(variant, quantise):
    model = build(variant)
    quantise(model)
    bridge = clearspan.boot(model)
    ids = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
        read = cache["blocks.1.ln1.hook_out"]
        for name, letter in (("q", "Q"), ("k", "K"), ("v", "V")):
            attn = bridge.blocks[1].attn
            projected = torch.einsum("bpm,hmd->bphd", read, getattr(attn, f"W_{letter}").to(read))
            if attn.has_bias(name):
                projected += getattr(attn, f"b_{letter}")
            # bitsandbytes' 8 bit rounds the activations to 8 bit too.
            error = (projected - cache[name, 1]).abs().max() / cache[name, 1].abs().max()
            assert error < 2e-2, name
        assert bridge.W_Q.shape == (3, *bridge.blocks[0].attn.W_Q.shape)
        assert bridge.QK.shape[:2] == (3, 4)


def test_a_write_is_refused(quantise):
    model = build("llama")
    quantise(model)
    bridge = clearspan.boot(model)
    for write in (
        lambda: bridge.W_O.__setitem__(0, 0),
        lambda: bridge.blocks[0].attn.W_O[1].zero_(),
        lambda: setattr(bridge.blocks[0].attn, "W_K", torch.zeros(2, 48, 12)),
    ):
        with torch.no_grad(), pytest.raises(UnwritableError, match="quantised, and what was read is a copy"):
            write()


def test_it_is_neither_processed_nor_ablated(quantise):
    model = build("llama")
    quantise(model)
    bridge = clearspan.boot(model)
    for change in (bridge.processed, lambda: bridge.orthogonalized(torch.ones(48))):
        with pytest.raises(UnreadableWeightError, match="a quantised model cannot be processed"):
            change()


def test_points_read_and_write_as_always(quantise):
    model = build("llama")
    quantise(model)
    bridge = clearspan.boot(model)
    ids = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids)
        assert torch.equal(logits, model(ids).logits)
        torch.testing.assert_close(
            cache["resid_pre", 1] + cache["attn_out", 1], cache["resid_mid", 1], rtol=1e-5, atol=1e-5
        )
        moved = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda value, hook: value * 0)])
    assert not torch.allclose(moved, logits)


@pytest.mark.parametrize("variant", ["llama", "gpt_bigcode", "qwen2"])
def test_verification_knows_how_exact_quantised_maps_are(variant):
    model = build(variant)
    by_bitsandbytes(8)(model)
    found = clearspan.boot(model).verify()
    assert found.passed, str(found)


@torch.no_grad()
def test_a_run_is_taken_apart_and_saved(quantise, tmp_path):
    model = build("llama")
    quantise(model)
    bridge = clearspan.boot(model)
    ids = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(0))
    logits, cache = bridge.run_with_cache(ids)
    parts = cache.get_full_resid_decomposition()
    found = cache.logit_attrs(parts, 5).sum(0) + cache.logit_constant(5)
    # bitsandbytes' 8 bit rounds the activations to 8 bit too.
    assert (found - logits[..., 5]).abs().max() < 3e-2 * logits.abs().max()
    cache.save(tmp_path / "run.safetensors")
    loaded = clearspan.ActivationCache.load(tmp_path / "run.safetensors", bridge)
    torch.testing.assert_close(loaded.get_full_resid_decomposition(), parts)
