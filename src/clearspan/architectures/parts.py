"""Builders of an adapter's parts: functions with explicit arguments that return component templates.

An adapter's `mapping` is one call of `decoder`. A name is a module's path in the Hugging Face model, relative to the
part around it; where a map or a norm is asked for, its name alone stands for the usual kind.

Example:
    >>> mapping = decoder(
    ...     embed="model.embed_tokens",
    ...     blocks=block(
    ...         "model.layers",
    ...         ln1=norm("input_layernorm", rms=True),
    ...         attn=attention("self_attn", q="q_proj", k="k_proj", v="v_proj", o="o_proj", rotary=True),
    ...         ln2=norm("post_attention_layernorm", rms=True),
    ...         mlp=gated_mlp("mlp", gate="gate_proj", in_="up_proj", out="down_proj"),
    ...     ),
    ...     ln_final=norm("model.norm", rms=True),
    ... )
    >>> list(mapping), list(mapping["blocks"].submodules)
    (['embed', 'blocks', 'ln_final', 'unembed'], ['ln1', 'attn', 'ln2', 'mlp'])
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypedDict, Unpack

import torch
from torch import nn

from clearspan.components import (
    ActivationBridge,
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    ExpertsBridge,
    GatedMLPBridge,
    GeneralizedComponent,
    JointGateMLPBridge,
    JointQKVAttentionBridge,
    LatentAttentionBridge,
    LinearBridge,
    LogitHeadBridge,
    MLPBridge,
    MoEBridge,
    NormalizationBridge,
    PerLayer,
    PosEmbedBridge,
    RouterBridge,
    TransposedLinearBridge,
    TypeEmbedBridge,
    UnembeddingBridge,
)
from clearspan.components.block import PARALLEL, Stages
from clearspan.components.factors import Factor, Terms
from clearspan.conversions import GateActivation, QKVConversionRule
from clearspan.points import Layout

STREAM = "batch pos d_model"
HEADS = "batch pos head d_head"
KV_HEADS = "batch pos kv_head d_head"
WIDTH = "batch pos width"
"""Axes of a norm: of the residual stream; of queries by head; of keys by head; of all heads together, or a latent."""

Linear = str | LinearBridge
Norm = NormalizationBridge | None
Split = Callable[[nn.Module], tuple[nn.Linear, nn.Linear, nn.Linear]]
Parts = Mapping[str, GeneralizedComponent]
NONE: Parts = MappingProxyType({})


class AttentionOptions(TypedDict, total=False):
    """What few models' attention has: attributes of `GeneralAttentionBridge`, whose docstring explains them."""

    gate_activation: GateActivation | None
    gate_is_of_head: bool
    gate_in_queries: bool
    norms_rotated: bool
    d_head_v: int | None
    value_scale: float
    kv_heads: int | None
    d_head: int | None
    sink_scales_z: bool
    joins_heads: bool
    joins_operands: bool
    core: str
    norms_input: bool
    same_inputs: tuple[str, ...]


class LatentOptions(TypedDict, total=False):
    """What few models' latent attention has: attributes of `LatentAttentionBridge`, whose docstring explains them."""

    gate_activation: GateActivation | None
    gate_is_of_head: bool
    gate_in_queries: bool
    latent_multiplier: float
    query_multiplier: float
    joins_query_latent: bool


class BranchOptions(TypedDict, total=False):
    """What few gated MLPs have: attributes of `GatedMLPBridge`, whose docstring explains them."""

    linear_limit: float | None
    linear_offset: float


class MixtureOptions(TypedDict, total=False):
    """What few mixtures have: attributes of `MoEBridge`, whose docstring explains them."""

    multiplier: float
    shared_multiplier: float
    has_identities: bool


# --- linear maps and norms -------------------------------------------------------------------------------------------


def linear(
    name: str, *, transposed: bool = False, layout: Layout = Layout.TOKENS, overwritten: bool = False
) -> LinearBridge:
    """Returns a linear map.

    Args:
        name: Its module.
        transposed: Whether its weight is `[in, out]`, as GPT-2's `Conv1D` has it.
        layout: How rows and positions lie in its input and output.
        overwritten: Whether the model writes into its output's storage afterwards.

    Example:
        >>> linear("c_fc", transposed=True)
        TransposedLinearBridge('c_fc')
    """
    kind = TransposedLinearBridge if transposed else LinearBridge
    return kind(name, layout=layout, output_is_overwritten=overwritten)


