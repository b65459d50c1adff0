"""Decoders that were made as half of an encoder and decoder: positions of one row, of sines, and products by `bmm`."""

import pytest
import torch
from tests.structures import LAYER_NORM, SPLIT_EVENLY, assert_verified, bridged, levels, linears, norms, tiny, tokens

from clearspan.components import (
    ActivationBridge,
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)
from clearspan.errors import MissingWeightError
from clearspan.points import Layout

HALF = {
    "vocab_size": 97,
    "d_model": 48,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 80,
    "max_position_embeddings": 64,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
}
ADAPTER = {
    "sizes": {
        **SPLIT_EVENLY,
        "n_ctx": ("max_position_embeddings",),
        "d_mlp": ("decoder_ffn_dim", "ffn_dim"),
        "act_fn": ("activation_function",),
    },
    "irrelevant": {"*encoder_attn*": "attention to an encoder, which a language model alone does not have"},
}


def half(root, *, sums, positions, final, normed=False, joins_heads=False, act="activation_fn"):
    """Returns the mapping of a decoder.

    Args:
        root: Path of the decoder.
        sums: Whether norms come after sublayers, on their sum with the stream.
        positions: Settings of the position embedding.
        final: Whether a norm follows the last block.
        normed: Whether a norm follows the embeddings.
        joins_heads: Whether rows and heads share an axis in products.
        act: Name of the activation function.
    """

    def mapping(cfg):
        ends = {"ends_at": f"{root}.layernorm_embedding"} if normed else {}
        embed_norm = norms(embed_norm=f"{root}.layernorm_embedding") if normed else {}
        parts = {
            "ln1": NormalizationBridge(name="self_attn_layer_norm", output_is_overwritten=sums),
            "attn": AttentionBridge(
                name="self_attn",
                submodules=linears(q="q_proj", k="k_proj", v="v_proj", o="out_proj"),
                joins_heads=joins_heads,
            ),
            **norms(ln2="final_layer_norm"),
            "mlp": MLPBridge(submodules={**linears(in_="fc1", out="fc2"), "act": ActivationBridge(name=act)}),
        }
        return {
            "embed": EmbeddingBridge(name=f"{root}.embed_tokens", **ends),
            "pos_embed": PosEmbedBridge(name=f"{root}.embed_positions", ends_in_embed=normed, **positions),
            **embed_norm,
            "blocks": BlockBridge(name=f"{root}.layers", submodules=parts, norms_the_sum=sums),
            **(norms(ln_final=f"{root}.layer_norm") if final else {}),
            "unembed": UnembeddingBridge(name="lm_head"),
        }

    return mapping


ONE_ROW = {"layout": Layout.ONE_ROW, "input_is_positions": False}


def marian():
    mapping = half("model.decoder", sums=True, positions=ONE_ROW, final=False)
    model = tiny("Marian", **HALF, decoder_vocab_size=97)
    return bridged(model, mapping, config_values=LAYER_NORM, **ADAPTER)


def pegasus():
    mapping = half("model.decoder", sums=False, positions=ONE_ROW, final=True)
    return bridged(tiny("Pegasus", **HALF), mapping, config_values=LAYER_NORM, **ADAPTER)


def xglm():
    sizes = {"num_layers": 3, "attention_heads": 4, "ffn_dim": 80}
    mapping = half("model", sums=False, positions={"table": None}, final=True, joins_heads=True)
    return bridged(tiny("XGLM", **{**HALF, **sizes}), mapping, config_values=LAYER_NORM, **ADAPTER)


def mvp():
    mapping = half(
        "model.decoder",
        sums=True,
        positions={"offset": 2, "input_is_positions": False},
        final=False,
        normed=True,
        joins_heads=True,
    )
    return bridged(tiny("Mvp", **HALF), mapping, config_values=LAYER_NORM, **ADAPTER)


KINDS = {"marian": marian, "pegasus": pegasus, "xglm": xglm, "mvp": mvp}


LEFT = {"padding: row of 9 tokens padded on the left to 12"}
"""Fails where the model itself counts padding as positions, and takes no `position_ids`."""
FAILING = {"marian": LEFT, "pegasus": LEFT, "mvp": LEFT}


@levels
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_verify(kind, level):
    assert_verified(KINDS[kind](), level, but=FAILING.get(kind, ()))


@pytest.mark.parametrize("kind", ["marian", "pegasus", "mvp"])
def test_left_padding_is_wrong_in_the_model_itself(kind):
    model = KINDS[kind]().hf_model
    ids = tokens(model, rows=1)
    padded, mask = torch.zeros(1, 12, dtype=torch.long), torch.zeros(1, 12, dtype=torch.long)
    padded[:, 3:], mask[:, 3:] = ids, 1
    with torch.no_grad():
        alone, found = model(ids).logits, model(padded, attention_mask=mask).logits[:, 3:]
    assert (alone - found).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["marian", "pegasus"])
def test_one_row_of_positions_is_written_for_each_row_of_the_batch(kind):
    bridge = KINDS[kind]()
    ids = tokens(bridge.hf_model)

    def write(value, hook):
        assert value.shape == (2, 9, 48)
        value[1] = 0

    plain = bridge.run_with_cache(ids)[1]
    with bridge.hooks(fwd_hooks=[("hook_pos_embed", write)]):
        _, cache = bridge.run_with_cache(ids)
    start = cache["resid_pre", 0]
    assert torch.equal(start[0], plain["resid_pre", 0][0])
    assert torch.allclose(start[1], plain["hook_embed"][1])
    assert bridge.W_pos.shape == (64, 48)
    assert torch.equal(plain["hook_pos_embed"][0], bridge.W_pos[:9])


def test_computed_positions_have_no_weight():
    with pytest.raises(MissingWeightError) as raised:
        _ = xglm().W_pos
    assert str(raised.value) == (
        "pos_embed has no W_pos\n  reason: the module computes a position's sines and cosines, and has no weights"
    )


@pytest.mark.parametrize("kind", ["xglm", "mvp"])
def test_patterns_of_rows_and_heads_in_one_axis(kind):
    bridge = KINDS[kind]()
    ids = tokens(bridge.hf_model)
    patterns = []
    attention = bridge.blocks[1].attn.module
    handle = attention.register_forward_hook(lambda *call: patterns.append(call[3][1]), with_kwargs=True)
    with torch.no_grad():
        bridge.hf_model(ids, output_attentions=True)
    handle.remove()
    _, cache = bridge.run_with_cache(ids)
    assert torch.allclose(cache["pattern", 1], patterns[0], atol=1e-6)

    def write(value, hook):
        value[1, 2] = torch.eye(9)

    with bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", write)]):
        _, edited = bridge.run_with_cache(ids)
    z, v = edited["z", 1], edited["v", 1]
    assert torch.allclose(z[1, :, 2], v[1, :, 2], atol=1e-6)
    assert torch.allclose(z[0], cache["z", 1][0], atol=1e-6)
