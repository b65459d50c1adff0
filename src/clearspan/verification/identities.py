"""What must hold between a model's hook points, as data: what is computed of some points equals another.

The same statements are checked on a run as it is and on one in which points were written: a write to a point must be in
everything that is computed of it.
"""

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from clearspan.components import (
    BlockBridge,
    GatedNormBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    InnerNormBridge,
    LinearBridge,
    MixerBridge,
    MLPBridge,
    MultiStreamBlockBridge,
    NormalizationBridge,
    OpaqueAttentionBridge,
    StreamMapsBridge,
    StreamsBridge,
)
from clearspan.model import Model
from clearspan.verification.statement import Statement, Values
from clearspan.verification.weights import of_weights
from clearspan.weights.processing import final_norm, has_head, readout

Part = TypeVar("Part", bound=GeneralizedComponent)


def statements(model: Model) -> Iterator[Statement]:
    """Yields the identities of a bridge's architecture, in the order of the forward."""
    embeddings = ("hook_embed", "hook_pos_embed", "hook_type_embed")
    embedded = tuple(name for name in embeddings if name in model.hook_dict)
    for layer, block in enumerate(model.blocks):
        if block.seam:
            pass  # what enters is something else
        elif not layer:
            yield from _embedded(embedded, model)
        else:
            yield _sum((model.blocks[layer - 1].leaves,), block.enters)
        for identity in block.identities():
            yield Statement(str(identity), identity.terms, identity.total, identity.added)
        for part in block.walk():
            yield from _of_component(part, block)
            yield from of_weights(part)
    yield from _collapsed(model)
    for part in model.components:
        if isinstance(part, NormalizationBridge):
            yield from _of_norm(part)
        if not isinstance(part, BlockBridge):
            yield from of_weights(part)
    if not has_head(model):
        yield _read_out(model)
    yield _logits(model)


def _embedded(terms: tuple[str, ...], model: Model) -> Iterator[Statement]:
    """Yields that the embeddings are what enters the first block: the stream, or each of several."""
    block = model.blocks[0]
    if not isinstance(block, MultiStreamBlockBridge):
        yield _sum(terms, block.enters)
        return
    expand = _part(model, StreamMapsBridge, "expand")
    if expand is not None:
        text = f"hook_embed through {expand.path}, as large as it was, == {block.enters}"
        yield Statement(text, ("hook_embed",), block.enters, lambda values: expand.expanded(values["hook_embed"]))
        return
    total, n_streams = block.enters, block.streams.n_streams

    def copied(values: Values) -> Tensor:
        first, *others = (values[name] for name in terms)
        return sum(others, first).unsqueeze(2).expand(-1, -1, n_streams, -1)

    yield Statement(f"{' + '.join(terms)} in each stream == {total}", terms, total, copied)


def _collapsed(model: Model) -> Iterator[Statement]:
    """Yields that the streams that leave the last block are collapsed to what the final norm reads."""
    maps, last = _part(model, StreamMapsBridge, "collapse"), model.blocks[-1].leaves
    if maps is not None:
        text = f"mean of the streams of {last}, through {maps.path}, == ln_final.hook_in"
        yield Statement(text, (last,), "ln_final.hook_in", lambda values: maps.collapsed(values[last]))
    if _collapse(model) is not None:
        yield _sum((model.blocks[-1].leaves,), "collapse.hook_in")
        if final_norm(model) is not None:
            yield _sum(("collapse.hook_out",), "ln_final.hook_in")


def _collapse(model: Model) -> StreamsBridge | None:
    """Returns the part that makes one vector of the last streams, if there is one."""
    return _part(model, StreamsBridge, "collapse")


def _part(model: Model, kind: type[Part], name: str) -> Part | None:
    """Returns the part of a kind outside the blocks that has a name, if there is one."""
    return next((part for part in model.components if isinstance(part, kind) and part.path == name), None)