def norm(
    name: str,
    *,
    rms: bool = False,
    offset: float = 0.0,
    axes: str = STREAM,
    layout: Layout = Layout.TOKENS,
    overwritten: bool = False,
    call: int | None = None,
) -> NormalizationBridge:
    """Returns a layer norm, or an RMS norm.

    Args:
        name: Its module.
        rms: Whether it is an RMS norm, which does not centre.
        offset: What the model adds to the weight before it multiplies (1 in Gemma).
        axes: Axes of its input and output, over the last of which it norms: `STREAM`, or of queries and keys `HEADS`,
            `KV_HEADS` by head and `WIDTH` over all heads together.
        layout: How rows and positions lie in its input and output.
        overwritten: Whether the model writes into its output's storage afterwards.
        call: Which call of its module in a forward it is, from 0, where the model calls it several times.

    Example:
        >>> norm("q_norm", rms=True, axes=HEADS).axes
        'batch pos head d_head'
    """
    return NormalizationBridge(
        name,
        uses_rms_norm=rms,
        weight_offset=offset,
        axes=axes,
        layout=layout,
        output_is_overwritten=overwritten,
        call=call,
    )


def _maps(layout: Layout = Layout.TOKENS, **maps: Linear | None) -> dict[str, GeneralizedComponent]:
    """Returns linear maps by canonical name; `in_` stands for `in`, a keyword, and None for a map that is not there."""
    return {
        key.rstrip("_"): linear(one, layout=layout) if isinstance(one, str) else one
        for key, one in maps.items()
        if one is not None
    }


def _there(**parts: GeneralizedComponent | None) -> dict[str, GeneralizedComponent]:
    return {key: part for key, part in parts.items() if part is not None}


# --- attention -------------------------------------------------------------------------------------------------------


def attention(
    name: str,
    *,
    q: Linear,
    k: Linear,
    v: Linear | None = None,
    o: Linear,
    q_norm: Norm = None,
    k_norm: Norm = None,
    v_norm: Norm = None,
    rotary: bool = False,
    alibi: bool = False,
    sinks: bool = False,
    repeats_keys: bool = False,
    overwritten: bool = False,
    gate: Linear | None = None,
    o_norm: Norm = None,
    others: Parts = NONE,
    **options: Unpack[AttentionOptions],
) -> AttentionBridge:
    """Returns attention with a linear map each for queries, keys and values.

    Args:
        name: Its module.
        q: The map to queries.
        k: The map to keys.
        v: The map to values; None where they are the map to keys, through `v_norm`.
        o: The output projection.
        q_norm: The norm of queries.
        k_norm: The norm of keys.
        v_norm: The norm of values.
        rotary: Whether positions are rotated into queries and keys.
        alibi: Whether positions are a bias on scores.
        sinks: Whether its module has a parameter `sinks`, which takes a share of each query's attention.
        repeats_keys: Whether the model repeats keys for all heads before the product.
        overwritten: Whether the model writes into its output's storage afterwards.
        gate: The map to a gate that multiplies z, which needs `gate_activation` among the options.
        o_norm: The norm of z before the output projection.
        others: Further parts by canonical name.
        **options: What few models have, by the names of the component's attributes.

    Example:
        >>> attention("self_attn", q="q_proj", k="k_proj", v="v_proj", o="dense", rotary=True).submodules["o"]
        LinearBridge('dense')
    """
    return AttentionBridge(
        name,
        submodules={
            **_maps(q=q, k=k, v=v, o=o, gate=gate),
            **_there(q_norm=q_norm, k_norm=k_norm, v_norm=v_norm, o_norm=o_norm),
            **others,
        },
        has_rotary=rotary,
        has_alibi=alibi,
        has_sinks=sinks,
        repeats_keys=repeats_keys,
        output_is_overwritten=overwritten,
        **options,
    )


