"""The GPTBigCode adapter's contract."""

import pytest
import torch
from tests.conftest import tiny_model
from torch import nn

from clearspan.architectures import (
    ADAPTERS,
    ArchitectureAdapter,
    GPTBigCodeArchitectureAdapter,
    MQAQKVConversionRule,
    adapter_class,
)
from clearspan.components import (
    BlockBridge,
    EmbeddingBridge,
    JointQKVAttentionBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import (
    GroupedQKVConversionRule,
    ParamProcessingConversion,
    RearrangeTensorConversion,
)
from clearspan.errors import UnreadableWeightError, UnsupportedArchitectureError


def config(**values: object) -> TransformerBridgeConfig:
    return TransformerBridgeConfig(**{"d_model": 48, "n_heads": 4, "n_layers": 3, "n_ctx": 32, "d_vocab": 97, **values})


@pytest.fixture
def adapter() -> GPTBigCodeArchitectureAdapter:
    return GPTBigCodeArchitectureAdapter(config())


def test_config_values(adapter):
    expected = {
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
        "final_rms": False,
        "gated_mlp": False,
        "attn_only": False,
        "uses_rms_norm": False,
        "eps_attr": "layer_norm_epsilon",
        "n_key_value_heads": 1,
        "split_attention_weights": True,
        "uses_split_attention": True,
    }
    assert {name: getattr(adapter.cfg, name) for name in expected} == expected
    assert isinstance(adapter, ArchitectureAdapter)
    assert adapter.uses_combined_qkv is True
    assert adapter.default_cfg == {"uses_split_attention": True}


def test_component_mapping(adapter):
    found = {}
    for key, component in adapter.component_mapping.items():
        found[key] = (type(component), component.name)
        for sub_key, part in component.submodules.items():
            found[f"{key}.{sub_key}"] = (type(part), part.name)
            for leaf_key, leaf in part.submodules.items():
                found[f"{key}.{sub_key}.{leaf_key}"] = (type(leaf), leaf.name)
    assert found == {
        "embed": (EmbeddingBridge, "transformer.wte"),
        "pos_embed": (PosEmbedBridge, "transformer.wpe"),
        "blocks": (BlockBridge, "transformer.h"),
        "blocks.ln1": (NormalizationBridge, "ln_1"),
        "blocks.attn": (JointQKVAttentionBridge, "attn"),
        "blocks.attn.qkv": (LinearBridge, "c_attn"),
        "blocks.attn.o": (LinearBridge, "c_proj"),
        "blocks.ln2": (NormalizationBridge, "ln_2"),
        "blocks.mlp": (MLPBridge, "mlp"),
        "blocks.mlp.in": (LinearBridge, "c_fc"),
        "blocks.mlp.out": (LinearBridge, "c_proj"),
        "ln_final": (NormalizationBridge, "transformer.ln_f"),
        "unembed": (UnembeddingBridge, "lm_head"),
    }
    attention = adapter.component_mapping["blocks"].submodules["attn"]
    assert isinstance(attention, JointQKVAttentionBridge)
    assert attention.requires_attention_mask is True
    assert attention.attention_mask_4d is True
    assert attention.split_qkv_matrix == adapter._split_qkv_matrix
    assert isinstance(attention.qkv_conversion_rule, MQAQKVConversionRule)


def test_components_expose_their_arguments():
    part = LinearBridge(name="c_attn")
    component = NormalizationBridge("ln_1", config="anything", submodules={"part": part})
    assert (component.name, component.config, component.submodules) == ("ln_1", "anything", {"part": part})


@pytest.mark.parametrize(("n_kv", "rows", "kv_heads"), [(None, "(n h)", 1), (1, "(n h)", 1), (4, "n h", 4)])
def test_weight_conversions(n_kv, rows, kv_heads):
    conversions = GPTBigCodeArchitectureAdapter(config(n_key_value_heads=n_kv)).weight_processing_conversions
    found = {}
    for name, conversion in conversions.items():
        assert isinstance(conversion, ParamProcessingConversion)
        assert isinstance(conversion.tensor_conversion, RearrangeTensorConversion)
        found[name] = (conversion.tensor_conversion.pattern, conversion.tensor_conversion.axes_lengths)
    assert found == {
        "blocks.{i}.attn.q.weight": (f"{rows} m -> n m h", {"n": 4}),
        "blocks.{i}.attn.k.weight": (f"{rows} m -> n m h", {"n": kv_heads}),
        "blocks.{i}.attn.v.weight": (f"{rows} m -> n m h", {"n": kv_heads}),
        "blocks.{i}.attn.o.weight": ("m (n h) -> n h m", {"n": 4}),
    }


def test_split_gives_views_of_the_fused_rows(adapter):
    fused = tiny_model().transformer.h[0].attn.c_attn
    q, k, v = adapter._split_qkv_matrix(tiny_attention(fused))
    assert [part.weight.shape[0] for part in (q, k, v)] == [48, 12, 12]
    start = 0
    for part in (q, k, v):
        assert isinstance(part, nn.Linear)
        rows = slice(start, start + part.out_features)
        assert torch.equal(part.weight, fused.weight[rows])
        assert torch.equal(part.bias, fused.bias[rows])
        assert part.weight.data_ptr() == fused.weight[rows].data_ptr()
        assert part.bias.data_ptr() == fused.bias[rows].data_ptr()
        start += part.out_features
    value = torch.randn(2, 5, 48)
    assert torch.allclose(torch.cat([part(value) for part in (q, k, v)], -1), fused(value), atol=1e-6)


def tiny_attention(fused: nn.Linear) -> nn.Module:
    attention = nn.Module()
    attention.c_attn = fused
    return attention


def test_split_without_bias(adapter):
    for part in adapter._split_qkv_matrix(tiny_attention(nn.Linear(48, 72, bias=False))):
        assert part.bias is None


def test_a_fused_map_of_another_kind_is_not_split(adapter):
    with pytest.raises(UnreadableWeightError) as error:
        adapter._split_qkv_matrix(tiny_attention(nn.Bilinear(48, 48, 72)))
    assert str(error.value).splitlines() == [
        "queries, keys and values cannot be taken apart",
        "  expected: a Linear with a weight of its own",
        "  got: Bilinear, quantised, wrapped or with an adapter",
        "  where: c_attn of Module",
        "  fix: bridge.blocks[layer].attn.W_Q, W_K and W_V",
    ]


def test_split_with_heads_interleaved():
    adapter = GPTBigCodeArchitectureAdapter(config(n_key_value_heads=4))
    assert isinstance(adapter.qkv_conversion_rule, GroupedQKVConversionRule)
    attention = tiny_model(multi_query=False).transformer.h[0].attn
    q, k, v = adapter._split_qkv_matrix(attention)
    by_head = attention.c_attn.weight.view(4, 3, 12, 48)
    for index, part in enumerate((q, k, v)):
        assert torch.equal(part.weight.view(4, 12, 48), by_head[:, index])
        assert torch.equal(part.bias.view(4, 12), attention.c_attn.bias.view(4, 3, 12)[:, index])


def test_registry():
    assert adapter_class("GPTBigCodeForCausalLM") is GPTBigCodeArchitectureAdapter
    assert ADAPTERS["GPTBigCodeForCausalLM"] is GPTBigCodeArchitectureAdapter
    with pytest.raises(UnsupportedArchitectureError) as error:
        adapter_class("GPTBigcodeForCausalLM")
    first, expected, closest, fix = str(error.value).splitlines()
    assert first == "no adapter for GPTBigcodeForCausalLM"
    assert expected == f"  expected: {', '.join(sorted(ADAPTERS))}"
    assert closest.startswith("  nearest: GPTBigCodeForCausalLM, ")
    assert fix == "  fix: write an adapter: CONTRIBUTING.md shows how, step by step"
