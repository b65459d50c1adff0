"""Running with a cache."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clearspan.bridge.cache import ActivationCache
from clearspan.bridge.forward import Output, ReturnType, gradients_lost, run
from clearspan.bridge.index import Segment
from clearspan.bridge.inputs import ModelInput
from clearspan.errors import ConflictingWritesError, InvalidArgumentError
from clearspan.hf.derived_gradients import Arrival
from clearspan.hf.recording import Recording, RecordingPlan, Transform
from clearspan.points import Derivation, Derived, HookPoint, NamesFilter

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge

PosSlice = int | tuple[int, ...] | Sequence[int] | slice | Tensor | None
"""Positions to keep: one (its axis goes), `(start, stop[, step])`, a list, a slice, or a tensor of indices."""


def run_with_cache(
    bridge: "TransformerBridge",
    given: ModelInput,
    segment: Segment,
    return_type: ReturnType | None,
    loss_per_token: bool,
    *,
    names_filter: NamesFilter,
    device: torch.device | str | None,
    pos_slice: PosSlice,
    incl_bwd: bool,
) -> tuple[Output, ActivationCache]:
    """Runs the model and keeps what was asked for. The arguments are those of `TransformerBridge.run_with_cache`."""
    choice = _choose(bridge, names_filter, segment)
    points = choice.points
    may_defer = "past_key_values" not in given.kwargs
    recording = Recording(_transform(_position_index(pos_slice), device), may_defer)
    gradients: Mapping[str, Tensor] = {}
    if incl_bwd:
        output, gradients = _run_backward(bridge, given, segment, return_type, loss_per_token, choice, recording)
    else:
        with bridge.taps.record(choice.points.values(), choice.plan, recording):
            output = run(bridge, given, segment, return_type, loss_per_token)
    value = given.kwargs.get("input_ids", given.kwargs.get("inputs_embeds"))
    assert isinstance(value, Tensor), "a prepared input has ids or embeddings"
    cache = ActivationCache(
        points,
        bridge.index.find,
        recording,
        n_layers=bridge.cfg.n_layers,
        rows=len(value),
        one_position=isinstance(pos_slice, int),
        gradients=gradients,
        weighted=choice.weighted,
    )
    return output, cache


@dataclass(frozen=True)
class Choice:
    """What a names filter chose, ready to be recorded.

    Attributes:
        points: The points that the cache will have, by name.
        plan: The plan of the points' places.
        weighted: Derivations of the points whose look-up uses the model's weights, by the point's name.
    """

    points: Mapping[str, HookPoint]
    plan: RecordingPlan
    weighted: Mapping[str, Derivation]


def _choose(bridge: "TransformerBridge", names: NamesFilter, segment: Segment) -> Choice:
    """Returns the choice of a filter; that of a name, a list, or None is remembered."""
    key = None if callable(names) else (names if isinstance(names, str | None) else tuple(names), segment)
    if key in bridge.choices:
        return bridge.choices[key]
    points = bridge.index.select(names, segment)
    plan = RecordingPlan.of(bridge.hf_model, {point.place for point in points})
    derived = {point.name: point.access.derivation for point in points if isinstance(point.access, Derived)}
    weighted = {name: derivation for name, derivation in derived.items() if derivation.weights()}
    choice = Choice({point.name: point for point in points}, plan, weighted)
    if key is not None:
        bridge.choices[key] = choice
    return choice


def _run_backward(
    bridge: "TransformerBridge",
    given: ModelInput,
    segment: Segment,
    return_type: ReturnType | None,
    loss_per_token: bool,
    choice: Choice,
    recording: Recording,
) -> tuple[Output, dict[str, Tensor]]:
    if segment[1] is not None or loss_per_token:
        raise InvalidArgumentError("incl_bwd=True needs a scalar loss", got="stop_at_layer or loss_per_token")
    if recording.has_transform:
        raise InvalidArgumentError("incl_bwd=True keeps whole tensors where they are", got="pos_slice or device")
    lost = gradients_lost(bridge)
    if lost is not None:
        raise InvalidArgumentError(
            "incl_bwd=True does not work under gradient checkpointing",
            reason=lost,
            fix="bridge.hf_model.activation_checkpointing_disable()",
        )
    found: dict[str, Tensor | Arrival] = {}
    with contextlib.ExitStack() as stack:
        for point in choice.points.values():
            stack.enter_context(point.giving_gradient_to(lambda at, what: found.__setitem__(at.name, what)))
        stack.enter_context(bridge.taps.record(choice.points.values(), choice.plan, recording))
        both = run(bridge, given, segment, "both")
    assert isinstance(both, tuple), "return_type 'both' gives two"
    logits, loss = both
    ends = {name: what.output if isinstance(what, Arrival) else what for name, what in found.items()}
    at_ends = dict(zip(ends, torch.autograd.grad(loss, list(ends.values()), allow_unused=True), strict=True))
    gradients = {}
    for name, what in found.items():
        gradient = at_ends[name]
        if gradient is not None:
            with contextlib.suppress(ConflictingWritesError):  # a gradient that would miss a write is left out
                gradients[name] = what.gradient(gradient) if isinstance(what, Arrival) else gradient
    outputs = {"logits": logits.detach(), "loss": loss.detach(), "both": (logits.detach(), loss.detach()), None: None}
    return outputs[return_type], gradients


def _position_index(pos_slice: PosSlice) -> slice | Tensor | None:
    match pos_slice:
        case None:
            return None
        case bool():
            raise InvalidArgumentError(
                f"pos_slice={pos_slice!r}", expected="an int, a tuple, a list, a slice or a tensor"
            )
        case int():
            return slice(pos_slice, pos_slice + 1 or None)
        case slice():
            return pos_slice
        case tuple():
            return slice(*pos_slice)
        case Tensor():
            return pos_slice
        case _:
            return torch.tensor(list(pos_slice))


def _transform(index: slice | Tensor | None, device: torch.device | str | None) -> Transform | None:
    if index is None and device is None:
        return None

    def transform(tensor: Tensor, pos_dim: int) -> Tensor:
        if isinstance(index, slice):
            tensor = tensor[(slice(None),) * pos_dim + (index,)].clone()
        elif index is not None:
            tensor = tensor.index_select(pos_dim, index.to(tensor.device))
        return tensor if device is None else tensor.to(device)

    return transform
