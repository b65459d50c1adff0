"""Ablation of directions by weights: what writes to the residual stream loses its component along them.

It works on a model that shares its parameters with another one: a shared parameter is replaced, never written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clearspan.components import (
    BlockBridge,
    EmbeddingBridge,
    GeneralizedComponent,
    LinearBridge,
    LinearMap,
    NormalizationBridge,
    PosEmbedBridge,
    Sublayer,
    TypeEmbedBridge,
)
from clearspan.errors import InexactProcessingError, InvalidArgumentError
from clearspan.weights.parameters import OwnParameters
from clearspan.weights.processing import Processable, Step

Part = Literal["embed", "attn", "mixer", "mlp"]
"""What writes to the residual stream: embeddings of tokens, positions and types, or sublayers of a kind."""
PARTS: tuple[Part, ...] = ("embed", "attn", "mixer", "mlp")


@dataclass(frozen=True)
class Addition:
    """What one part of a model adds to the residual stream: `scale * norm(sum of the maps' outputs)`.

    Attributes:
        path: The part, such as `blocks.0.attn`.
        part: Its kind.
        layer: Its layer; None for embeddings.
        maps: The linear maps, or tables with a row for each token, whose outputs are summed.
        norm: The norm on the sum, or None.
        scale: What the model multiplies by: a number, or `[d_model]`.
        unknown: Why the rest does not say what it adds, or empty.
    """

    path: str
    part: Part
    layer: int | None
    maps: tuple[LinearMap, ...]
    norm: NormalizationBridge | None = None
    scale: float | Tensor = 1.0
    unknown: str = ""

    @property
    def parameters(self) -> Iterator[tuple[nn.Module, str, int]]:
        """Yields the weights and biases of the maps by module and name, each with its axis of outputs."""
        for each in self.maps:
            yield each.module, each.weight, each.out_axis
            if each.bias is not None and each.bias_holder._parameters.get(each.bias) is not None:
                yield each.bias_holder, each.bias, -1


@dataclass(frozen=True)
class Removal:
    """What a parameter loses: its vectors `v` along an axis become `v - (v @ read.T) @ give`.

    Attributes:
        module: The module that holds the parameter.
        name: Its name there.
        axis: The axis along which it has vectors of the residual stream's width, counted from the end.
        read: What is measured of a vector.
        give: What is taken away for each of these.
    """

    module: nn.Module
    name: str
    axis: int
    read: Float[Tensor, "direction d_model"]
    give: Float[Tensor, "direction d_model"]

    def of(self, weight: Tensor) -> Tensor:
        """Returns the weight without what is removed, computed in float32 at least."""
        exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).movedim(self.axis, -1)
        taken = exact @ self.read.to(exact).T @ self.give.to(exact)
        return (exact - taken).movedim(-1, self.axis).to(weight.dtype).contiguous()


def orthogonalize(
    model: Processable,
    basis: Float[Tensor, "direction d_model"],
    parts: Sequence[Part],
    layers: Sequence[int] | None,
    *,
    rescale: bool,
) -> Step:
    """Takes directions out of what chosen parts write, and returns what was done.

    Args:
        model: A model on shared parameters, which are replaced.
        basis: Orthonormal directions, in float64.
        parts: The kinds of part.
        layers: Layers of the sublayers; None for all.
        rescale: Whether outputs that go through a norm may lose the directions before it, and be normed anew.

    Raises:
        InexactProcessingError: A chosen part adds something that its weights cannot be without. Nothing was done.
        InvalidArgumentError: There is no such part.
    """
    whole = list(additions(model))
    chosen = [each for each in whole if each.part in parts and (layers is None or each.layer in (None, *layers))]
    if not chosen:
        expected = ", ".join(dict.fromkeys(repr(each.part) for each in whole))
        raise InvalidArgumentError("no part of these kinds, in these layers", expected=expected, got=", ".join(parts))
    for each in chosen:
        _check_known(model, each, rescale=rescale)
    removals = _by_parameter(model, [removal for each in chosen for removal in _removals(each, basis)])
    _check_apart(model, chosen, [each for each in whole if each not in chosen])
    parameters = OwnParameters(model.parameters())
    for same in removals:
        new = same[0].of(same[0].module.get_parameter(same[0].name))
        for removal in same:
            parameters.replace(removal.module, removal.name, new)
            removal.module._parameters[removal.name] = same[0].module._parameters[same[0].name]
    normed = sum(1 for each in chosen if each.norm is not None)
    directions = f"{len(basis)} direction{'s' * (len(basis) > 1)}"
    renewed = f"; {normed} of them are normed anew" if normed else ""
    return Step("orthogonalize", f"{directions} taken out of what {len(chosen)} parts write{renewed}")


# --- what is added ---------------------------------------------------------------------------------------------------


def additions(model: Processable) -> Iterator[Addition]:
    """Yields what each part adds to the residual stream, embeddings first."""
    yield from _of_embeddings(model)
    for layer, block in enumerate(model.blocks):
        for sublayer in block.sublayers:
            yield _of_sublayer(layer, block, sublayer)


def _of_sublayer(layer: int, block: BlockBridge, sublayer: Sublayer) -> Addition:
    maps = tuple(sublayer.part.adds())
    unknown = ""
    if not block.keeps_directions:
        unknown = "the stream after the block is not the one before it, or a multiple of that, plus what sublayers add"
    elif not maps:
        unknown = "what it adds is not known to come from linear maps"
    elif sublayer.offset is not None:
        unknown = "the block adds a vector to it"
    return Addition(sublayer.part.path, sublayer.kind, layer, maps, sublayer.norm_after, sublayer.multiplier, unknown)


Embedded = PosEmbedBridge | TypeEmbedBridge


def _of_embeddings(model: Processable) -> Iterator[Addition]:
    """Yields what the embeddings add: each its table's rows, or those that end in a norm or a linear map together."""
    others = [part for part in model.components if isinstance(part, Embedded)]
    yield _of_tokens(model, model.embed, [part for part in others if part.ends_in_embed])
    for part in others:
        if not part.ends_in_embed:
            maps, unknown = _table(part)
            yield Addition(part.path, "embed", None, maps, unknown=unknown)


