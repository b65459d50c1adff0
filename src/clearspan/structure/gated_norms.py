"""Norms whose output a gate multiplies that is made of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clearspan.components import GatedNormBridge, GeneralizedComponent, InnerNormBridge
from clearspan.structure.algebra import NormKind, norm_kind, same
from clearspan.structure.trace import Trace, Visit


@dataclass(frozen=True)
class GatedNorm:
    """What was found of a gated norm.

    Attributes:
        whole: Its call.
        norm: The call of the norm in it.
        gate: The call of the module whose output, through a sigmoid, multiplies the norm's.
        kind: How the norm norms.
    """

    whole: Visit
    norm: Visit
    gate: Visit
    kind: NormKind


def find_gated_norm(trace: Trace, whole: Visit) -> GatedNorm | None:
    """Returns the norm and the gate of which a module is made, or None where it is no gated norm."""
    if whole.entered is None or whole.left is None or whole.entered.shape != whole.left.shape:
        return None
    if len(whole.module._modules) < 2:
        return None
    inside = trace.inside(whole)
    for norm in inside:
        kind = norm_kind(norm) if same(norm.entered, whole.entered) else None
        if kind is not None and norm.left is not None:
            gate = _gate(inside, norm.left, whole.left)
            return None if gate is None else GatedNorm(whole, norm, gate, kind)
    return None


def _gate(inside: Sequence[Visit], normed: torch.Tensor, gated: torch.Tensor) -> Visit | None:
    """Returns the call whose output, through a sigmoid, multiplies a norm's that it reads."""
    read = (one for one in inside if one.left is not None and one.left.shape == gated.shape)
    after = (one for one in read if same(one.entered, normed))
    return next((one for one in after if one.left is not None and same(normed * one.left.sigmoid(), gated)), None)


def gated_norm_template(found: GatedNorm, name: str) -> GatedNormBridge:
    """Returns the template of a gated norm of the residual stream."""
    start = f"{found.whole.path}."
    return GatedNormBridge(
        name,
        submodules={
            "norm": InnerNormBridge(
                found.norm.path.removeprefix(start),
                uses_rms_norm=found.kind.is_rms,
                weight_offset=found.kind.offset,
            ),
            "gate": GeneralizedComponent(found.gate.path.removeprefix(start)),
        },
        uses_rms_norm=found.kind.is_rms,
        weight_offset=found.kind.offset,
    )