def fused_attention(
    name: str,
    *,
    qkv: Linear,
    o: Linear,
    rule: QKVConversionRule,
    q_norm: Norm = None,
    k_norm: Norm = None,
    rotary: bool = False,
    alibi: bool = False,
    repeats_keys: bool = False,
    needs_mask: bool = False,
    split: Split | None = None,
    overwritten: bool = False,
    sinks: bool = False,
    gate: Linear | None = None,
    o_norm: Norm = None,
    others: Parts = NONE,
    **options: Unpack[AttentionOptions],
) -> JointQKVAttentionBridge:
    """Returns attention whose queries, keys and values come from one linear map.

    Args:
        name: Its module.
        qkv: The map to queries, keys and values.
        o: The output projection.
        rule: How the map's outputs hold queries, keys and values: all of each in a block, `BlockedQKVConversionRule`,
            or head by head, `GroupedQKVConversionRule`.
        q_norm: The norm of queries.
        k_norm: The norm of keys.
        rotary: Whether positions are rotated into queries and keys.
        alibi: Whether positions are a bias on scores.
        repeats_keys: Whether the model repeats keys for all heads before the product.
        needs_mask: Whether its module masks causally only by the mask `[batch, 1, q_pos, k_pos]` that it is given.
        split: Returns three linear maps for the Hugging Face module, where they are asked for.
        overwritten: Whether the model writes into its output's storage afterwards.
        sinks: Whether its module has a parameter `sinks`, which takes a share of each query's attention.
        gate: The map to a gate that multiplies z, which needs `gate_activation` among the options.
        o_norm: The norm of z before the output projection.
        others: Further parts by canonical name.
        **options: What few models have, by the names of the component's attributes.

    Example:
        >>> from clearspan.conversions import BlockedQKVConversionRule
        >>> rule = BlockedQKVConversionRule(n_heads=4, d_head=12, n_kv_heads=2)
        >>> fused_attention("self_attn", qkv="qkv_proj", o="o_proj", rule=rule, rotary=True)
        JointQKVAttentionBridge('self_attn')
    """
    return JointQKVAttentionBridge(
        name,
        submodules={
            **_maps(qkv=qkv, o=o, gate=gate),
            **_there(q_norm=q_norm, k_norm=k_norm, o_norm=o_norm),
            **others,
        },
        qkv_conversion_rule=rule,
        has_rotary=rotary,
        has_alibi=alibi,
        repeats_keys=repeats_keys,
        requires_attention_mask=needs_mask,
        attention_mask_4d=needs_mask,
        split_qkv_matrix=split,
        output_is_overwritten=overwritten,
        has_sinks=sinks,
        **options,
    )


def latent_attention(
    name: str,
    *,
    kv_a: Linear,
    kv_a_norm: NormalizationBridge,
    kv_b: Linear,
    o: Linear,
    d_head_nope: int,
    d_head_rope: int,
    d_head_v: int,
    q: Linear | None = None,
    q_a: Linear | None = None,
    q_a_norm: Norm = None,
    q_b: Linear | None = None,
    rotary: bool = True,
    others: Parts = NONE,
    **options: Unpack[LatentOptions],
) -> LatentAttentionBridge:
    """Returns multi-head latent attention: keys and values of all heads come from one low-rank projection.

    Args:
        name: Its module.
        kv_a: The map to the latent, and to the rotated channels that all keys share.
        kv_a_norm: The norm of the latent.
        kv_b: The map from the latent to keys and values.
        o: The output projection.
        d_head_nope: Channels of a head's query and key that are not rotated; they come first.
        d_head_rope: Channels that are rotated.
        d_head_v: Channels of a head's value.
        q: The map to queries, or None where `q_a`, `q_a_norm` and `q_b` make them by a latent of their own.
        q_a: The map to the queries' latent.
        q_a_norm: Its norm.
        q_b: The map from it to queries.
        rotary: Whether positions are rotated into queries and keys.
        others: Further parts by canonical name.
        **options: What few models have, by the names of the component's attributes.

    Example:
        >>> latent_attention(
        ...     "self_attn", q="q_proj", kv_a="kv_a_proj_with_mqa", kv_b="kv_b_proj", o="o_proj",
        ...     kv_a_norm=norm("kv_a_layernorm", rms=True, axes=WIDTH), d_head_nope=12, d_head_rope=8, d_head_v=10,
        ... ).d_head_nope
        12
    """
    return LatentAttentionBridge(
        name,
        submodules={
            **_maps(q=q, q_a=q_a, q_b=q_b),
            **_there(q_a_norm=q_a_norm),
            **_maps(kv_a=kv_a, o=o),
            **_there(kv_a_norm=kv_a_norm),
            **_maps(kv_b=kv_b),
            **others,
        },
        d_head_nope=d_head_nope,
        d_head_rope=d_head_rope,
        d_head_v=d_head_v,
        has_rotary=rotary,
        **options,
    )


# --- MLPs ------------------------------------------------------------------------------------------------------------


