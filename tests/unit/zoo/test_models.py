import pytest
import torch
from transformers.integrations import hub_kernels
from transformers.utils import logging

from clearspan import zoo
from clearspan.errors import InvalidArgumentError, UnbuildableError
from clearspan.zoo import models

SAMPLE = ("bart", "bamba", "deepseek_v4", "gemma3", "gemma4_text", "glm_moe_dsa", "lfm2", "nemotron_h", "roberta")


def tokens(model):
    config = model.config.get_text_config()
    return torch.randint(3, config.vocab_size, (2, 14), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_model_is_tiny_and_runs(model_type):
    model = zoo.build(model_type)
    assert type(model).__name__ == models.class_name(model_type)
    assert not model.training
    assert model.num_parameters() <= models.MOST_PARAMETERS
    with torch.no_grad():
        logits = model(tokens(model), use_cache=False).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.05


@pytest.mark.parametrize(
    ("model_type", "entry", "kinds"),
    [
        ("bailing_hybrid", "layer_types", {"linear_attention", "full_attention"}),
        ("bailing_hybrid", "mlp_layer_types", {"dense", "sparse"}),
        ("bamba", "layer_types", {"linear_attention", "full_attention"}),
        (
            "deepseek_v4",
            "layer_types",
            {"sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"},
        ),
        ("deepseek_v4", "mlp_layer_types", {"hash_moe", "moe"}),
        ("gemma3", "layer_types", {"sliding_attention", "full_attention"}),
        ("gemma4_text", "kv_sharing_modes", {"store", "reuse"}),
        ("glm_moe_dsa", "indexer_types", {"full", "shared"}),
        ("gpt_neo", "attention_layers", {"global", "local"}),
        ("granitemoehybrid", "layer_types", {"linear_attention", "full_attention"}),
        ("jamba", "layers_num_experts", {1, 4}),
        ("lfm2", "layer_types", {"conv", "full_attention"}),
        ("llama4_text", "layer_types", {"chunked_attention", "full_attention"}),
        ("minimax_m3_vl_text", "layer_types", {"minimax_m3_sparse", "full_attention"}),
        ("nemotron_h", "layers_block_type", {"linear_attention", "full_attention", "moe", "mlp"}),
        ("reformer", "attn_layers", {"local", "lsh"}),
        ("smollm3", "no_rope_layers", {0, 1}),
        ("zaya", "layer_types", {"hybrid", "hybrid_sliding"}),
    ],
)
def test_layers_are_of_each_kind(model_type, entry, kinds):
    assert set(getattr(zoo.build(model_type).config.get_text_config(), entry)) == kinds


def test_a_seed_gives_the_same_model():
    first, again, other = (zoo.build("deepseek_v4", seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not any(torch.equal(value, other[name]) for name, value in first.items())


def test_what_a_checkpoint_keeps_in_buffers_is_drawn():
    buffers = dict(zoo.build("deepseek_v4").named_buffers())
    experts = buffers["model.layers.0.mlp.gate.tid2eid"]
    assert experts.min() == 0
    assert experts.max() == 7
    assert all(len(set(row)) == len(row) for row in experts.tolist())
    assert buffers["model.layers.1.mlp.gate.e_score_correction_bias"].std() > 0
    assert (zoo.build("gemma4_text").model.layers[0].layer_scalar != 1).all()


def test_building_leaves_the_process_as_it_was():
    state = torch.get_rng_state(), logging.get_verbosity(), hub_kernels._kernels_enabled
    zoo.build("mamba")
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (logging.get_verbosity(), hub_kernels._kernels_enabled) == state[1:]


def test_an_unknown_model_type():
    with pytest.raises(InvalidArgumentError) as raised:
        zoo.build("lama")
    assert str(raised.value) == (
        "unknown model type 'lama'\n"
        "  expected: a model type that transformers maps to a causal language model: clearspan.zoo.types()\n"
        "  nearest: llama, mllama, llama4"
    )


def test_model_types_that_have_no_tiny_model(monkeypatch):
    with pytest.raises(UnbuildableError) as raised:
        zoo.build("gemma4_assistant")
    assert str(raised.value) == (
        "no tiny gemma4_assistant can be built\n"
        "  reason: its forward takes the states, the keys and the values of another model, and no token ids"
    )
    monkeypatch.setattr(models, "REQUIRED", {"gpt2": ("no_such_package", "torch", "nor_this")})
    with pytest.raises(UnbuildableError) as raised:
        zoo.build("gpt2")
    assert str(raised.value) == (
        "no tiny gpt2 can be built\n  reason: it needs packages that are not installed: no_such_package, nor_this"
    )


def test_a_recipe_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(models, "MOST_PARAMETERS", 1000)
    with pytest.raises(UnbuildableError) as raised:
        zoo.build("gpt2")
    assert str(raised.value) == (
        "no tiny gpt2 can be built\n"
        "  expected: at most 1,000 parameters\n"
        "  got: 64,992\n"
        "  reason: its config has sizes of its own\n"
        "  fix: add them to the model type's recipe in clearspan/zoo/recipes.py"
    )
    monkeypatch.setattr(models, "OWN", {"llama": {"num_attention_heads": 3}})
    with pytest.raises(UnbuildableError) as raised:
        zoo.build("llama")
    assert str(raised.value) == (
        "no tiny llama can be built\n"
        "  reason: StrictDataclassClassValidationError: Class validation error for validator 'validate_architecture': "
        "ValueError: The hidden size (64) is not a multiple of the number of attention heads (3)."
    )
