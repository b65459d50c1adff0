"""Identities of weights: each weight, read by its letter, computes one point of another."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from clearspan.components import (
    CutGateMLPBridge,
    EmbeddingBridge,
    GatedMLPBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    HeadAttentionBridge,
    LatentAttentionBridge,
    LinearBridge,
    MLPBesideMixtureBridge,
    MLPBridge,
    MoEBridge,
    NormalizationBridge,
    PerLayerInputBridge,
    PosEmbedBridge,
    RouterBridge,
)
from clearspan.components.attention import Projection
from clearspan.verification.statement import Statement, Values


def of_weights(part: GeneralizedComponent) -> Iterator[Statement]:
    """Yields the identities of one component's weights."""
    match part:
        case LinearBridge():
            yield _of_map(part)
        case GeneralAttentionBridge():
            yield from _of_attention(part)
        case MLPBridge():
            yield from _of_mlp(part)
        case MLPBesideMixtureBridge():
            yield from ()  # the identities of the block say what it adds
        case MoEBridge():
            yield from _of_mixture(part)
        case RouterBridge(changes_input=False):
            yield _of_router(part)
        case EmbeddingBridge():
            yield _of_embedding(part)
        case PosEmbedBridge(table=str()):
            yield _of_positions(part)


def _of_map(part: LinearBridge) -> Statement:
    into, out = f"{part.path}.hook_in", f"{part.path}.hook_out"
    return Statement(
        f"{into} through its weight and bias == {out}",
        (into,),
        out,
        lambda values: linear(values[into], part.matrix, part.bias_or_none()),
        through=(part,),
    )


def _of_attention(attention: GeneralAttentionBridge) -> Iterator[Statement]:
    for projection in attention.path_projections:
        yield _of_projection(attention, projection)
    if isinstance(attention, LatentAttentionBridge):
        yield _of_latent_values(attention)


def _of_projection(attention: GeneralAttentionBridge, projection: Projection) -> Statement:
    into, out = f"{attention.reader(projection).path}.hook_in", f"{attention.path}.hook_{projection}"
    heads = attention.n_heads if projection == "q" else attention.n_kv_heads

    def projected(values: Values) -> Tensor:
        by_head = values[into].unsqueeze(2).expand(-1, -1, heads, -1)
        return attention.project(by_head, projection)

    letter = projection.upper()
    holder = (attention.holder(projection),) if isinstance(attention, HeadAttentionBridge) else ()
    return Statement(f"{into} through W_{letter} + b_{letter} == {out}", (into,), out, projected, through=holder)


def _of_latent_values(attention: LatentAttentionBridge) -> Statement:
    into = f"{attention.reader('v').path}.hook_in"
    scale, out = (f"{attention.path}.{name}" for name in ("kv_a_norm.hook_scale", "hook_v"))

    def projected(values: Values) -> Tensor:
        return torch.einsum("bpm,hmv->bphv", values[into], attention.W_V) / values[scale].unsqueeze(-1)

    text = f"{into} through W_V, over the latents' scale, == {out}"
    return Statement(text, (into,), out, projected, through=(attention.kv_a, attention.kv_b))


def _of_mlp(mlp: MLPBridge) -> Iterator[Statement]:
    into = f"{mlp.first.path}.hook_in"

    def through(weight: str, bias: str, holder: GeneralizedComponent) -> Callable[[Values], Tensor]:
        def mapped(values: Values) -> Tensor:
            added = getattr(mlp, bias) if holder.has("bias") else None
            return linear(values[into], getattr(mlp, weight).T, added)

        return mapped

    letters = {"hook_pre": ("gate", "W_gate", "b_gate"), "hook_pre_linear": ("in", "W_in", "b_in")}
    if not isinstance(mlp, GatedMLPBridge):
        letters = {"hook_pre": ("in", "W_in", "b_in")}
    for name, (key, weight, bias) in letters.items():
        holder = mlp.submodules.get(key, mlp.submodules.get("gate_up"))
        if name == "hook_pre" and isinstance(mlp, CutGateMLPBridge):
            continue  # it is cut off on its way from the map
        if holder is None and isinstance(mlp, PerLayerInputBridge):
            continue  # its linear branch is no map's
        assert isinstance(holder, LinearBridge), f"{key} is a linear map"
        out = f"{mlp.path}.{name}"
        yield Statement(
            f"{into} through {weight} + {bias} == {out}", (into,), out, through(weight, bias, holder), through=(holder,)
        )
    post, out = f"{mlp.path}.hook_post", mlp.submodules["out"]
    yield Statement(
        f"{post} through W_out + b_out == {out.path}.hook_out",
        (post,),
        f"{out.path}.hook_out",
        lambda values: linear(values[post], mlp.W_out.T, mlp.b_out if out.has("bias") else None),
        through=(mlp.out,),
    )
    if "act" in mlp.submodules:
        ends = (("hook_pre", "act.hook_in"), ("act.hook_out", "hook_post"))
        for first, then in ends[:1] if isinstance(mlp, GatedMLPBridge) else ends:
            cause, result = f"{mlp.path}.{first}", f"{mlp.path}.{then}"
            yield Statement(f"{cause} == {result}", (cause,), result, lambda values, cause=cause: values[cause])


