"""Attention whose z is multiplied by a gate before the output projection."""

import pytest
import torch
from tests.structures import GROUPED, RMS_NORM, assert_verified, bridged, levels, linears, norms, tiny, tokens

from clearspan.circuits import ComputationalGraph
from clearspan.components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    GatedMLPBridge,
    NormalizationBridge,
    UnembeddingBridge,
)
from clearspan.errors import HookValueError, InvalidArgumentError

SIZES = {**GROUPED, "head_dim": 16, "num_hidden_layers": 2}


def decoder(attention, block_norms, *, weight_offset=0.0):
    """Returns the mapping of a decoder with gated attention, without mixtures."""

    def mapping(cfg):
        def norm(name, **settings):
            return NormalizationBridge(name=name, weight_offset=weight_offset, **settings)

        maps = linears(q="q_proj", k="k_proj", v="v_proj", o="o_proj", **attention.get("maps", {}))
        heads = {
            "q_norm": norm("q_norm", axes="batch pos head d_head"),
            "k_norm": norm("k_norm", axes="batch pos kv_head d_head"),
        }
        settings = {key: value for key, value in attention.items() if key != "maps"}
        parts = {
            "attn": AttentionBridge(name="self_attn", has_rotary=True, submodules={**maps, **heads}, **settings),
            **{key: norm(name) for key, name in block_norms.items()},
            "mlp": GatedMLPBridge(name="mlp", submodules=linears(gate="gate_proj", in_="up_proj", out="down_proj")),
        }
        return {
            "embed": EmbeddingBridge(name="model.embed_tokens"),
            "blocks": BlockBridge(name="model.layers", submodules=parts),
            "ln_final": norm("model.norm"),
            "unembed": UnembeddingBridge(name="lm_head"),
        }

    return mapping


def afmoe():
    """Its gate has a map of its own."""
    sandwich = {
        "ln1": "input_layernorm",
        "ln1_post": "post_attention_layernorm",
        "ln2": "pre_mlp_layernorm",
        "ln2_post": "post_mlp_layernorm",
    }
    model = tiny(
        "Afmoe", **SIZES, num_dense_layers=2, num_experts=4, moe_intermediate_size=24, global_attn_every_n_layers=4
    )
    gate = {"gate_activation": "sigmoid", "maps": {"gate": "gate_proj"}}
    return bridged(model, decoder(gate, sandwich), config_values=RMS_NORM)


PRE = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}


def laguna():
    """Its gate is one number for each head, which is not bounded."""
    model = tiny(
        "Laguna", **SIZES, mlp_layer_types=["dense", "dense"], layer_types=["full_attention"] * 2, num_experts=4
    )
    gate = {"gate_activation": "softplus", "gate_is_of_head": True, "maps": {"gate": "g_proj"}}
    return bridged(model, decoder(gate, PRE), config_values=RMS_NORM)


def qwen3_next():
    """Its gate comes from the map of queries."""
    model = tiny("Qwen3Next", **SIZES, layer_types=["full_attention"] * 2, mlp_only_layers=[0, 1])
    gate = {"gate_activation": "sigmoid", "gate_in_queries": True}
    return bridged(model, decoder(gate, PRE, weight_offset=1.0), config_values=RMS_NORM)


def bitnet():
    """It has no gate, but norms z, and its MLP's hidden layer."""

    def mapping(cfg):
        maps = linears(q="q_proj", k="k_proj", v="v_proj", o="o_proj")
        o_norm = NormalizationBridge(name="attn_sub_norm", axes="batch pos width")
        mlp = linears(gate="gate_proj", in_="up_proj", out="down_proj")
        norm = NormalizationBridge(name="ffn_sub_norm", axes="batch pos width")
        parts = {
            **norms(ln1="input_layernorm"),
            "attn": AttentionBridge(name="self_attn", has_rotary=True, submodules={**maps, "o_norm": o_norm}),
            **norms(ln2="post_attention_layernorm"),
            "mlp": GatedMLPBridge(name="mlp", submodules={**mlp, "norm": norm}),
        }
        return {
            "embed": EmbeddingBridge(name="model.embed_tokens"),
            "blocks": BlockBridge(name="model.layers", submodules=parts),
            **norms(ln_final="model.norm"),
            "unembed": UnembeddingBridge(name="lm_head"),
        }

    return bridged(tiny("BitNet", **GROUPED), mapping, config_values=RMS_NORM)


KINDS = {"afmoe": afmoe, "laguna": laguna, "qwen3_next": qwen3_next}


@levels
@pytest.mark.parametrize("kind", [*KINDS, "bitnet"])
def test_all_of_verify(kind, level):
    assert_verified(bitnet() if kind == "bitnet" else KINDS[kind](), level)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_is_read_and_written_as_it_multiplies(kind):
    bridge = KINDS[kind]()
    ids = tokens(bridge.hf_model)
    read = []
    handle = bridge.hf_model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda _, given: read.append(given[0].clone())
    )
    _, cache = bridge.run_with_cache(ids)
    z, gate = cache["z", 1], cache["blocks.1.attn.hook_gate"]
    by = gate if gate.ndim == 4 else gate.unsqueeze(-1)
    assert torch.allclose((z * by).flatten(2), read[0], atol=1e-6)

    def ablate(value, hook):
        value[0, :, 1] = 0
        value[1] = 0.5

    with bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_gate", ablate)]):
        _, edited = bridge.run_with_cache(ids)
    handle.remove()
    before, gated = (one.unflatten(-1, (4, -1)) for one in read)
    expected = (z * by).clone()
    expected[0, :, 1] = 0
    expected[1] = z[1] * 0.5
    assert torch.allclose(gated, expected, atol=1e-5)
    # What was left alone keeps its numbers, and queries that share the map keep theirs.
    assert torch.equal(gated[0, :, 0], before[0, :, 0])
    assert torch.equal(edited["q", 1], cache["q", 1])


def test_a_gate_out_of_its_range_is_refused():
    bridge = afmoe()
    hooks = [("blocks.0.attn.hook_gate", lambda value, hook: value * 0 + 2)]
    with pytest.raises(HookValueError) as raised:
        bridge.run_with_hooks(tokens(bridge.hf_model), fwd_hooks=hooks)
    assert str(raised.value) == (
        "a gate is the result of sigmoid\n"
        "  expected: 0 to 1\n"
        "  got: 2 to 2\n"
        "  fix: write hook_z, or attn.o.hook_in, which take any value"
    )


def test_results_of_heads_are_those_after_the_gate():
    bridge = qwen3_next()
    _, cache = bridge.run_with_cache(tokens(bridge.hf_model))
    results = cache.stack_head_results(2)
    assert torch.allclose(results.sum(0), cache["attn_out", 0] + cache["attn_out", 1], atol=1e-4)
    assert bridge.W_Q.shape == (2, 4, 48, 16)
    with torch.no_grad():
        bridge.blocks[0].attn.W_Q[0] = 0
    new = bridge.hf_model.model.layers[0].self_attn.q_proj.weight
    assert not new[:16].any()
    assert new[16:32].any()


def test_circuits_and_processing_say_what_a_gate_rules_out():
    bridge = afmoe()
    with pytest.raises(InvalidArgumentError, match="a gate or norm lies between z and what heads write"):
        ComputationalGraph.of(bridge)
    steps = {step.name: step.done for step in bridge.processed(refactor_factored_attn_matrices=None).processing}
    assert steps["refactor_factored_attn_matrices"].startswith("left out: a gate multiplies each channel of z")