def _sum(terms: tuple[str, ...], total: str) -> Statement:
    def added(values: Values) -> Tensor:
        first, *others = (values[name] for name in terms)
        return sum(others, first)

    return Statement(f"{' + '.join(terms)} == {total}", terms, total, added)


def _of_component(part: GeneralizedComponent, block: BlockBridge) -> Iterator[Statement]:
    match part:
        case NormalizationBridge():
            yield from _of_norm(part)
        case MLPBridge():
            yield from _of_output_map(f"{part.path}.hook_post", part.submodules["out"])
        case MixerBridge():
            yield from _of_output_map(f"{part.path}.hook_ssm_out", part.out_proj)
            yield from _of_mixer(part)
        case OpaqueAttentionBridge(keys_are_positions=True):
            yield _softmax(part.path, has_sinks=part.has_sinks)
        case GeneralAttentionBridge() if part in (*block.attentions, *block.feeders):
            yield from _of_attention(part)


def _of_norm(norm: NormalizationBridge) -> Iterator[Statement]:
    if isinstance(norm, InnerNormBridge):
        return
    out = f"{norm.path}.norm.hook_out" if isinstance(norm, GatedNormBridge) else f"{norm.path}.hook_out"
    if isinstance(norm, GatedNormBridge):
        gate, gated = f"{norm.path}.gate.hook_out", f"{norm.path}.hook_out"
        text = f"{out} * sigmoid({gate}) == {gated}"
        yield Statement(text, (out, gate), gated, lambda values: norm.gated(values[out], values[gate]))
    source, scale, normalized = (f"{norm.path}.{name}" for name in ("hook_in", "hook_scale", "hook_normalized"))

    def centred(values: Values) -> Tensor:
        value = values[source]
        return value if norm.uses_rms_norm else value - value.mean(-1, keepdim=True)

    yield Statement(
        f"{scale} * {normalized} restores the norm's input",
        (source,),
        normalized,
        lambda values: values[scale] * values[normalized],
        centred,
    )
    yield Statement(
        f"{normalized} with weight and bias == {out}",
        (normalized,),
        out,
        lambda values: norm.affine(values[normalized]),
    )


def _of_output_map(source: str, out: GeneralizedComponent) -> Iterator[Statement]:
    if isinstance(out, LinearBridge):
        yield Statement(
            f"{source} through the output weight and bias == {out.path}.hook_out",
            (source,),
            f"{out.path}.hook_out",
            lambda values: linear(values[source], out.matrix, out.bias_or_none()),
            through=(out,),
        )


def _of_mixer(mixer: MixerBridge) -> Iterator[Statement]:
    """Yields that effective attention times what the state sums up, with what is skipped, is the result."""
    names = {value: f"{mixer.path}.{name}" for name, (_, value) in mixer.kind.points.items()}
    if "attention" not in names:
        return
    role = next(passed for passed in mixer.kind.roles if "attention" in passed.axes)
    attention, carried, out = names["attention"], names[role.carried], names["out"]
    # States and A at one position are written into the recurrence, of which the matrix is not computed anew.
    causes = tuple(name for value, name in names.items() if value not in ("attention", "state", "A", "out"))

    def attended(values: Values) -> Tensor:
        result = torch.einsum("bhqk,bkhd->bqhd", values[attention], values[carried])
        return result + mixer.D[:, None] * values[carried] if "D" in role.axes else result

    skipped = f" + D * {carried}" if "D" in role.axes else ""
    yield Statement(f"{attention} @ {carried}{skipped} == {out}", (*causes, attention), out, attended)


def _softmax(path: str, *, has_sinks: bool) -> Statement:
    """Returns that the softmax of an attention's scores is its pattern."""
    scores, pattern = f"{path}.hook_attn_scores", f"{path}.hook_pattern"

    def attends(values: Values) -> Tensor:
        share = values[pattern].sum(-1, keepdim=True) if has_sinks else 1  # a sink takes the rest of each row
        return values[scores].softmax(-1) * share

    said = ", but for the sink's share" if has_sinks else ""
    return Statement(f"softmax({scores}) == {pattern}{said}", (scores,), pattern, attends)