def _of_mixture(mixture: MoEBridge) -> Iterator[Statement]:
    if not mixture.experts.has_ends:
        return
    path, parts = mixture.path, mixture.submodules
    first = f"{path}.{'project_out' if 'project_out' in parts else 'experts'}.hook_out"
    shared = (f"{path}.shared.hook_out",) if "shared" in parts else ()
    gate = (f"{path}.shared_gate.hook_out",) if "shared_gate" in parts else ()
    out = f"{path}.{'norm.hook_in' if 'norm' in parts else 'hook_out'}"

    def added(values: Values) -> Tensor:
        total = values[first] * mixture.multiplier
        for name in shared:
            own = values[name] * mixture.shared_multiplier
            total = total + (torch.sigmoid(values[gate[0]]) * own if gate else own)
        return total

    gated = f"sigmoid({gate[0]}) * " if gate else ""
    terms = [f"{first}{_times(mixture.multiplier)}"]
    terms += [f"{gated}{name}{_times(mixture.shared_multiplier)}" for name in shared]
    yield Statement(f"{' + '.join(terms)} == {out}", (first, *shared, *gate), out, added)
    pairs = (
        ("project_in.hook_out", "experts.hook_in"),
        ("experts.hook_out", "project_out.hook_in"),
        ("norm.hook_out", "hook_out"),
    )
    for one, other in pairs:
        if one.partition(".")[0] in parts and (other == "hook_out" or other.partition(".")[0] in parts):
            start, end = f"{path}.{one}", f"{path}.{other}"
            yield Statement(f"{start} == {end}", (start,), end, lambda values, start=start: values[start])


def _times(number: float) -> str:
    return "" if number == 1 else f" * {number:g}"


def _of_router(router: RouterBridge) -> Statement:
    into, out = f"{router.path}.hook_in", f"{router.path.rpartition('.')[0]}.hook_router_logits"

    def scored(values: Values) -> Tensor:
        if not router.logits and not router.holder:
            weight = router.weight("weight")
            return linear(values[into].to(weight.dtype), weight, router.bias_or_none())
        module = next(router.reads()).module
        weight = module.get_parameter("weight")
        return linear(values[into].to(weight.dtype), weight, module._parameters.get("bias"))

    return Statement(f"{into} through the router's weight == {out}", (into,), out, scored)


def _of_embedding(embed: EmbeddingBridge) -> Statement:
    ids, out, norm = f"{embed.path}.hook_in", f"{embed.path}.hook_out", embed.submodules.get("norm")

    def looked_up(values: Values) -> Tensor:
        rows = embed.W_E[values[ids]]
        if isinstance(norm, NormalizationBridge):
            return norm.affine(norm.normalize(rows))
        # Gemma's module itself multiplies by a constant.
        return rows * ((rows * values[out]).sum((1, 2), True) / rows.square().sum((1, 2), True))

    passed = "times a constant" if norm is None else "normed"
    return Statement(f"rows of W_E at {ids}, {passed}, == {out}", (ids,), out, looked_up)


def _of_positions(positions: PosEmbedBridge) -> Statement:
    out = f"{positions.path}.hook_out"

    def looked_up(values: Values) -> Tensor:
        rows, length = values[out].shape[:2]
        return positions.W_pos[:length].expand(rows, -1, -1)

    return Statement(f"the first rows of W_pos == {out}", (), out, looked_up)
