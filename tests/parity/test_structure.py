"""Each adapter that is written by hand, hidden in turn: what is derived in its place is the same, point by point."""

import pickle
import warnings

import pytest
import torch
from tests.unit.architectures.own_model import (
    OwnArchitectureAdapter,
    OwnConfig,
    OwnForCausalLM,
    SquashedForCausalLM,
)
from tests.zoo import MODELS, build
from transformers import HeliumConfig, HeliumForCausalLM

import clearspan
from clearspan.errors import AbsentPointError, ClearspanError, DerivedWarning, UnsupportedArchitectureError
from clearspan.structure import derive

HEADS = [f"{kind}_{letter}" for kind in "Wb" for letter in "QKVO"]
WEIGHTS = ("W_E", "W_U", "W_pos", "W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out", *HEADS)
SIZES = (
    "d_model",
    "n_heads",
    "d_head",
    "n_layers",
    "n_ctx",
    "d_vocab",
    "d_mlp",
    "act_fn",
    "eps",
    "n_key_value_heads",
    "normalization_type",
    "positional_embedding_type",
    "final_rms",
    "gated_mlp",
    "uses_rms_norm",
    "has_table",
)


def both(variant):
    """Returns a model's bridge by the adapter that is written, and by the one that is derived."""
    model = build(variant)
    return clearspan.boot(model), clearspan.boot(model, adapter=derive(model))


def weight(bridge, name):
    try:
        return torch.as_tensor(getattr(bridge, name))
    except ClearspanError as error:
        return type(error).__name__


QUICK = ("gpt_bigcode", "gemma2", "opt post-norm", "bloom", "falcon grouped", "gpt_oss", "granite", "deepseek_v3")


@pytest.mark.parametrize(
    "variant", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in MODELS]
)
def test_what_is_derived_is_what_is_written(variant):
    written, derived = both(variant)
    assert set(derived.index.by_name) == set(written.index.by_name)
    for name, point in written.index.by_name.items():
        other = derived.index.by_name[name]
        assert (other.place, type(other.access), other.aliases) == (point.place, type(point.access), point.aliases)
    tokens = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (_, expected), (_, found) = (bridge.run_with_cache(tokens) for bridge in (written, derived))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    for name in WEIGHTS:
        one, other = weight(derived, name), weight(written, name)
        assert one == other if isinstance(one, str) else torch.equal(one, other), name
    for name in SIZES:
        assert getattr(derived.cfg, name) == getattr(written.cfg, name), name
    assert derived.cfg.logit_scale == pytest.approx(written.cfg.logit_scale, rel=1e-6)
    assert derived.cfg.output_logits_soft_cap == written.cfg.output_logits_soft_cap


def test_the_model_is_left_as_it_was():
    model = build("mixtral").train()
    model.lm_head.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    derive(model)
    assert model.training
    assert not model.lm_head.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_structure_is_pickled_and_processed_with_its_bridge():
    model = build("granite")
    bridge = clearspan.boot(model, adapter=derive(model))
    again = pickle.loads(pickle.dumps(bridge))
    tokens = torch.randint(1, 90, (2, 9))
    assert torch.equal(again(tokens), bridge(tokens))
    processed = bridge.processed(fold_ln=True)
    assert torch.allclose(processed(tokens).log_softmax(-1), bridge(tokens).log_softmax(-1), atol=1e-4)


def test_boot_derives_and_says_so_once(monkeypatch):
    monkeypatch.setattr("clearspan.bridge._SAID", set())  # other tests may have booted this class
    config = HeliumConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12
    )
    model = HeliumForCausalLM(config)
    with pytest.warns(DerivedWarning) as said:
        bridge = clearspan.boot(model)
    assert str(said[0].message) == (
        "no adapter is written for HeliumForCausalLM: its structure was derived from a traced forward, and the "
        "identities between its points hold. bridge.adapter.source.report() says what was found and how; "
        "bridge.verify() checks the rest"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clearspan.boot(model)
    assert bridge.adapter.source.report().splitlines()[:3] == [
        "hook_embed: model.embed_tokens is the stream that enters the blocks",
        "ln_final: model.norm norms the stream that leaves the blocks",
        "hook_logits: lm_head gives them",
    ]
    assert bridge.verify(level="quick").passed


def test_a_model_whose_blocks_are_no_sums_is_refused():
    model = SquashedForCausalLM(OwnConfig()).eval()
    with pytest.raises(UnsupportedArchitectureError) as error:
        clearspan.boot(model)
    what, *facts = str(error.value).splitlines()
    assert what == "no adapter for SquashedForCausalLM, and its structure was not found"
    assert facts[1].startswith("  reason: ")
    assert facts[2] == (
        "  fix: boot(model, partial=True) for what was found; or boot(model, adapter=...) with an adapter of your own: "
        "CONTRIBUTING.md shows how, step by step"
    )


def test_a_model_with_code_of_its_own_is_derived():
    model = OwnForCausalLM(OwnConfig()).eval()
    bridge = clearspan.boot(model, adapter=derive(model))
    failed = {check.what for check in bridge.verify(level="quick").checks if not check.passed}
    assert failed <= {"a short generation"}  # transformers cannot generate with this config
    written = clearspan.boot(model, adapter=OwnArchitectureAdapter)
    assert set(bridge.index.by_name) == set(written.index.by_name)


def test_a_part_of_a_structure_is_enough_where_it_is_asked_for():
    model = SquashedForCausalLM(OwnConfig()).eval()
    with pytest.raises(UnsupportedArchitectureError, match=r"what stack\.1 adds to the residual stream"):
        clearspan.boot(model)
    with pytest.warns(DerivedWarning):
        bridge = clearspan.boot(model, partial=True)
    assert bridge.layer_types() == ["attn, mlp", "unknown"]
    tokens = torch.randint(3, 90, (2, 7))
    logits, cache = bridge.run_with_cache(tokens)
    assert torch.equal(logits, model(tokens).logits)
    seen = []
    handle = model.stack[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(tokens)
    handle.remove()
    assert torch.equal(cache["resid_pre", 1], seen[0])
    assert cache["q", 0].shape == (2, 7, 4, 12)
    moved = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_post", lambda value, hook: value + 1)])
    assert not torch.allclose(moved, logits)
    assert bridge.why_absent("blocks.1.attn.hook_q").startswith("the structure of the block was not found: ")
    with pytest.raises(AbsentPointError, match="SquashedForCausalLM has no hook point"):
        bridge.run_with_cache(tokens, "blocks.1.attn.hook_q")
