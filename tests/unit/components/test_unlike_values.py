"""Values of another width than queries, scaled, of a number of heads that differs between layers (MiMo)."""

import pytest
import torch
from tests.structures import GROUPED, RMS_NORM, assert_verified, bridged, levels, linears, norms, tiny, tokens

from clearspan.components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    GatedMLPBridge,
    PerLayer,
    UnembeddingBridge,
)


def mimo(kinds):
    def mapping(cfg):
        def attention(kind):
            slides = kind == "sliding_attention"
            return AttentionBridge(
                name="self_attn",
                has_rotary=True,
                has_sinks=slides,
                d_head_v=10,
                value_scale=0.707,
                kv_heads=cfg.hf["num_key_value_heads"] * 2 if slides else cfg.hf["num_key_value_heads"],
                submodules=linears(q="q_proj", k="k_proj", v="v_proj", o="o_proj"),
            )

        mlp = GatedMLPBridge(name="mlp", submodules=linears(gate="gate_proj", in_="up_proj", out="down_proj"))
        parts = {
            "attn": PerLayer([attention(kind) for kind in kinds]),
            **norms(ln1="input_layernorm", ln2="post_attention_layernorm"),
            "mlp": mlp,
        }
        return {
            "embed": EmbeddingBridge(name="model.embed_tokens"),
            "blocks": BlockBridge(name="model.layers", submodules=parts),
            **norms(ln_final="model.norm"),
            "unembed": UnembeddingBridge(name="lm_head"),
        }

    layers = len(kinds)
    sizes = {**GROUPED, "num_hidden_layers": layers, "head_dim": 16, "v_head_dim": 10, "sliding_window": 6}
    rope = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
    model = tiny(
        "MiMoV2Flash",
        **sizes,
        layer_types=kinds,
        mlp_layer_types=["dense"] * layers,
        rope_parameters=rope,
        n_routed_experts=4,
    )
    return bridged(model, mapping, config_values=RMS_NORM)


@levels
@pytest.mark.parametrize("kinds", [["full_attention"] * 2, ["full_attention", "sliding_attention"]])
def test_all_of_verify(kinds, level):
    assert_verified(mimo(kinds), level)


def test_axes_and_weights_are_those_of_the_layer():
    bridge = mimo(["full_attention", "sliding_attention"])
    _, cache = bridge.run_with_cache(tokens(bridge.hf_model))
    assert cache["v", 0].shape == (2, 9, 2, 10)
    assert cache["v", 1].shape == (2, 9, 4, 10)
    assert cache["z", 1].shape == (2, 9, 4, 10)
    assert bridge.hook_dict["blocks.1.attn.hook_v"].axes == ("batch", "pos", "kv_head", "d_head_v")
    assert bridge.blocks[1].attn.W_V.shape == (4, 48, 10)
    assert bridge.blocks[1].attn.W_O.shape == (4, 10, 48)
    expected = torch.einsum("bhqk,bkhd->bqhd", cache["pattern", 1], cache["v", 1]) * 0.707
    assert torch.allclose(cache["z", 1], expected, atol=1e-5)