def mlp(
    name: str | None,
    *,
    in_: Linear,
    out: Linear,
    act: str | None = None,
    norm: Norm = None,
    layout: Layout = Layout.TOKENS,
    overwritten: bool = False,
    others: Parts = NONE,
) -> MLPBridge:
    """Returns an MLP without a gate: two linear maps around an activation function.

    Args:
        name: Its module, or None where the block itself calls the maps.
        in_: The map to the hidden layer.
        out: The map from it.
        act: The activation function's module, without a module of the MLP's.
        norm: The norm of the hidden layer, before the map from it.
        layout: How rows and positions lie in all of it.
        overwritten: Whether the model writes into its output's storage afterwards.
        others: Further parts by canonical name.

    Example:
        >>> mlp("mlp", in_="fc1", out="fc2").submodules
        {'in': LinearBridge('fc1'), 'out': LinearBridge('fc2')}
    """
    maps = _maps(layout, in_=in_, out=out)
    maps["out"].output_is_overwritten |= overwritten
    acts = _there(act=None if act is None else ActivationBridge(act, layout=layout), norm=norm)
    whole = Layout.TOKENS if name is None else layout
    return MLPBridge(name, submodules={**maps, **acts, **others}, layout=whole, output_is_overwritten=overwritten)


def gated_mlp(
    name: str,
    *,
    gate: Linear,
    in_: Linear,
    out: Linear,
    norm: Norm = None,
    layout: Layout = Layout.TOKENS,
    **options: Unpack[BranchOptions],
) -> GatedMLPBridge:
    """Returns a gated MLP: `out(act(gate(x)) * in_(x))`.

    Args:
        name: Its module.
        gate: The map to what goes through the activation function.
        in_: The map to what it is multiplied with.
        out: The map from the hidden layer.
        norm: The norm of the hidden layer, before the map from it.
        layout: How rows and positions lie in all of it.
        **options: What few models have, by the names of the component's attributes.

    Example:
        >>> list(gated_mlp("mlp", gate="gate_proj", in_="up_proj", out="down_proj").submodules)
        ['gate', 'in', 'out']
    """
    parts = {**_maps(layout, gate=gate, in_=in_, out=out), **_there(norm=norm)}
    return GatedMLPBridge(name, submodules=parts, layout=layout, **options)


def fused_gated_mlp(
    name: str, *, gate_up: Linear, out: Linear, gate_is_second: bool = False, **options: Unpack[BranchOptions]
) -> JointGateMLPBridge:
    """Returns a gated MLP whose gate and linear branch are the halves of one map's output.

    Args:
        name: Its module.
        gate_up: The map to both, the gate first.
        out: The map from the hidden layer.
        gate_is_second: Whether the linear branch comes first instead.
        **options: What few models have, by the names of the component's attributes.

    Example:
        >>> fused_gated_mlp("mlp", gate_up="gate_up_proj", out="down_proj")
        JointGateMLPBridge('mlp')
    """
    parts = _maps(gate_up=gate_up, out=out)
    return JointGateMLPBridge(name, submodules=parts, gate_is_second=gate_is_second, **options)


def mixture(
    name: str,
    *,
    router: str | RouterBridge,
    experts: str | ExpertsBridge = "experts",
    shared: GeneralizedComponent | None = None,
    shared_gate: Linear | None = None,
    transposed: bool = False,
    runs_all: bool = False,
    layout: Layout = Layout.TOKENS,
    others: Parts = NONE,
    **options: Unpack[MixtureOptions],
) -> MoEBridge:
    """Returns a mixture of experts.

    Args:
        name: Its module.
        router: Its router's module, or the router.
        experts: The module of all experts, or the experts.
        shared: The experts that see every token, if there are any.
        shared_gate: The map to the number that multiplies their output.
        transposed: Whether the experts' weights are `[expert, in, out]`.
        runs_all: Whether all experts run on all tokens.
        layout: How rows and positions lie in its input and output.
        others: Further parts by canonical name.
        **options: What few mixtures have, by the names of the component's attributes.

    Example:
        >>> list(mixture("mlp", router="gate").submodules)
        ['router', 'experts']
    """
    every = ExpertsBridge(experts, is_transposed=transposed) if isinstance(experts, str) else experts
    chooser = RouterBridge(router) if isinstance(router, str) else router
    parts = {**_there(router=chooser, experts=every, shared=shared), **_maps(shared_gate=shared_gate), **others}
    return MoEBridge(name, submodules=parts, runs_all=runs_all, layout=layout, **options)


