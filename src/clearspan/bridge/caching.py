"""Running with a cache."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clearspan.bridge.cache import ActivationCache
from clearspan.bridge.forward import Output, ReturnType, gradients_lost, run
from clearspan.bridge.index import Segment
from clearspan.bridge.inputs import ModelInput
from clearspan.errors import InvalidArgumentError
from clearspan.hf.derived_gradients import Arrival, derived_gradient
from clearspan.hf.recording import Recording, RecordingPlan, Transform
from clearspan.points import Derivation, Derived, HookPoint, NamesFilter, Place, Side, Whole

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
    choice = _choose(bridge, names_filter, segment, incl_bwd)
    points = choice.points
    may_defer = "past_key_values" not in given.kwargs
    recording = Recording(_transform(_position_index(pos_slice), device), may_defer)
    gradients: Mapping[str, Tensor] = {}
    if incl_bwd:
        output, gradients = _run_backward(bridge, given, segment, return_type, loss_per_token, choice, recording)
    else:
        with bridge.taps.record(choice.needed, choice.plan, recording):
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
        needed: These, and with gradients also those around the targets of derived ones.
        plan: The plan of the needed points' places.
        weighted: Derivations of the points whose look-up uses the model's weights, by the point's name.
    """

    points: Mapping[str, HookPoint]
    needed: Sequence[HookPoint]
    plan: RecordingPlan
    weighted: Mapping[str, Derivation]


def _choose(bridge: "TransformerBridge", names: NamesFilter, segment: Segment, incl_bwd: bool) -> Choice:
    """Returns the choice of a filter; that of a name, a list, or None is remembered."""
    key = None if callable(names) else (names if isinstance(names, str | None) else tuple(names), segment, incl_bwd)
    if key in bridge.choices:
        return bridge.choices[key]
    points = bridge.index.select(names, segment)
    needed = {point.name: point for point in points}
    if incl_bwd:
        targets = {point.access.derivation.target for point in points if isinstance(point.access, Derived)}
        for place in targets | {Place(target.module, Side.INPUT) for target in targets}:
            needed.update({point.name: point for point in bridge.index.at(place)})
    plan = RecordingPlan.of(bridge.hf_model, {point.place for point in needed.values()})
    derived = {point.name: point.access.derivation for point in points if isinstance(point.access, Derived)}
    weighted = {name: derivation for name, derivation in derived.items() if derivation.weights()}
    choice = Choice({point.name: point for point in points}, tuple(needed.values()), plan, weighted)
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
    points = choice.points
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
    values: dict[str, Tensor] = {}
    ends = {_end(point, bridge) for point in points.values() if isinstance(point.access, Derived)}
    sinks = [
        point
        for point in bridge.index
        if point.name in ends or (point.name in points and not isinstance(point.access, Derived))
    ]
    with contextlib.ExitStack() as stack:
        for point in sinks:
            stack.callback(_set_sink, point, None)
            _set_sink(point, lambda at, value: values.__setitem__(at.name, value))
        stack.enter_context(bridge.taps.record(choice.needed, choice.plan, recording))
        both = run(bridge, given, segment, "both")
    assert isinstance(both, tuple), "return_type 'both' gives two"
    logits, loss = both
    found = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
    gradients = {name: grad for name, grad in zip(values, found, strict=True) if grad is not None}
    for point in points.values():
        if isinstance(point.access, Derived):
            gradients[point.name] = _derived(bridge, point, recording, gradients)
    outputs = {"logits": logits.detach(), "loss": loss.detach(), "both": (logits.detach(), loss.detach()), None: None}
    return outputs[return_type], {name: gradients[name] for name in points if name in gradients}


def _derived(
    bridge: "TransformerBridge", point: HookPoint, recording: Recording, gradients: Mapping[str, Tensor]
) -> Tensor:
    assert isinstance(point.access, Derived), "only derived points have a target"
    target = point.access.derivation.target
    entered = recording.raw(Place(target.module, Side.INPUT))
    arrival = Arrival(recording.raw(target), recording.raw(point.place), {}, entered)
    return derived_gradient(point.access.derivation, point.access.part, arrival, gradients[_end(point, bridge)])


def _end(point: HookPoint, bridge: "TransformerBridge") -> str:
    """Returns the name of the point that is the whole raw tensor at a derived point's target."""
    assert isinstance(point.access, Derived), "only derived points have a target"
    target = point.access.derivation.target
    return next(p.name for p in bridge.index.at(target) if isinstance(p.access, Whole))


def _set_sink(point: HookPoint, sink: Any) -> None:
    point.gradient_sink = sink
    point._changed(point)


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
