"""A model with other weights: a copy on the same tensors, but for those that processing or an ablation changes."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.checks import check_flags, tensor_of, whole_numbers
from clearspan.components import GeneralizedComponent, OpaqueBridge, RemainderBridge, StreamsBridge
from clearspan.errors import InvalidArgumentError, UnreadableWeightError
from clearspan.hf.adapted import merge
from clearspan.hf.modules import sharing_copy, untie
from clearspan.model import Model, like
from clearspan.modes import no_grad
from clearspan.weights.orthogonal import PARTS, Part, additions, orthogonalize
from clearspan.weights.processing import Step, process

Own = TypeVar("Own", bound=Model)


@no_grad
def processed(model: Own, steps: Mapping[str, bool | None]) -> Own:
    """Returns a new model with processed weights. The steps are the arguments of `TransformerBridge.processed`."""
    check_flags(**{name: wanted for name, wanted in steps.items() if wanted is not None})
    _check_readable(model, lambda part: not isinstance(part, _OPAQUE))
    return _changed(model, lambda new: process(new, steps))


@no_grad
def orthogonalized(
    model: Own,
    directions: Tensor,
    parts: Sequence[Part] | Part | None,
    layers: int | Sequence[int] | None,
    *,
    rescale: bool,
) -> Own:
    """Returns a new model that writes nothing along directions: see `TransformerBridge.orthogonalized`."""
    check_flags(rescale=rescale)
    basis = _basis(directions, model.cfg.d_model)
    given = PARTS if parts is None else [parts] if isinstance(parts, str) else parts
    named: Sequence[Part] = [part for part in PARTS if isinstance(given, list | tuple) and part in given]
    if not named or len(named) < len(given):
        raise InvalidArgumentError(f"parts={parts!r}"[:80], expected=f"some of {', '.join(map(repr, PARTS))}")
    if parts is None and layers is not None:
        named = [part for part in PARTS if part != "embed"]
    wanted = None if layers is None else [_layer(model, layer) for layer in whole_numbers("layers", layers)]
    writers = {each.module for addition in additions(model) for each in addition.maps}
    _check_readable(model, lambda part: part.acting in writers)
    return _changed(model, lambda new: (orthogonalize(new, basis, named, wanted, rescale=rescale),))


def _basis(directions: Tensor, d_model: int) -> Float[Tensor, "direction d_model"]:
    """Returns orthonormal directions that span those given, in float64 on the CPU."""
    given = tensor_of("directions", directions).detach().to("cpu", torch.float64)
    rows = torch.atleast_2d(given)
    if rows.ndim != 2 or rows.shape[1] != d_model or not len(rows):
        expected, got = f"[{d_model}] or [k, {d_model}]", str(list(given.shape))
        raise InvalidArgumentError("no directions of the residual stream", expected=expected, got=got)
    if not rows.isfinite().all() or not rows.any(1).all():
        raise InvalidArgumentError("a direction is zero, infinite or NaN", expected="directions of some length")
    found = torch.linalg.svd(rows / rows.norm(dim=1, keepdim=True), full_matrices=False)
    return found.Vh[found.S / found.S[0] > _INDEPENDENT]


_INDEPENDENT = 1e-6
"""Singular value, relative to the largest, below which directions of float32 are sums of the others."""


def _layer(model: Model, layer: int) -> int:
    n_layers = model.cfg.n_layers
    if not -n_layers <= layer < n_layers:
        raise InvalidArgumentError(f"no layer {layer}", expected=f"-{n_layers} to {n_layers - 1}")
    return layer % n_layers


def _changed(model: Own, change: Callable[[Own], tuple[Step, ...]]) -> Own:
    """Returns a copy on the same tensors, in which a function replaces some, with the steps that it returns."""
    hf_model = sharing_copy(model.hf_model)
    merge(hf_model)
    new = like(model, hf_model)
    new.processing = (*model.processing, *change(new))
    if model.tied and not new.tied:
        untie(new.hf_model)
    return new


_OPAQUE = (OpaqueBridge, RemainderBridge, StreamsBridge)
"""Parts whose inside is not known, in which nothing is processed."""


def _check_readable(model: Model, is_changed: Callable[[GeneralizedComponent], bool]) -> None:
    """Raises if a weight that may be changed is quantised or not known, or a module is inside a wrapper."""
    for component in model.components:
        for part in component.walk():
            if part.is_wrapped:
                raise UnreadableWeightError(
                    "a model with wrapped modules cannot be processed",
                    where=f"{type(part.module).__name__} at {part.module_path}",
                    reason="what the wrapper does to the output is not known, and processed weights may change it",
                    fix="process it before it is wrapped",
                )
            if part.name is None or part.submodules or not part.has("weight") or not is_changed(part):
                continue
            part.parameter("weight")
            if part.is_quantised:
                raise UnreadableWeightError(
                    "a quantised model cannot be processed",
                    where=part.path,
                    reason="processed weights are other numbers, which would have to be quantised anew",
                    fix="load it without quantisation",
                )
