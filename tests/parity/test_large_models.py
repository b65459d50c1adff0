"""Models that are too large to be run again and again are derived from a small model of their own class and config."""

import warnings

import pytest
import torch
import transformers

import clearspan
from clearspan import zoo
from clearspan.errors import DerivedWarning
from clearspan.hf.shrunk import is_large, shrunk
from clearspan.structure import derive, derive_from_small
from clearspan.structure.builders import is_alike

SAME = ["gpt2", "llama", "gemma2", "falcon", "mixtral", "gpt_neox", "opt", "olmo2", "helium", "phi3"]


def assert_same(found, wanted):
    assert found.parts.keys() == wanted.parts.keys()
    for name, part in wanted.parts.items():
        if name != "blocks":
            assert is_alike(found.parts[name], part), name
    for layer, (one, other) in enumerate(
        zip(found.parts["blocks"].templates, wanted.parts["blocks"].templates, strict=True)
    ):
        assert is_alike(one, other), layer
    assert found.sizes == wanted.sizes
    assert found.irrelevant == wanted.irrelevant


@pytest.mark.parametrize("model_type", SAME)
def test_a_small_model_has_the_structure_of_the_large_one(model_type):
    model = zoo.build(model_type)
    assert_same(derive_from_small(model), derive(model))


def test_boot_derives_a_model_that_is_large_from_a_small_one_and_checks_it(monkeypatch):
    monkeypatch.setattr("clearspan.hf.shrunk.LARGE", 1000)
    monkeypatch.setattr("clearspan.bridge.derive", None)  # it is not called
    with warnings.catch_warnings(action="ignore", category=DerivedWarning):
        bridge = clearspan.boot(zoo.build("helium"))
    last = bridge.adapter.source.report().splitlines()[-1]
    assert last.startswith("derived: on a random model of the same class with ")
    assert bridge.verify("quick").passed


def test_a_large_model_that_is_not_as_its_class_makes_it_is_derived_itself(monkeypatch):
    monkeypatch.setattr("clearspan.hf.shrunk.LARGE", 1000)
    model = zoo.build("helium")
    model.model.layers[1].mlp = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Tanh(), torch.nn.Linear(80, 64))
    with warnings.catch_warnings(action="ignore", category=DerivedWarning):
        bridge = clearspan.boot(model)
    assert "derived" not in [one.what for one in bridge.adapter.source.findings]
    assert [bridge.blocks[1].mlp.submodules[name].name for name in ("in", "out")] == ["0", "2"]


def test_models_with_few_bits_are_derived_from_a_small_one():
    assert not is_large(zoo.build("helium"))
    assert is_large(zoo.build("helium").to(torch.bfloat16))
    with warnings.catch_warnings(action="ignore", category=DerivedWarning):
        bridge = clearspan.boot(zoo.build("helium").to(torch.bfloat16))
    assert bridge.verify("quick").passed


def test_a_model_without_weights_is_derived_and_nothing_is_said_to_hold(monkeypatch):
    monkeypatch.setattr("clearspan.bridge._SAID", set())
    config = transformers.Ernie4_5Config()
    with torch.device("meta"):
        model = transformers.Ernie4_5ForCausalLM(config)
    with pytest.warns(DerivedWarning, match="and nothing was checked, since it has no weights") as said:
        bridge = clearspan.boot(model)
    assert len(said) == 1
    assert bridge.cfg.n_heads == config.num_attention_heads
    assert bridge.cfg.d_mlp == config.intermediate_size
    assert bridge.cfg.n_key_value_heads == config.num_key_value_heads


def test_ratios_stay():
    config = transformers.Qwen3MoeConfig(
        num_hidden_layers=3, num_experts=64, num_attention_heads=32, num_key_value_heads=4
    )
    with torch.device("meta"):
        small = shrunk(transformers.Qwen3MoeForCausalLM(config)).config
    assert small.num_hidden_layers == 3
    assert small.num_attention_heads // small.num_key_value_heads == 8
    assert small.num_key_value_heads > 1
    assert small.num_experts == 16
    assert small.num_experts_per_tok == config.num_experts_per_tok
    assert small.vocab_size == 1009


def test_a_class_that_takes_no_such_config_has_no_small_model(monkeypatch):
    def refuses(*_, **__):
        raise ValueError("not these sizes")

    model = zoo.build("helium")
    monkeypatch.setattr(type(model), "_from_config", refuses)
    assert shrunk(model) is None
    assert derive_from_small(model) is None
