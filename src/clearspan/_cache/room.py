"""Room for a cache: what a filter chose, what it will take, and whether there is as much."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clearspan._cache.memory import bytes_as_text, free_bytes
from clearspan._cache.plan import Bound, CachePlan, Terms, plan_of
from clearspan._cache.slices import PosSlice
from clearspan._forward.given import ModelInput, check_length
from clearspan.checks import wholes
from clearspan.components import ExpertsBridge
from clearspan.errors import CacheTooLargeError, InvalidArgumentError, UnplannableError
from clearspan.hf.keywords import without_kv_cache
from clearspan.hf.modules import execution_device
from clearspan.hf.recording import Recording, RecordingPlan
from clearspan.hf.rehearsal import ELSEWHERE, rehearse
from clearspan.hf.storages import Copies
from clearspan.index import PointIndex, Segment
from clearspan.model import Model
from clearspan.points import Address, Derived, HookPoint, NamesFilter, Offered
from clearspan.points.names import answers_of

REMEMBERED = 64
"""Filters whose choices a bridge remembers."""

CHECKED_FROM = 2**26
"""Bytes from which on a cache is compared with free memory. To ask for that would take as long as a smaller run."""


@dataclass(frozen=True)
class Choice:
    """What a names filter chose, ready to be recorded.

    Attributes:
        points: The points that the cache will have, by name.
        plan: The plan of the points' places.
        index: All points of the model.
        needed: Bytes that its caches took in rehearsals, by what they depend on.
    """

    points: Mapping[str, HookPoint]
    plan: RecordingPlan
    index: PointIndex
    needed: dict[object, int] = field(default_factory=dict)

    @functools.cached_property
    def is_raw(self) -> bool:
        """Whether each point is read from the raw tensor of a place of the plan."""
        return not any(isinstance(point.access, Offered) for point in self.points.values())

    @functools.cached_property
    def is_of_streams(self) -> bool:
        """Whether no point is inside a sublayer, nor computed on look-up: weights of sublayers say nothing of them."""
        points = self.points.values()
        return not any(Address.parse(point.name).component or isinstance(point.access, Derived) for point in points)

    @functools.cached_property
    def bound(self) -> Bound:
        """How large its caches are at most."""
        return Bound.of(self.points.values(), self.index)


def choose(model: Model, names: NamesFilter, segment: Segment = (None, None)) -> Choice:
    """Returns the choice of a filter.

    Choices are remembered: by names, and of a predicate by what its answers follow from, or by what it holds for.
    """
    choices: dict[object, Choice] = model.remembered.setdefault("choices", {})
    if isinstance(names, list | set | frozenset | Mapping):
        names = tuple(names)
    is_names = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
    is_known = names is None or isinstance(names, str | re.Pattern) or is_names
    asked, points = names if is_known else answers_of(names), None
    if asked is None and names is not None:
        points = model.index.select(names, segment)
        asked = tuple(point.name for point in points)
    key = asked, segment
    if key not in choices:
        if points is None:
            points = model.index.select(names, segment)
        if names is None:
            points = [point for point in points if not point.is_computed]
        if len(choices) >= REMEMBERED:
            choices.clear()
        plan = RecordingPlan.of({point.place for point in points if not isinstance(point.access, Offered)})
        choices[key] = Choice({point.name: point for point in points}, plan, model.index)
    return choices[key]


def planned(
    model: Model,
    choice: Choice,
    input_shape: Sequence[int],
    pos_slice: PosSlice,
    device: torch.device | str | None,
) -> CachePlan:
    """Returns the plan of a choice's cache. The arguments are those of `TransformerBridge.plan_cache`."""
    match wholes(input_shape):
        case (rows, positions) if rows > 0 and positions > 0:
            check_length(model, positions)
        case _:
            raise InvalidArgumentError(
                "cannot plan for this shape", expected="rows and positions, such as tokens.shape", got=repr(input_shape)
            )
    offered = [name for name, point in choice.points.items() if isinstance(point.access, Offered)]
    if offered:
        raise UnplannableError(
            "what a sparse autoencoder computes cannot be planned", where=offered[0], fix="bridge.reset_saes() before"
        )
    # Some models warn of ids that stand for padding.
    ids = torch.full((rows, positions), int(model.cfg.hf.get("pad_token_id") == 0))
    terms = Terms.of((rows, positions), pos_slice, device)
    recording = _rehearsed(model, choice, terms, {"input_ids": ids, "use_cache": False})
    return plan_of(recording, choice.points.values(), terms)


