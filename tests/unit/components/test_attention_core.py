"""Attention whose queries and keys meet in a module inside it, as BERT's and its kin's do."""

import pytest
import torch
from tests.structures import SIZES, assert_verified, bridged, linears, norms, tiny, tokens

from clearspan._forward.readout import directions_of
from clearspan.architectures.decoder import LAYER_NORM, SPLIT_EVENLY
from clearspan.components import (
    ActivationBridge,
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    LogitHeadBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    TypeEmbedBridge,
    UnembeddingBridge,
)
from clearspan.errors import InvalidArgumentError

ADAPTER = {
    "config_values": {**LAYER_NORM, "eps_attr": "layer_norm_eps"},
    "sizes": {
        **SPLIT_EVENLY,
        "n_ctx": ("max_position_embeddings",),
        "d_mlp": ("intermediate_size",),
        "act_fn": ("hidden_act",),
    },
    "irrelevant": {"*_ids": "positions and types where none are given"},
}


def encoder_like(root, *, sums, attention_norm, head, ends_with=None, positions=None):
    """Returns the mapping of BERT's kin.

    Args:
        root: Path of the model without its head.
        sums: Whether norms come after sublayers, on their sum with the stream.
        attention_norm: Path in the block of attention's norm, and of the MLP's.
        head: The parts after the blocks.
        ends_with: Path of the norm on embeddings, or None.
        positions: Settings of the position embedding.
    """
    embeddings = f"{root}.embeddings"

    def mapping(cfg):
        ln1, ln2 = attention_norm
        maps = linears(q="self.query", k="self.key", v="self.value", o="output.dense")
        mlp = linears(in_="intermediate.dense", out="output.dense")
        mlp["act"] = ActivationBridge(name="intermediate.intermediate_act_fn")
        between = {} if ends_with is None else {"embed_norm": NormalizationBridge(name=f"{embeddings}.{ends_with}")}
        ends = {} if ends_with is None else {"ends_at": f"{embeddings}.{ends_with}"}
        first = NormalizationBridge(name=ln1, output_is_overwritten=sums)
        attention = AttentionBridge(
            name="attention", core="self", submodules=maps, norms_input=not sums, output_is_overwritten=True
        )
        return {
            "embed": EmbeddingBridge(name=f"{embeddings}.word_embeddings", **ends),
            "pos_embed": PosEmbedBridge(
                name=f"{embeddings}.position_embeddings", ends_in_embed=ends_with is not None, **(positions or {})
            ),
            "type_embed": TypeEmbedBridge(
                name=f"{embeddings}.token_type_embeddings", ends_in_embed=ends_with is not None
            ),
            **between,
            "blocks": BlockBridge(
                name=f"{root}.encoder.layer",
                submodules={
                    "ln1": first,
                    "attn": attention,
                    **norms(ln2=ln2),
                    "mlp": MLPBridge(submodules=mlp),
                },
                norms_the_sum=sums,
                attn_out="attention.output.dropout",
                mlp_out="output.dropout",
            ),
            **head(),
        }

    return mapping


def bert_head():
    parts = {**linears(in_="dense"), **norms(norm="LayerNorm")}
    return {
        "head": LogitHeadBridge(name="cls.predictions.transform", submodules=parts),
        "unembed": UnembeddingBridge(name="cls.predictions.decoder"),
    }


def bert(attn=None):
    model = tiny("Bert", "BertLMHeadModel", attn=attn, is_decoder=True, **SIZES)
    mapping = encoder_like(
        "bert",
        sums=True,
        attention_norm=("attention.output.LayerNorm", "output.LayerNorm"),
        head=bert_head,
        ends_with="LayerNorm",
    )
    return bridged(model, mapping, **ADAPTER)


def megatron():
    model = tiny("MegatronBert", is_decoder=True, **SIZES)

    def head():
        return {**norms(ln_final="bert.encoder.ln"), **bert_head()}

    mapping = encoder_like("bert", sums=False, attention_norm=("attention.ln", "ln"), head=head)
    return bridged(model, mapping, **ADAPTER)


KINDS = {"bert": bert, "megatron": megatron}


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_verify(kind):
    assert_verified(KINDS[kind]())


def test_values_are_those_that_plain_torch_hooks_see():
    bridge = bert(attn="eager")
    model, ids = bridge.hf_model, tokens(bridge.hf_model)
    seen = {}
    attention = model.bert.encoder.layer[1].attention
    handles = [
        attention.self.query.register_forward_hook(lambda *call: seen.update(q=call[2])),
        attention.output.dense.register_forward_pre_hook(lambda _, given: seen.update(z=given[0])),
    ]
    with torch.no_grad():
        patterns = model(ids, output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    _, cache = bridge.run_with_cache(ids)
    assert torch.allclose(cache["blocks.1.attn.hook_q"].flatten(2), seen["q"], atol=1e-6)
    assert torch.allclose(cache["blocks.1.attn.hook_z"].flatten(2), seen["z"], atol=1e-6)
    assert torch.allclose(cache["blocks.1.attn.hook_pattern"], patterns[1], atol=1e-6)


def test_a_pattern_that_is_written_is_what_multiplies_the_values():
    bridge = bert()
    ids = tokens(bridge.hf_model)
    first = torch.zeros(9, 9)
    first[:, 0] = 1
    with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda value, hook: first.expand_as(value).clone())]):
        _, cache = bridge.run_with_cache(ids, ["blocks.0.attn.hook_v", "blocks.0.attn.hook_z"])
    v, z = cache["blocks.0.attn.hook_v"], cache["blocks.0.attn.hook_z"]
    assert torch.allclose(z, v[:, :1].expand_as(z), atol=1e-6)


def test_what_is_added_before_a_norm_has_no_share_of_its_own_in_the_stream():
    bridge = bert()
    assert bridge.why_absent("hook_pos_embed") == (
        "positions are added to the token embedding before its norm or projection, so hook_embed has both; "
        "pos_embed.hook_out has them alone"
    )
    assert bridge.why_absent("hook_type_embed") == (
        "types are added to the token embedding before its norm or projection, so hook_embed has both; "
        "type_embed.hook_out has them alone"
    )
    assert bridge.W_pos.shape == (64, 48)


def test_types_are_a_part_of_the_embedding():
    bridge = megatron()
    _, cache = bridge.run_with_cache(tokens(bridge.hf_model))
    stack, labels = cache.decompose_resid(1, return_labels=True)
    assert labels[:3] == ["embed", "pos_embed", "type_embed"]
    assert torch.allclose(stack.sum(0), cache["resid_pre", 1], atol=1e-4)


def test_a_head_that_is_not_linear_says_so():
    bridge = bert()
    with pytest.raises(InvalidArgumentError) as raised:
        directions_of(bridge, torch.tensor([5]))
    assert str(raised.value) == (
        "logits are no linear function of the residual stream on this model\n"
        "  where: BertLMHeadModel\n"
        "  reason: a map with an activation function lies between the last block and the unembedding\n"
        "  fix: run the model: bridge(..., start_at_layer=...) takes a residual stream and gives logits"
    )
