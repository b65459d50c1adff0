"""Attention whose queries and keys meet in a module inside it, as BERT's and its kin's do."""

import pytest
import torch
from tests.structures import (
    LAYER_NORM,
    SIZES,
    SPLIT_EVENLY,
    assert_verified,
    bridged,
    levels,
    linears,
    norms,
    tiny,
    tokens,
)
from transformers import DynamicCache

from clearspan._forward.readout import directions_of
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
    "config_values": LAYER_NORM,
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


def roberta(name="Roberta", root="roberta", *, sums=True, **settings):
    """RoBERTa and its kin, which count the tokens whose ids are not padding's."""
    model = tiny(name, is_decoder=True, **{**SIZES, "pad_token_id": 1, **settings})

    def head():
        parts = {**linears(in_="lm_head.dense"), **norms(norm="lm_head.layer_norm")}
        last = {} if sums else norms(ln_final=f"{root}.LayerNorm")
        return {**last, "head": LogitHeadBridge(submodules=parts), "unembed": UnembeddingBridge(name="lm_head.decoder")}

    mapping = encoder_like(
        root,
        sums=sums,
        attention_norm=("attention.output.LayerNorm", "output.LayerNorm")
        if sums
        else ("attention.LayerNorm", "intermediate.LayerNorm"),
        head=head,
        ends_with="LayerNorm",
        positions={"offset": 2, "padding_id": 1},
    )

    def counted(cfg):
        cfg.n_ctx = cfg.hf["max_position_embeddings"] - 2
        return mapping(cfg)

    return bridged(model, counted, **ADAPTER)


def prelayernorm():
    return roberta("RobertaPreLayerNorm", "roberta_prelayernorm", sums=False)


KINDS = {"bert": bert, "megatron": megatron, "roberta": roberta, "prelayernorm": prelayernorm}


@levels
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_verify(kind, level):
    assert_verified(KINDS[kind](), level)


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


def rows_asked_for(model, run):
    """Returns what the model's table of positions is asked for while something runs."""
    asked = []
    table = model.roberta.embeddings.position_embeddings
    handle = table.register_forward_pre_hook(lambda _, given: asked.append(given[0].tolist()))
    with torch.no_grad():
        run()
    handle.remove()
    return asked


def test_positions_counted_from_ids_are_those_of_the_bare_model():
    bridge = roberta()
    model = bridge.hf_model
    ids = torch.tensor([[5, 6, 7, 8, 9], [1, 1, 5, 6, 7], [5, 1, 6, 7, 8]])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [1] * 5])
    expected = [[2, 3, 4, 5, 6], [1, 1, 2, 3, 4], [2, 1, 3, 4, 5]]
    assert rows_asked_for(model, lambda: model(ids, attention_mask=mask)) == [expected]
    assert rows_asked_for(model, lambda: bridge(ids, attention_mask=mask)) == [expected]
    assert rows_asked_for(model, lambda: bridge(ids)) == [expected]
    assert torch.equal(bridge(ids), model(ids, use_cache=False).logits)
    # Padding by another token, and embeddings, where the bare model would count padding.
    other = torch.where(mask == 0, 7, ids)
    assert rows_asked_for(model, lambda: bridge(other, attention_mask=mask)) == [expected]
    embeds = bridge.W_E[ids].detach()
    assert rows_asked_for(model, lambda: bridge(embeds, attention_mask=mask))[0][1] == expected[1]


def test_positions_counted_from_ids_go_on_behind_a_kv_cache():
    bridge = roberta()
    ids = torch.tensor([[5, 6, 7, 8, 9], [1, 1, 5, 6, 7]])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    cache = DynamicCache(config=bridge.hf_model.config)
    bridge(ids[:, :3], attention_mask=mask[:, :3], past_key_values=cache)
    rest = []
    asked = rows_asked_for(
        bridge.hf_model,
        lambda: rest.append(bridge(ids[:, 3:], attention_mask=mask, past_key_values=cache)),
    )
    assert asked == [[[5, 6], [3, 4]]]
    assert torch.allclose(rest[0], bridge(ids, attention_mask=mask)[:, 3:], atol=1e-5)


def test_a_generation_counts_as_the_forward_does():
    bridge = roberta()
    ids = torch.tensor([[5, 6, 7]])
    asked = rows_asked_for(bridge.hf_model, lambda: bridge.generate(ids, max_new_tokens=3, do_sample=False))
    assert asked == [[[2, 3, 4]], [[5]], [[6]]]
    # Transformers numbers them from 0 on in a generation, and from 2 on in a forward.
    bare = rows_asked_for(
        bridge.hf_model, lambda: bridge.hf_model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=1)
    )
    assert bare[0] == [[0, 1, 2]]


def test_positions_outside_the_table_are_refused():
    with pytest.raises(InvalidArgumentError) as raised:
        roberta()(torch.tensor([[5, 6, 7]]), position_ids=torch.tensor([[0, 1, 2]]))
    assert str(raised.value) == (
        "position_ids are not in the model's table of positions\n  expected: 1 to 63\n  got: 0 to 2"
    )
