"""Sinks whose share is taken from the product of pattern and values."""

import pytest
import torch
from tests.structures import GROUPED, RMS_NORM, assert_verified, bridged, levels, linears, norms, tiny, tokens

from clearspan.components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    ExpertsBridge,
    GatedMLPBridge,
    MoEBridge,
    RouterBridge,
    UnembeddingBridge,
)

SIZES = {**GROUPED, "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6}


def decoder(mlp):
    def mapping(cfg):
        attention = AttentionBridge(
            name="self_attn",
            has_rotary=True,
            has_sinks=True,
            sink_scales_z=True,
            submodules=linears(q="q_proj", k="k_proj", v="v_proj", o="o_proj"),
        )
        parts = {"attn": attention, **norms(ln1="input_layernorm", ln2="post_attention_layernorm"), "mlp": mlp}
        return {
            "embed": EmbeddingBridge(name="model.embed_tokens"),
            "blocks": BlockBridge(name="model.layers", submodules=parts),
            **norms(ln_final="model.norm"),
            "unembed": UnembeddingBridge(name="lm_head"),
        }

    return mapping


def dense():
    mlp = GatedMLPBridge(name="mlp", submodules=linears(gate="gate_proj", in_="up_proj", out="down_proj"))
    return bridged(tiny("GraniteSWA", **SIZES, attention_multiplier=0.3), decoder(mlp), config_values=RMS_NORM)


def mixture():
    parts = {"router": RouterBridge(name="router"), "experts": ExpertsBridge(name="experts")}
    model = tiny("GraniteMoeSWA", **SIZES, num_local_experts=4, num_experts_per_tok=2, attention_multiplier=0.3)
    name = "block_sparse_moe" if "block_sparse_moe" in dict(model.model.layers[0].named_children()) else "mlp"
    return bridged(model, decoder(MoEBridge(name=name, submodules=parts)), config_values=RMS_NORM)


KINDS = {"dense": dense, "mixture": mixture}


@levels
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_verify(kind, level):
    assert_verified(KINDS[kind](), level)


def test_a_pattern_is_what_multiplies_values_and_a_sink_scales_what_comes_of_it():
    bridge = dense()
    ids = tokens(bridge.hf_model)
    _, cache = bridge.run_with_cache(ids)
    pattern, v, z = cache["pattern", 0], cache["v", 0], cache["z", 0]
    assert torch.allclose(pattern.sum(-1), torch.ones(2, 4, 9))
    product = torch.einsum("bhqk,bkhd->bqhd", pattern, v.repeat_interleave(2, 2))
    scores = cache["attn_scores", 0]
    sinks = bridge.blocks[0].attn.module.sinks
    share = (scores.logsumexp(-1) - sinks[None, :, None]).sigmoid()
    assert torch.allclose(product * share.transpose(1, 2)[..., None], z, atol=1e-5)
