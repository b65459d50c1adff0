"""Running with a cache."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clearspan._cache import room as cache_room
from clearspan._cache.plan import CachePlan, Terms
from clearspan._cache.room import Choice, choose
from clearspan._cache.run_weights import RunWeights
from clearspan._cache.slices import PosSlice, check_columns, plain
from clearspan._forward.forward import Output, ReturnType, check_return_type, gradients_lost, run
from clearspan._forward.given import ModelInput
from clearspan.cache import ActivationCache
from clearspan.checks import check_flags
from clearspan.errors import ConflictingWritesError, InvalidArgumentError, PointNotReachedError
from clearspan.hf.derived import Arrival
from clearspan.hf.nodes import Node
from clearspan.hf.recording import Recording
from clearspan.hf.sequence import of_all_positions
from clearspan.hf.storages import Copies
from clearspan.index import Segment
from clearspan.interrupts import let_through
from clearspan.model import Model
from clearspan.points import HookPoint, NamesFilter, ReadOnly
from clearspan.transfers import Outbound

Scalar = Callable[[Tensor], Tensor]
"""From what a run returns, logits or a residual stream, to the number whose gradients are wanted."""


@dataclass(frozen=True)
class ScalarOfSome:
    """A number whose gradients are kept at some points, whether or not their values are kept.

    Attributes:
        of: From what a run returns to the number.
        names: The points, by their names.
    """

    of: Scalar
    names: tuple[str, ...]

    def __call__(self, output: Tensor) -> Tensor:
        """Returns the number."""
        return self.of(output)


def run_with_cache(
    model: Model,
    given: ModelInput,
    segment: Segment = (None, None),
    return_type: ReturnType | None = "logits",
    loss_per_token: bool = False,
    *,
    names_filter: NamesFilter = None,
    device: torch.device | str | None = None,
    pos_slice: PosSlice = None,
    incl_bwd: bool | Scalar = False,
) -> tuple[Output, ActivationCache]:
    """Runs the model and keeps what was asked for. The arguments are those of `TransformerBridge.run_with_cache`.

    It is part of the run under way, `model.taps.run`.
    """
    if not callable(incl_bwd):
        check_flags(incl_bwd=incl_bwd)
    choice = choose(model, names_filter, segment)
    points = choice.points
    may_defer = given.kv_cache is None
    batch, pos_slice = given.batch, plain(pos_slice)
    if model.taps.drops_positions:
        given = replace(given, kwargs=of_all_positions(given.kwargs, batch.width))
    check_columns(pos_slice, batch)
    terms = Terms.of((batch.rows, batch.width), pos_slice, device, may_defer=may_defer)
    cache_room.check_room(model, choice, choose(model, None), terms, given)
    outbound = Outbound()
    recording = terms.recording(Copies(is_alone=not model.taps.is_listening), outbound)
    gradients: Mapping[str, Tensor] = {}
    with outbound:  # what is done here in Python is done while an accelerator computes
        if incl_bwd:
            scalar = incl_bwd if callable(incl_bwd) else None
            output, gradients = _run_backward(
                model, given, segment, return_type, loss_per_token, choice, recording, scalar
            )
        else:
            with model.taps.record(choice.points.values(), choice.plan, recording):
                output = run(model, given, segment, return_type, loss_per_token)
        check_kept(choice, names_filter, recording)
        weights = RunWeights(model, of_streams=choice.is_of_streams)
        cache = ActivationCache.of_run(model, points, recording, batch=batch, gradients=gradients, run_weights=weights)
    return output, cache


def plan_cache(
    model: Model,
    input_shape: Sequence[int],
    names_filter: NamesFilter,
    pos_slice: PosSlice,
    device: torch.device | str | None,
) -> CachePlan:
    """Returns what a cache will keep. The arguments are those of `TransformerBridge.plan_cache`."""
    with model.taps.turns.unseen():  # the model is copied, and nobody may be at work on it
        return cache_room.planned(model, choose(model, names_filter), input_shape, pos_slice, device)


def _run_backward(
    model: Model,
    given: ModelInput,
    segment: Segment,
    return_type: ReturnType | None,
    loss_per_token: bool,
    choice: Choice,
    recording: Recording,
    scalar: Scalar | None,
) -> tuple[Output, dict[str, Tensor]]:
    check_return_type(return_type)
    if (segment[1] is not None and scalar is None) or loss_per_token:
        raise InvalidArgumentError("incl_bwd=True needs a scalar loss", got="stop_at_layer or loss_per_token")
    if recording.has_transform:
        raise InvalidArgumentError("incl_bwd=True keeps whole tensors where they are", got="pos_slice or device")
    lost = gradients_lost(model)
    if lost is not None:
        raise InvalidArgumentError(
            "incl_bwd=True does not work under gradient checkpointing",
            reason=lost,
            fix="bridge.hf_model.eval(), which checkpoints nothing",
        )
    found: dict[str, list[Tensor | Arrival | Node]] = {}

    def note(point: HookPoint, what: Tensor | Arrival | Node) -> None:
        found.setdefault(point.name, []).append(what)

    chosen = map(model.index.find, scalar.names) if isinstance(scalar, ScalarOfSome) else choice.points.values()
    graded = [point for point in chosen if not isinstance(point.access, ReadOnly)]
    with (
        model.taps.giving_gradients(graded, note, given.batch.rows, given.batch.width),
        model.taps.record(choice.points.values(), choice.plan, recording),
    ):
        needs_loss = scalar is None or return_type in ("loss", "both")
        output = run(model, given, segment, "both" if needs_loss else "logits")
    logits, loss = output if isinstance(output, tuple) else (output, None)
    assert logits is not None, "both return types have logits"
    total = loss if scalar is None else _number(let_through(scalar, logits))
    assert total is not None, "without a function it is the loss"
    ends = [(name, what, _end(what)) for name, there in found.items() for what in there]
    tensors = {id(end): end for _, _, end in ends}  # several points of a place have one
    at = let_through(torch.autograd.grad, total, list(tensors.values()), allow_unused=True)
    at_ends = dict(zip(tensors, at, strict=True))
    gradients: dict[str, Tensor] = {}
    for name, what, end in ends:
        gradient = at_ends[id(end)]
        if gradient is not None:
            with contextlib.suppress(ConflictingWritesError):  # a gradient that would miss a write is left out
                own = gradient if isinstance(what, Tensor) else what.gradient(gradient)
                gradients[name] = gradients[name] + own if name in gradients else own
    logits, loss = logits.detach(), None if loss is None else loss.detach()
    match return_type:
        case "both":
            assert loss is not None, "it was asked for"
            return (logits, loss), gradients
        case "loss":
            return loss, gradients
    return None if return_type is None else logits, gradients


def _end(what: Tensor | Arrival | Node) -> Tensor:
    """Returns the tensor of the graph to which a point's gradient comes."""
    return what if isinstance(what, Tensor) else what.output


def _number(found: object) -> Tensor:
    """Returns what a function of a run's output gave, if it is one number that depends on it."""
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise InvalidArgumentError(
            "gradients are those of one number",
            expected="incl_bwd=function, from what the run returns to a tensor of one number",
            got=f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__,
        )
    if not found.requires_grad:
        raise InvalidArgumentError(
            "the function of what the run returns has no gradient",
            reason="its number does not depend on that by differentiable operations",
            fix="a smooth function, such as a logit, a log-probability or a loss, under torch.enable_grad()",
        )
    return found


def check_kept(choice: Choice, names: NamesFilter, recording: Recording) -> None:
    """Raises if a point that was asked for by name was not passed."""
    if not isinstance(names, str | list | tuple) or (choice.is_raw and recording.is_of_all(choice.plan)):
        return
    for point in choice.points.values():
        if not recording.has(point):
            raise PointNotReachedError(
                f"{point.name} was not reached",
                where=str(point.place),
                reason="the forward did not pass there in this run",
            )