def check_room(model: Model, choice: Choice, everything: Choice, terms: Terms, given: ModelInput) -> None:
    """Raises if a run's cache is larger than the memory that is free where it is kept.

    While a cache is small this costs nothing that could be measured: a bound, known from the points alone, comes first,
    and the forward is rehearsed only where the bound does not fit. Under autocast, which changes dtypes, and where
    free memory cannot be read, nothing is known.

    Args:
        model: The model.
        choice: What is kept.
        everything: The choice of all points, whose bound was computed before.
        terms: On what terms it is kept.
        given: What the model is run on.

    Raises:
        CacheTooLargeError: It is; nothing was run.
    """
    if everything.bound.numbers(terms) * 8 < CHECKED_FROM:
        return
    numbers = choice.bound.numbers(terms)
    if numbers * 8 < CHECKED_FROM:
        return
    devices = _devices(model) if terms.device is None else {_full(terms.device)}
    free = [free_bytes(device) for device in devices]
    known = sum(size for size in free if size is not None)
    if None in free or numbers * max(4, model.hf_model.dtype.itemsize) <= known:
        return
    if torch.is_autocast_enabled(model.device.type):
        return
    kwargs = _without_state(model, given)
    key = (*_shapes(kwargs), terms.kept_positions, terms.device, model.hf_model.dtype, model.hf_model.training)
    try:
        if key not in choice.needed:
            choice.needed[key] = _rehearsed(model, choice, terms, kwargs).nbytes()
        if choice.needed[key] <= known:
            return
        plan = plan_of(_rehearsed(model, choice, terms, kwargs), choice.points.values(), terms)
    except UnplannableError:
        return
    raise _too_large(plan, known, sorted(map(str, devices)))


def _without_state(model: Model, given: ModelInput) -> dict[str, Any]:
    """Returns a run's keywords for its rehearsal: without the KV cache, which must not be extended.

    What a run on a KV cache keeps of the positions in it is not counted.
    """
    kwargs = without_kv_cache(given.kwargs)
    if "inputs_embeds" in kwargs:  # a residual stream, where a run starts at a layer, may have another width
        shape = *kwargs["inputs_embeds"].shape[:2], model.embed.width
        kwargs["inputs_embeds"] = kwargs["inputs_embeds"].new_empty(shape, device="meta")
    return {**kwargs, "use_cache": False}


def _shapes(kwargs: Mapping[str, Any]) -> list[tuple[object, ...]]:
    return [(name, *value.shape) for name, value in sorted(kwargs.items()) if isinstance(value, Tensor)]


def _rehearsed(model: Model, choice: Choice, terms: Terms, kwargs: Mapping[str, Any]) -> Recording:
    """Returns what a run would keep, as shapes."""
    is_elsewhere = terms.device is not None and {_full(terms.device)} != _devices(model)
    recording = replace(terms, device=ELSEWHERE if is_elsewhere else None).recording(Copies())
    parts = (part for component in model.components for part in component.walk())
    experts = [part.module for part in parts if isinstance(part, ExpertsBridge)]
    rehearse(model.hf_model, choice.plan.places, recording, kwargs, experts)
    return recording


def _devices(model: Model) -> set[torch.device]:
    return {execution_device(block.module) for block in model.blocks}


def _full(device: torch.device) -> torch.device:
    """Returns a device with its number, as tensors tell it."""
    return torch.empty(0, device=device).device


def _too_large(plan: CachePlan, free: int, devices: Sequence[str]) -> CacheTooLargeError:
    largest = ", ".join(f"{name} ({bytes_as_text(size)})" for name, size in plan.largest(3))
    fewer = "keep fewer points with names_filter, or fewer positions with pos_slice"
    return CacheTooLargeError(
        "the cache does not fit in memory; nothing was run",
        expected=f"at most {bytes_as_text(free)}, which is free on {', '.join(devices)}",
        got=f"{bytes_as_text(plan.total_bytes)} for batch {plan.rows}, pos {plan.positions}",
        reason=f"the largest are {largest}",
        fix=fewer if devices == ["cpu"] else f"{fewer}, or keep it in main memory with device='cpu'",
    )
