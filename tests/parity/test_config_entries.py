"""Every entry of a config that is read here is the one that the model's own code reads."""

import pytest
import torch
from tests.zoo import MODELS, build

import clearspan
from clearspan.architectures import adapter_class
from clearspan.architectures.adapter import SIZES

OTHER = {
    "max_position_embeddings": 41,
    "max_seq_len": 42,
    "seq_length": 43,
    "head_dim": 14,
    "intermediate_size": 56,
    "n_inner": 58,
    "ffn_dim": 60,
    "ffn_hidden_size": 62,
    "hidden_act": "tanh",
    "activation_function": "tanh",
    "hidden_activation": "tanh",
    "activation": "tanh",
    "num_key_value_heads": 1,
    "rms_norm_eps": 0.1,
    "layer_norm_eps": 0.2,
    "layer_norm_epsilon": 0.3,
    "norm_eps": 0.4,
    "norm_epsilon": 0.5,
}
"""For each entry that a family of models may read, a value that no variant has."""


def sizes(model):
    """Returns the fields of `cfg` without the config itself."""
    return {**vars(clearspan.boot(model).cfg), "hf": None}


@pytest.mark.parametrize("variant", MODELS)
def test_entries_that_the_models_code_does_not_read_change_nothing(variant):
    model = build(variant)
    before = sizes(model)
    family = adapter_class(type(model).__name__)
    read = {model.config.attribute_map.get(name, name) for names in family.sizes.values() for name in names}
    assert {name for names in SIZES.values() for name in names} == set(OTHER)
    for name, other in OTHER.items():
        stored = model.config.attribute_map.get(name, name)
        if stored not in read and not isinstance(vars(type(model.config)).get(stored), property):
            setattr(model.config, stored, other)
    assert sizes(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in MODELS if " " not in name])  # one of most families
def test_a_model_built_with_any_entry_set_is_read_as_it_is_built(variant):
    """Where its own code takes the entry: with some it is not built, or does not run."""
    plain, ids = build(variant), torch.arange(1, 8)[None]
    with torch.no_grad():
        before = plain(ids, use_cache=False).logits
    for name, other in OTHER.items():
        stored = plain.config.attribute_map.get(name, name)
        try:
            model = build(variant, **{stored: other})
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits
        except (AttributeError, RuntimeError, TypeError, ValueError):
            continue
        bridge = clearspan.boot(model)
        assert torch.equal(bridge(ids).detach(), logits)
        if not torch.equal(logits, before):  # else its code did not read the entry: see the test above
            assert bridge.verify().passed, (name, str(bridge.verify()))


@pytest.mark.parametrize("said", [1, 2, 4, None])
@pytest.mark.parametrize("multi_query", [True, False])
def test_gpt_bigcode_obeys_multi_query_alone(multi_query, said):
    model = build("gpt_bigcode", multi_query=multi_query)
    model.config.num_key_value_heads = said
    bridge = clearspan.boot(model)
    heads = 1 if multi_query else bridge.cfg.n_heads
    assert bridge.cfg.n_key_value_heads == heads
    assert bridge.W_K.shape[1] == heads
    assert bridge.verify().passed


FALCONS = [
    {"new_decoder_architecture": new, "parallel_attn": parallel, "multi_query": multi, "num_kv_heads": kv, **norms}
    for new in (True, False)
    for parallel in (True, False)
    for multi in (True, False)
    for kv in (1, 2, 4)
    for norms in ({}, {"num_ln_in_parallel_attn": 1}, {"num_ln_in_parallel_attn": 2})
]


def runs(model):
    """Whether the model's own code runs with its config."""
    try:
        with torch.no_grad():
            model(torch.arange(1, 8)[None], use_cache=False)
    except (AttributeError, NameError, RuntimeError):
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("alibi", [True, False])
def test_every_falcon_that_runs_is_read_as_it_is_built(alibi):
    models = [(given, build("falcon", alibi=alibi, **given)) for given in FALCONS]
    running = [(given, model) for given, model in models if runs(model)]
    assert len(running) >= 20
    for given, model in running:
        assert clearspan.boot(model).verify().passed, given


@pytest.mark.parametrize(
    ("variant", "entries"),
    [
        ("cohere2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
        ("llama", {"num_key_value_heads": None}),
        ("llama", {"head_dim": 20}),
        ("phi3", {"head_dim": 16, "num_key_value_heads": 1}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("gemma2", {"hidden_act": "tanh", "hidden_activation": "gelu"}),
        ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 4, "mlp_only_layers": [0, 2]}),
        ("deepseek_v3", {"first_k_dense_replace": 0}),
        ("opt", {"_remove_final_layer_norm": True}),
        ("opt", {"layer_norm_elementwise_affine": False, "enable_bias": False}),
        ("mpt", {"expansion_ratio": 2}),
        ("granite", {"residual_multiplier": 1.0, "logits_scaling": 1.0}),
    ],
)
def test_configs_whose_entries_disagree(variant, entries):
    bridge = clearspan.boot(build(variant, **entries))
    found = bridge.verify()
    assert found.passed, str(found)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", ["gpt2", "llama", "gemma2", "opt"])
def test_ties_are_those_of_the_parameters_and_not_of_the_config(variant, tied):
    model = build(variant, tie_word_embeddings=tied)
    model.config.tie_word_embeddings = not tied
    bridge = clearspan.boot(model)
    ids = torch.arange(1, 8)[None]
    with torch.no_grad():
        logits = bridge(ids).log_softmax(-1)
        done = bridge.processed(fold_ln=True)
        torch.testing.assert_close(done(ids).log_softmax(-1), logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(bridge(ids).log_softmax(-1), logits)
