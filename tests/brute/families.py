"""Where the parts of each family's blocks are: paths of Hugging Face modules, written down from their source."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Layout = str
"""How a fused projection orders its features: see `feature_index`."""


@dataclass(frozen=True)
class Family:
    """Paths of modules; those of a block are relative to the block.

    Attributes:
        blocks: The list of blocks.
        embed: The token embedding.
        ln_final: The norm before the unembedding.
        attn: The attention module.
        o: Its output projection.
        projections: Module of each of q, k, v: one for all where they are fused.
        mlp: The module that the MLP's branch starts with, after the norm.
        pre: The projection whose output goes into the activation function.
        post: The projection that reads the activations.
        layout: How a fused projection orders its features; None where q, k and v have modules of their own.
        ln1: The norm before attention, or None.
        ln2: The norm before the MLP, or None; the same as `ln1` where both share it.
        attn_out: The module whose output is what attention adds; by default `attn`.
        mlp_out: The module whose output is what the MLP adds; by default `mlp`.
        pre_linear: The linear branch of a gated MLP.
        pos_embed: The position embedding.
        is_parallel: Whether attention and MLP read the same stream.
        attn_has_residual: Whether the attention module returns its output plus the residual stream.
        mlp_has_residual: The same of the MLP.
        has_sinks: Whether the softmax has a last column for a sink.
        positions: Whether the model's forward needs position ids where rows are padded.
        attention: The implementation that the reference runs. Scores and patterns are seen in `"eager"` alone.
    """

    blocks: str
    embed: str
    ln_final: str
    attn: str
    o: str
    projections: Mapping[str, str]
    mlp: str
    pre: str | None
    post: str | None
    layout: Layout | None = None
    ln1: str | None = None
    ln2: str | None = None
    attn_out: str | None = None
    mlp_out: str | None = None
    pre_linear: str | None = None
    pos_embed: str | None = None
    is_parallel: bool = False
    attn_has_residual: bool = False
    mlp_has_residual: bool = False
    has_sinks: bool = False
    positions: bool = True
    attention: str = "eager"


def _fused(path: str) -> dict[str, str]:
    return dict.fromkeys("qkv", path)


_GPT2 = Family(
    blocks="transformer.h",
    embed="transformer.wte",
    ln_final="transformer.ln_f",
    pos_embed="transformer.wpe",
    attn="attn",
    o="attn.c_proj",
    projections=_fused("attn.c_attn"),
    layout="thirds",
    ln1="ln_1",
    ln2="ln_2",
    mlp="mlp",
    pre="mlp.c_fc",
    post="mlp.c_proj",
)
_LLAMA = Family(
    blocks="model.layers",
    embed="model.embed_tokens",
    ln_final="model.norm",
    attn="self_attn",
    o="self_attn.o_proj",
    projections={letter: f"self_attn.{letter}_proj" for letter in "qkv"},
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    mlp="mlp",
    pre="mlp.gate_proj",
    pre_linear="mlp.up_proj",
    post="mlp.down_proj",
)
_GEMMA = replace(
    _LLAMA,
    attn_out="post_attention_layernorm",
    ln2="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
)
_NEOX = Family(
    blocks="gpt_neox.layers",
    embed="gpt_neox.embed_in",
    ln_final="gpt_neox.final_layer_norm",
    attn="attention",
    o="attention.dense",
    projections=_fused("attention.query_key_value"),
    layout="by head",
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    mlp="mlp",
    pre="mlp.dense_h_to_4h",
    post="mlp.dense_4h_to_h",
    is_parallel=True,
)
_FALCON = replace(
    _NEOX,
    blocks="transformer.h",
    embed="transformer.word_embeddings",
    ln_final="transformer.ln_f",
    attn="self_attention",
    o="self_attention.dense",
    projections=_fused("self_attention.query_key_value"),
    ln2="input_layernorm",
    layout="groups",
)
_FALCON_SEQUENTIAL = replace(_FALCON, layout="by head", ln2="post_attention_layernorm", is_parallel=False)
_NO_NEURONS = {"pre": None, "post": None, "pre_linear": None}

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt2 upcast": _GPT2,
    "gpt_bigcode": replace(_GPT2, layout="thirds"),
    "gpt_bigcode multi-head": replace(_GPT2, layout="by head"),
    "llama": _LLAMA,
    "llama biases": _LLAMA,
    "llama eager": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "granite": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "olmo2": replace(_GEMMA, ln1=None, ln2=None),
    "phi3": replace(
        _LLAMA,
        projections=_fused("self_attn.qkv_proj"),
        layout="thirds",
        pre="mlp.gate_up_proj",
        pre_linear="mlp.gate_up_proj",
    ),
    "cohere2": replace(_LLAMA, ln2="input_layernorm", is_parallel=True),
    "mixtral": replace(_LLAMA, **_NO_NEURONS),
    "gpt_oss": replace(_LLAMA, **_NO_NEURONS, has_sinks=True),
    "gpt_neox": _NEOX,
    "gpt_neox sequential": replace(_NEOX, is_parallel=False),
    "gptj": replace(
        _GPT2,
        pos_embed=None,
        o="attn.out_proj",
        projections={letter: f"attn.{letter}_proj" for letter in "qkv"},
        layout=None,
        ln2="ln_1",
        pre="mlp.fc_in",
        post="mlp.fc_out",
        is_parallel=True,
    ),
    "opt": Family(
        blocks="model.decoder.layers",
        embed="model.decoder.embed_tokens",
        ln_final="model.decoder.final_layer_norm",
        pos_embed="model.decoder.embed_positions",
        attn="self_attn",
        o="self_attn.out_proj",
        projections={letter: f"self_attn.{letter}_proj" for letter in "qkv"},
        ln1="self_attn_layer_norm",
        ln2="final_layer_norm",
        mlp="fc1",
        pre="fc1",
        post="fc2",
        mlp_out="fc2",
        positions=False,
    ),
    "bloom": replace(
        _FALCON_SEQUENTIAL,
        attn_has_residual=True,
        mlp_has_residual=True,
        positions=False,
    ),
    "falcon": _FALCON,
    "falcon sequential": _FALCON_SEQUENTIAL,
    "falcon alibi": replace(_FALCON_SEQUENTIAL, attention="sdpa"),  # the model's eager branch adds its biases twice
    "falcon grouped": replace(_FALCON, ln1="ln_attn", ln2="ln_mlp"),
    "falcon one norm": _FALCON,
    "mpt": Family(
        blocks="transformer.blocks",
        embed="transformer.wte",
        ln_final="transformer.norm_f",
        attn="attn",
        o="attn.out_proj",
        projections=_fused("attn.Wqkv"),
        layout="thirds",
        ln1="norm_1",
        ln2="norm_2",
        mlp="ffn",
        pre="ffn.up_proj",
        post="ffn.down_proj",
        mlp_has_residual=True,
        positions=False,
    ),
}
"""By the name of the variant in `tests.zoo`."""


def feature_index(layout: Layout | None, letter: str, heads: int, groups: int, width: int) -> Tensor:
    """Returns which output features of its projection are a query, key or value: `[head, d_head]`.

    Args:
        layout: None where the projection has nothing else; otherwise how a fused one orders its features:
            `"thirds"`: all queries, all keys, all values; `"by head"`: query, key and value of a head, head after head;
            `"groups"`: the queries of a group, its key and its value, group after group.
        letter: Which.
        heads: Query heads.
        groups: Key and value heads.
        width: Width of a head.
    """
    count = heads if letter == "q" else groups
    if layout is None:
        return torch.arange(count * width).view(count, width)
    everything = torch.arange((heads + 2 * groups) * width)
    match layout:
        case "thirds":
            parts = everything.split([heads * width, groups * width, groups * width])
            return parts["qkv".index(letter)].view(count, width)
        case "by head":
            return everything.view(heads, 3, width)[:, "qkv".index(letter)]
        case "groups":
            grouped = everything.view(groups, heads // groups + 2, width)
            chosen = {"q": grouped[:, :-2], "k": grouped[:, -2:-1], "v": grouped[:, -1:]}[letter]
            return chosen.reshape(count, width)
    raise ValueError(f"unknown layout {layout!r}")
