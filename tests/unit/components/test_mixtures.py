"""Mixtures of experts of other kinds than Mixtral's: the same points, or a reason."""

import pytest
import torch
from tests.structures import (
    GROUPED,
    LAYER_NORM,
    RMS_NORM,
    assert_verified,
    bridged,
    levels,
    linears,
    norms,
    tiny,
    tokens,
)

from clearspan.components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    ExpertsBridge,
    GatedMLPBridge,
    JointQKVAttentionBridge,
    MoEBridge,
    NormalizationBridge,
    PerLayer,
    RouterBridge,
    UnembeddingBridge,
)
from clearspan.conversions import BlockedQKVConversionRule
from clearspan.points import Layout

SIZES = {
    **GROUPED,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
MLP = {"gate": "gate_proj", "in_": "up_proj", "out": "down_proj"}
PRE = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}


def shared(name, **settings):
    maps = linears(Layout.FLAT, **MLP)
    for key, value in settings.items():
        setattr(maps["out"], key, value)
    return GatedMLPBridge(name=name, layout=Layout.FLAT, submodules=maps, **settings)


def decoder(mixture, *, qk=(), has_rotary=True, final="model.norm", heads=()):
    def mapping(cfg):
        maps = linears(q="q_proj", k="k_proj", v="v_proj", o="o_proj")
        attention = AttentionBridge(
            name="self_attn", has_rotary=has_rotary, submodules={**maps, **dict(qk)}, **dict(heads)
        )
        parts = {"attn": attention, **norms(**PRE), "mlp": mixture}
        return {
            "embed": EmbeddingBridge(name="model.embed_tokens"),
            "blocks": BlockBridge(name="model.layers", submodules=parts),
            **norms(ln_final=final),
            "unembed": UnembeddingBridge(name="lm_head"),
        }

    return mapping


def qwen2_moe():
    """A shared expert, times the sigmoid of a gate."""
    parts = {
        "router": RouterBridge(name="gate"),
        "experts": ExpertsBridge(name="experts"),
        "shared": shared("shared_expert"),
        **linears(Layout.FLAT, shared_gate="shared_expert_gate"),
    }
    settings = {key: value for key, value in SIZES.items() if key != "head_dim"}
    model = tiny("Qwen2Moe", **settings, shared_expert_intermediate_size=40, decoder_sparse_step=1)
    return bridged(model, decoder(MoEBridge(name="mlp", submodules=parts)), config_values=RMS_NORM)


def hunyuan():
    """A router whose logits come from a linear map in it, and a shared expert; norms after the rotation."""
    parts = {
        "router": RouterBridge(name="gate", logits="wg"),
        "experts": ExpertsBridge(name="experts"),
        "shared": GatedMLPBridge(name="shared_mlp", submodules=linears(**MLP)),
    }
    heads = {
        "q_norm": NormalizationBridge(name="query_layernorm", axes="batch pos head d_head", layout=Layout.HEADS_FIRST),
        "k_norm": NormalizationBridge(name="key_layernorm", axes="batch pos kv_head d_head", layout=Layout.HEADS_FIRST),
    }
    mixture = MoEBridge(name="mlp", submodules=parts)
    mapping = decoder(mixture, qk=heads.items(), heads=[("norms_rotated", True)])
    return bridged(tiny("HunYuanMoEV1", **{**SIZES, "moe_topk": [2, 2]}), mapping, config_values=RMS_NORM)


def phimoe():
    """A router that drops experts whose logits are far from the best."""
    parts = {
        "router": RouterBridge(name="router"),
        "experts": ExpertsBridge(name="experts"),
    }
    settings = {key: value for key, value in SIZES.items() if key != "head_dim"}
    model = tiny("Phimoe", **settings, attention_bias=False, router_jitter_noise=0.5)  # so that several count
    return bridged(model, decoder(MoEBridge(name="mlp", submodules=parts)), config_values=LAYER_NORM)