def _of_attention(attention: GeneralAttentionBridge) -> Iterator[Statement]:
    path = attention.path
    pattern, v, z, result = (f"{path}.hook_{name}" for name in ("pattern", "v", "z", "result"))
    yield _softmax(path, has_sinks=attention.has_sinks and not attention.sink_scales_z)

    def weighted(values: Values) -> Tensor:
        found = values[v] * attention.value_scale
        heads = values[pattern].shape[1]
        found = found.repeat_interleave(heads // found.shape[2], dim=2)
        product = torch.einsum("bhqk,bkhd->bqhd", values[pattern], found)
        if not attention.sink_scales_z:
            return product
        along = (product * values[z]).sum(-1, keepdim=True)
        return product * along / product.square().sum(-1, keepdim=True).clamp(min=1e-30)

    scaled = "" if attention.value_scale == 1 else f" * {attention.value_scale}"
    share = ", but for the sink's share" if attention.sink_scales_z else ""
    yield Statement(f"{pattern} @ {v}{scaled} == {z}{share}", (pattern, v), z, weighted)
    out = f"{attention.o.path}.hook_out"

    def summed(values: Values) -> Tensor:
        bias = attention.o.bias_or_none()
        total = values[result].sum(2)
        return total if bias is None else total + bias

    yield Statement(f"sum over heads of {result} + b_O == {out}", (result,), out, summed, through=(attention.o,))
    joined = attention.joined
    o_norm = attention.submodules.get("o_norm")
    if isinstance(o_norm, NormalizationBridge):
        normed, after = f"{o_norm.path}.hook_normalized", f"{o_norm.path}.hook_out"
        yield Statement(
            f"{z}, normed, == {normed}", (z,), normed, lambda values: o_norm.normalize(values[z].flatten(2))
        )
        yield Statement(
            f"{after} == {joined}",
            (after,),
            joined,
            lambda values: values[after].unflatten(-1, (attention.n_heads, -1)),
        )
    elif joined != z:
        gate = f"{path}.hook_gate"

        def gated(values: Values) -> Tensor:
            by = values[gate]
            return values[z] * (by.unsqueeze(-1) if attention.gate_is_of_head else by)

        yield Statement(f"{z} * {gate} == {joined}", (z, gate), joined, gated)
    yield Statement(
        f"{joined} through W_O + b_O == {out}",
        (joined,),
        out,
        lambda values: linear(values[joined].flatten(2), attention.o.matrix, attention.o.bias_or_none()),
        through=(attention.o,),
    )


def _read_out(model: Model) -> Statement:
    """Returns that nothing but linear maps and a factor lies between the last norm, or stream, and the unembedding."""
    norm, (*maps, unembed) = final_norm(model), readout(model)
    last = model.blocks[-1].leaves if _collapse(model) is None else "collapse.hook_out"
    start = last if norm is None else f"{norm.path}.hook_out"

    def read(values: Values) -> Tensor:
        value = values[start]
        for part in maps:
            value = linear(value, part.matrix, part.bias_or_none())
        return value * model.unembed.input_scale

    text = " through ".join((start, *(part.path for part in maps)))
    return Statement(f"{text}, scaled, == {unembed.path}.hook_in", (start,), f"{unembed.path}.hook_in", read)


def _logits(model: Model) -> Statement:
    unembed, cfg = model.unembed, model.cfg

    def logits(values: Values) -> Tensor:
        found = linear(values["unembed.hook_in"], unembed.matrix, unembed.bias_or_none()) * cfg.logit_scale
        cap = cfg.output_logits_soft_cap
        return found if cap is None else cap * torch.tanh(found / cap)

    text = "unembed.hook_in through the unembedding, scaled and capped == hook_logits"
    return Statement(text, ("unembed.hook_in",), "hook_logits", logits, through=(unembed,))
