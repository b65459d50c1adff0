"""What adapters declare is what the models do; and an adapter that does not fit says where."""

import pytest
import torch
from tests.zoo import MODELS, build
from torch.nn.functional import cosine_similarity

import clearspan
from clearspan.architectures import ArchitectureAdapter, parts
from clearspan.architectures.llama import LlamaArchitectureAdapter, llama, pre_norm, self_attention
from clearspan.components import LatentAttentionBridge
from clearspan.conversions import BlockedQKVConversionRule, GroupedQKVConversionRule
from clearspan.errors import InvalidArgumentError
from clearspan.hf.observers import observed
from clearspan.points import Side


@pytest.mark.parametrize("variant", MODELS)
def test_queries_and_keys_are_used_as_projected_unless_there_are_rotated_ones(variant):
    bridge = clearspan.boot(build(variant))
    ids = torch.randint(1, 97, (2, 5), generator=torch.Generator().manual_seed(0))
    used = {}

    def watching(layer):
        def visit(side):
            return lambda tensor: used.setdefault((layer, side), tensor)

        return lambda call: call.run_watched({side: visit(side) for side in (Side.QUERY, Side.KEY)})

    observers = {block.attn.module: watching(layer) for layer, block in enumerate(bridge.blocks)}
    with torch.no_grad(), observed(observers):
        _, cache = bridge.run_with_cache(ids, lambda name: name.endswith(("attn.hook_q", "attn.hook_k")))
    for layer, block in enumerate(bridge.blocks):
        for letter, side in (("q", Side.QUERY), ("k", Side.KEY)):
            if not isinstance(block.attn, LatentAttentionBridge) and (layer, side) in used:  # `baddbmm` is not seen
                projected = cache[letter, layer].transpose(1, 2)
                found = used[layer, side].reshape(2, -1, 5, projected.shape[-1])
                # Up to scale: OPT scales its queries.
                is_same = found.shape == projected.shape and cosine_similarity(found, projected, dim=-1).min() > 0.999
                assert is_same == (bridge.why_absent(f"blocks.{layer}.attn.hook_rot_{letter}") is not None)


class OtherMLP(ArchitectureAdapter):
    def mapping(self, cfg):
        return llama(pre_norm(self_attention(), parts.mlp("mlp", in_="c_fc", out="down_proj")))


class OtherFrame(LlamaArchitectureAdapter):
    def mapping(self, cfg):
        mapping = super().mapping(cfg)
        mapping["blocks"].name = "transformer.h"
        return mapping


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            OtherMLP,
            [
                "blocks.0.mlp.in is not where the adapter says",
                "  expected: a module 'c_fc' in model.layers.0.mlp",
                "  got: gate_proj, up_proj, down_proj, act_fn",
                "  where: LlamaMLP",
                "  nearest: act_fn",
                "  fix: the component's name in the adapter",
            ],
        ),
        (
            OtherFrame,
            [
                "blocks.0 is not where the adapter says",
                "  expected: a module 'transformer' in the model",
                "  got: model, lm_head",
                "  where: LlamaForCausalLM",
                "  fix: the component's name in the adapter",
            ],
        ),
    ],
)
def test_a_module_that_is_not_there(adapter, message):
    with pytest.raises(InvalidArgumentError) as error:
        clearspan.boot(build("llama"), adapter=adapter)
    assert str(error.value).splitlines() == message


@pytest.mark.parametrize(
    ("rule", "size"),
    [
        (BlockedQKVConversionRule(4, 12, 2), "96 = (4 + 2 * 2) heads * 12"),
        (GroupedQKVConversionRule(4, 12, 2), "96 = 2 groups * (2 + 2) heads * 12"),
    ],
)
def test_a_fused_axis_of_another_size(rule, size):
    with pytest.raises(InvalidArgumentError) as error:
        rule.split(torch.zeros(2, 5, 100), -1)
    assert str(error.value).splitlines() == [
        "the fused axis does not hold these queries, keys and values",
        f"  expected: {size}",
        "  got: 100",
        "  fix: the rule or its heads in the adapter",
    ]