def _of_tokens(model: Processable, embed: EmbeddingBridge, inside: Sequence[Embedded]) -> Addition:
    end = next((part for part in model.components if part.module_path == embed.ends_at), None)
    tables = [_table(part) for part in (embed, *inside)]
    maps, unknown = sum((found for found, _ in tables), ()), next((reason for _, reason in tables if reason), "")
    if isinstance(end, LinearBridge):
        maps, unknown = (end.map,), ""
    elif embed.ends_at is not None and not isinstance(end, NormalizationBridge):
        unknown = f"what {embed.ends_at} does to it is not known"
    if embed.submodules:
        unknown = f"its own module does more to a token's row: {', '.join(embed.submodules)}"
    if embed.offset:
        unknown = "the model adds a vector to it"
    norm = end if isinstance(end, NormalizationBridge) else None
    return Addition(embed.path, "embed", None, maps, norm, embed.factor, unknown)


def _table(part: GeneralizedComponent) -> tuple[tuple[LinearMap, ...], str]:
    """Returns an embedding's table, or why it has none."""
    name = part.table if isinstance(part, PosEmbedBridge) else "weight"
    if name is None or part.name is None:
        return (), "it is computed for each position, and has no weights"
    if part.acting._parameters.get(name) is None:
        return (), f"its table {name!r} is no parameter"
    return (LinearMap(part.acting, name, None, in_axis=-2, out_axis=-1),), ""


# --- what is removed -------------------------------------------------------------------------------------------------


def _removals(addition: Addition, basis: Float[Tensor, "direction d_model"]) -> Iterator[Removal]:
    """Yields what each parameter of a part loses, so that what it adds has no component along the directions."""
    scale = addition.scale.detach().to(basis) if isinstance(addition.scale, Tensor) else torch.ones_like(basis[0])
    norm = addition.norm
    read, give = basis * scale, basis / scale
    if norm is not None:
        bias = norm.module._parameters.get("bias")
        if bias is not None:
            yield Removal(norm.module, "bias", -1, read, give)
        # Given its scale the norm is linear: what it makes of an output has no component where these rows have none.
        rows = read * norm.w.detach().to(read) if norm.has("weight") else read
        read = rows if norm.uses_rms_norm else rows - rows.mean(-1, keepdim=True)
        give = torch.linalg.pinv(read).T
    for module, name, axis in addition.parameters:
        yield Removal(module, name, axis, read, give)


def _by_parameter(model: Processable, removals: Sequence[Removal]) -> list[list[Removal]]:
    """Returns removals by parameter: several where modules share one."""
    found: dict[int, list[Removal]] = {}
    for removal in removals:
        same = found.setdefault(id(removal.module._parameters[removal.name]), [])
        same.append(removal)
        if not torch.equal(same[0].read, removal.read):
            raise InexactProcessingError(
                "directions cannot be taken out of these weights",
                where=f"{removal.name} of {type(removal.module).__name__} in {model.cfg.architecture}",
                reason="several parts share it, and what they make of its output differs",
            )
    return list(found.values())


def _check_known(model: Processable, addition: Addition, *, rescale: bool) -> None:
    """Raises unless the weights of a part say what it adds, and can be without a direction."""
    where = f"{addition.path} in {model.cfg.architecture}"
    reason, fix = addition.unknown, None
    if not reason and isinstance(addition.scale, Tensor) and not addition.scale.all():
        reason = "the model multiplies some channels of its output by zero"
    if not reason and addition.norm is not None:
        if not addition.norm.is_linear_at_scale:
            reason = f"{addition.norm.path} does more to its output than a norm does"
        elif not rescale:
            reason = f"{addition.norm.path} norms its output, and the weights before it cannot keep the norm's scale"
            fix = "rescale=True, which norms anew what is left of the output: no component, but another length"
    if reason:
        raise InexactProcessingError(
            "directions cannot be taken out of these weights",
            where=where,
            reason=reason,
            fix=fix or "interventions at run time: ProjectOut at the points of what is added, or parts= without it",
        )


def _check_apart(model: Processable, chosen: Sequence[Addition], others: Sequence[Addition]) -> None:
    """Raises where parts that were not chosen share parameters with those that were."""
    theirs = {id(module._parameters[name]): each.path for each in others for module, name, _ in each.parameters}
    for each in chosen:
        for module, name, _ in each.parameters:
            other = theirs.get(id(module._parameters[name]))
            if other is not None:
                raise InexactProcessingError(
                    "directions cannot be taken out of these parts alone",
                    where=model.cfg.architecture,
                    reason=f"{each.path} and {other} share a parameter",
                    fix="layers=None, or both layers",
                )