# --- blocks and the frame --------------------------------------------------------------------------------------------


def block(
    name: str,
    *,
    attn: GeneralizedComponent | None = None,
    mixer: GeneralizedComponent | None = None,
    mlp: GeneralizedComponent | None = None,
    ln1: Norm = None,
    ln1_post: Norm = None,
    ln2: Norm = None,
    ln2_post: Norm = None,
    parallel: bool = False,
    stages: Stages | None = None,
    norms: Mapping[str, str] = MappingProxyType({}),
    attn_out: str | None = None,
    mlp_out: str | None = None,
    outs: Mapping[str, str] = MappingProxyType({}),
    residual_multiplier: Factor | Mapping[str, Factor] = 1.0,
    stream_multiplier: Factor | Sequence[Factor] = 1.0,
    residual_offset: Mapping[str, Terms] = MappingProxyType({}),
    stream_dtype: torch.dtype | None = None,
    stream_outs: Sequence[str] = (),
    input_multipliers: Mapping[str, float] = MappingProxyType({}),
    norms_the_sum: bool = False,
    residual_is_normed: bool = False,
    others: Parts = NONE,
) -> BlockBridge:
    """Returns the blocks. A part that differs from layer to layer is a `PerLayer`.

    Args:
        name: Their list.
        attn: Attention.
        mixer: What mixes positions in its place, or beside it.
        mlp: The MLP, or the mixture of experts.
        ln1: The norm before attention.
        ln1_post: The norm on attention's output.
        ln2: The norm before the MLP.
        ln2_post: The norm on the MLP's output.
        parallel: Whether attention and MLP read the same residual stream; without `ln2` they share `ln1`.
        stages: Names of the sublayers, those of one stage together; by default `attn`, `mixer` and `mlp`, as far as
            they are there, are a stage each.
        norms: Sublayers whose norm has another name than the place of their stage says, each with the norm's.
        attn_out: The module whose output attention adds, where that is not attention itself.
        mlp_out: The module whose output the MLP adds, where that is not the MLP itself.
        outs: The same for other sublayers, by their names.
        residual_multiplier: What contributions are multiplied by: all, or each by its sublayer's name.
        stream_multiplier: What the stream is multiplied by before contributions are added, for all stages or each.
        residual_offset: What is added to contributions after that, by their sublayers' names: sums of products of
            parameters.
        stream_dtype: The stream's dtype, where it is not the model's.
        stream_outs: Modules whose outputs are the stream before the second stage and those after it, where norms read a
            copy of it.
        input_multipliers: What sublayers' inputs are multiplied by after the norm, by their names.
        norms_the_sum: Whether `ln1` and `ln2` come after a sublayer, on its sum with the residual stream.
        residual_is_normed: Whether the residual branch takes the norm's output.
        others: Further parts by canonical name, such as the sublayers `attn2` and `mlp2`.

    Example:
        >>> both = attention("attn", q="q", k="k", v="v", o="o"), mlp("mlp", in_="up", out="down")
        >>> block("transformer.h", ln1=norm("ln_1"), attn=both[0], mlp=both[1], parallel=True).is_parallel
        True
    """
    sublayers = _there(attn=attn, mixer=mixer, mlp=mlp)
    parts = _there(ln1=ln1, attn=attn, mixer=mixer, ln1_post=ln1_post, ln2=ln2, mlp=mlp, ln2_post=ln2_post)
    usual = PARALLEL if parallel else tuple((key,) for key in sublayers)
    return BlockBridge(
        name,
        submodules={**parts, **others},
        stages=stages or usual,
        norms=dict(norms),
        outs={**{key: path for key, path in (("attn", attn_out), ("mlp", mlp_out)) if path}, **outs},
        residual_multiplier=residual_multiplier,
        stream_multiplier=stream_multiplier,
        residual_offset=dict(residual_offset),
        stream_dtype=stream_dtype,
        stream_outs=stream_outs,
        input_multipliers=dict(input_multipliers),
        norms_the_sum=norms_the_sum,
        residual_is_normed=residual_is_normed,
    )