def dbrx():
    """A block of code chooses experts: weights and indices are arguments of the experts."""

    def mapping(cfg):
        cfg.d_model, cfg.n_heads, cfg.n_layers, cfg.d_head = 48, 4, 2, 12
        rule = BlockedQKVConversionRule(4, 12, 2)
        mixture = MoEBridge(
            name="ffn",
            submodules={
                "router": RouterBridge(
                    name="router", logits="layer", weights="top_k_weights", indices="top_k_index", k=2
                ),
                "experts": ExpertsBridge(
                    name="experts",
                    layout=Layout.TOKENS,
                    reading=("mlp.w1", "mlp.v1"),
                    adding="mlp.w2",
                    adding_is_transposed=True,
                ),
            },
        )
        parts = {
            **norms(ln1="norm_attn_norm.norm_1"),
            "attn": JointQKVAttentionBridge(
                name="norm_attn_norm.attn",
                has_rotary=True,
                qkv_conversion_rule=rule,
                submodules=linears(qkv="Wqkv", o="out_proj"),
            ),
            **norms(ln2="norm_attn_norm.norm_2"),
            "mlp": mixture,
        }
        return {
            "embed": EmbeddingBridge(name="transformer.wte"),
            "blocks": BlockBridge(name="transformer.blocks", submodules=parts),
            **norms(ln_final="transformer.norm_f"),
            "unembed": UnembeddingBridge(name="lm_head"),
        }

    model = tiny(
        "Dbrx",
        d_model=48,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=97,
        attn_config={"kv_n_heads": 2, "clip_qkv": 1e4, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    )
    return bridged(
        model,
        mapping,
        config_values={**LAYER_NORM, "n_key_value_heads": 2},
        uses_combined_qkv=True,
        sizes={"n_key_value_heads": ()},
    )


def llama4():
    """All experts run on all tokens; the shared expert's output is written into; one norm serves queries and keys."""

    def mapping(cfg):
        def attention(layer):
            rotates = bool(cfg.hf["no_rope_layers"][layer])
            heads = {
                key: NormalizationBridge(name="qk_norm", axes=f"batch pos {axis} d_head", call=call)
                for call, (key, axis) in enumerate((("q_norm", "head"), ("k_norm", "kv_head")))
            }
            maps = linears(q="q_proj", k="k_proj", v="v_proj", o="o_proj")
            return AttentionBridge(
                name="self_attn",
                has_rotary=rotates,
                norms_rotated=rotates,
                submodules={**maps, **(heads if rotates else {})},
            )

        parts = {
            "router": RouterBridge(name="router"),
            "experts": ExpertsBridge(name="experts", is_transposed=True, has_ends=False),
            "shared": shared("shared_expert", output_is_overwritten=True),
        }
        block = {
            **norms(ln1="input_layernorm"),
            "attn": PerLayer([attention(layer) for layer in range(2)]),
            **norms(ln2="post_attention_layernorm"),
            "mlp": MoEBridge(name="feed_forward", runs_all=True, layout=Layout.FLAT, submodules=parts),
        }
        return {
            "embed": EmbeddingBridge(name="model.embed_tokens"),
            "blocks": BlockBridge(name="model.layers", submodules=block),
            **norms(ln_final="model.norm"),
            "unembed": UnembeddingBridge(name="lm_head"),
        }

    settings = {**SIZES, "intermediate_size": 24, "intermediate_size_mlp": 80, "interleave_moe_layer_step": 1}
    model = tiny("Llama4Text", "Llama4ForCausalLM", **settings, no_rope_layers=[1, 0], attn_temperature_tuning=False)
    return bridged(model, mapping, config_values=RMS_NORM)


KINDS = {"qwen2_moe": qwen2_moe, "hunyuan": hunyuan, "phimoe": phimoe, "dbrx": dbrx, "llama4": llama4}


@levels
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_verify(kind, level):
    assert_verified(KINDS[kind](), level)


def test_what_a_block_of_code_chooses_is_read_and_written_as_arguments_of_the_experts():
    bridge = dbrx()
    ids = tokens(bridge.hf_model)
    given = []
    experts = bridge.hf_model.transformer.blocks[1].ffn.experts
    handle = experts.register_forward_pre_hook(lambda _, args: given.append(args[1:]))
    _, cache = bridge.run_with_cache(ids)
    weights, indices = cache["blocks.1.mlp.hook_expert_weights"], cache["blocks.1.mlp.hook_expert_indices"]
    assert torch.equal(indices.flatten(0, 1), given[0][0])
    assert torch.equal(weights.flatten(0, 1), given[0][1])
    hooks = [
        ("blocks.1.mlp.hook_expert_indices", lambda value, hook: value * 0 + torch.tensor([3, 1])),
        ("blocks.1.mlp.hook_expert_weights", lambda value, hook: value * 0.5),
    ]
    with bridge.hooks(fwd_hooks=hooks):
        bridge(ids)
    handle.remove()
    assert torch.equal(given[1][0], torch.tensor([[3, 1]]).expand(18, -1))
    assert torch.equal(given[1][1], given[0][1] * 0.5)


def test_logits_of_a_router_are_what_its_own_map_gives():
    bridge = hunyuan()
    ids = tokens(bridge.hf_model)
    given = []
    handle = bridge.hf_model.model.layers[0].mlp.gate.wg.register_forward_hook(lambda *call: given.append(call[2]))
    _, cache = bridge.run_with_cache(ids)
    handle.remove()
    assert torch.equal(cache["blocks.0.mlp.hook_router_logits"].flatten(0, 1), given[0])
    with bridge.hooks(fwd_hooks=[("blocks.0.mlp.hook_router_logits", lambda value, hook: -value)]):
        _, edited = bridge.run_with_cache(ids)
    first = "blocks.0.mlp.hook_expert_indices"
    assert not torch.equal(edited[first], cache[first])


def test_what_is_absent_where_all_experts_run():
    bridge = llama4()
    assert bridge.why_absent("blocks.0.mlp.hook_expert_weights") == (
        "all experts run on all tokens, on inputs that their scores multiply; hook_router_logits has these"
    )
    assert "blocks.0.mlp.experts.hook_out" not in bridge.hook_dict
    _, cache = bridge.run_with_cache(tokens(bridge.hf_model))
    whole, own = cache["blocks.0.mlp.hook_out"], cache["blocks.0.mlp.shared.hook_out"]
    assert not torch.allclose(whole, own)  # though the model adds into the shared expert's output