def embedding(
    name: str,
    *,
    multiplier: Factor = 1.0,
    offset: Terms = (),
    ends_at: str | None = None,
    overwritten: bool = False,
) -> EmbeddingBridge:
    """Returns the token embedding.

    Args:
        name: Its module.
        multiplier: What the model multiplies the embedding by outside its module.
        offset: What it adds to that product: sums of products of parameters.
        ends_at: The norm or projection through which it reaches the residual stream, or None.
        overwritten: Whether the model writes into its output's storage afterwards.

    Example:
        >>> embedding("model.embed_tokens", multiplier=12.0).multiplier
        12.0
    """
    return EmbeddingBridge(
        name, multiplier=multiplier, offset=offset, ends_at=ends_at, output_is_overwritten=overwritten
    )


def pos_embedding(
    name: str,
    *,
    offset: int = 0,
    from_mask: bool = False,
    table: str | None = "weight",
    padding_id: int | None = None,
    ends_in_embed: bool = False,
    layout: Layout = Layout.TOKENS,
) -> PosEmbedBridge:
    """Returns a learned position embedding.

    Args:
        name: Its module.
        offset: Rows of the table before that of position 0.
        from_mask: Whether the module's input is the padding mask, not positions.
        table: The parameter with a row for each position, or None where rows are computed.
        padding_id: The token whose positions the model does not count, or None where it counts all.
        ends_in_embed: Whether its sum with the token embedding passes the norm or map at which the embedding ends.
        layout: How rows and positions lie in its output.

    Example:
        >>> pos_embedding("transformer.wpe").offset
        0
    """
    return PosEmbedBridge(
        name,
        offset=offset,
        input_is_positions=not from_mask,
        table=table,
        padding_id=padding_id,
        ends_in_embed=ends_in_embed,
        layout=layout,
    )


def unembedding(
    name: str,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    input_scale: float = 1.0,
    n_logits: int | None = None,
) -> UnembeddingBridge:
    """Returns the unembedding.

    Args:
        name: Its module.
        scale: What the model multiplies its output by.
        softcap: Where the model caps the scaled logits by `cap * tanh(logits / cap)`, or None.
        input_scale: What the model multiplies the last norm's output by before it, outside of any module.
        n_logits: How many of its first outputs are logits, where the others only pad the vocabulary.

    Example:
        >>> unembedding("lm_head", scale=0.0625).scale
        0.0625
    """
    return UnembeddingBridge(name, scale=scale, softcap=softcap, input_scale=input_scale, n_logits=n_logits)


def decoder(
    *,
    embed: str | EmbeddingBridge,
    blocks: BlockBridge | PerLayer,
    type_embed: TypeEmbedBridge | None = None,
    embed_norm: Norm = None,
    project_in: str | None = None,
    pos_embed: str | PosEmbedBridge | None = None,
    ln_final: Norm = None,
    head: LogitHeadBridge | None = None,
    project_out: str | None = None,
    unembed: str | UnembeddingBridge = "lm_head",
    others: Parts = NONE,
) -> Mapping[str, GeneralizedComponent]:
    """Returns the mapping of a decoder, in the order of its forward.

    Args:
        embed: The token embedding.
        blocks: The blocks; a `PerLayer` where they are of several kinds.
        type_embed: The embedding of the type of text, which is the same vector for all tokens here.
        embed_norm: The norm of the embedding.
        project_in: The map from the embedding to the residual stream, where their widths differ.
        pos_embed: The learned position embedding.
        ln_final: The norm after the last block.
        head: What lies between the last norm and the unembedding.
        project_out: The map from the residual stream to the unembedding's width.
        unembed: The unembedding.
        others: Further parts by canonical name.

    Example:
        >>> parts = attention("attn", q="q", k="k", v="v", o="o"), mlp("mlp", in_="up", out="down")
        >>> blocks = block("h", ln1=norm("ln_1"), attn=parts[0], ln2=norm("ln_2"), mlp=parts[1])
        >>> list(decoder(embed="wte", pos_embed="wpe", blocks=blocks, ln_final=norm("ln_f")))
        ['embed', 'pos_embed', 'blocks', 'ln_final', 'unembed']
    """
    return {
        "embed": embedding(embed) if isinstance(embed, str) else embed,
        **_there(embed_norm=embed_norm),
        **_maps(project_in=project_in),
        **_there(pos_embed=pos_embedding(pos_embed) if isinstance(pos_embed, str) else pos_embed),
        **_there(type_embed=type_embed),
        "blocks": blocks,
        **_there(ln_final=ln_final, head=head),
        **_maps(project_out=project_out),
        "unembed": unembedding(unembed) if isinstance(unembed, str) else unembed,
        **others,
    }
