"""Recordings: the raw tensors of one forward, kept by reference."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from clearspan.hf.adapters import acting
from clearspan.hf.attention import AttentionCall, Call, Observer, StoredCall
from clearspan.hf.modules import arguments_at, execution_device
from clearspan.hf.observers import observed
from clearspan.hf.recording_plan import Ends, Inside, RecordingPlan
from clearspan.hf.storages import CountedViews, Relocation, storages
from clearspan.hf.tensors import argument, as_tokens, primary_input, primary_output
from clearspan.hf.torch_hooks import Seen, after, is_unhooked
from clearspan.modes import autocast_dtype, is_autocast_on, with_autocast
from clearspan.points import HookPoint, Layout, Passed, Place, Side
from clearspan.scopes import HERE, Scope
from clearspan.tree import module_at

Transform = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Contents:
    """What a recording holds, by name.

    Attributes:
        raw: Raw tensors by their place's key.
        values: Values in canonical axes by their point's name.
        calls: Attention's calls by their module's path.
        autocast: What autocast computed in during the run, or None where it was off.
    """

    raw: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    calls: Mapping[str, StoredCall]
    autocast: torch.dtype | None = None


def _inside(path: str) -> list[Place]:
    """Returns the places inside an attention module."""
    by_head = [Place(path, side, layout=Layout.HEADS_FIRST) for side in (Side.QUERY, Side.KEY)]
    return [*by_head, *(Place(path, side, layout=Layout.ROWS_BY_ROWS) for side in (Side.SCORES, Side.PATTERN))]


class Recording:
    """What one forward left behind: raw tensors by place, and values by point where there were listeners.

    The inside of attention is kept as the call of the attention function, whose tensors the forward made anyway; scores
    and pattern are computed from it, by the model's own eager function, when they are looked up. Attention that does
    not use transformers' interface computes them itself, and they are kept like any other tensor.

    Args:
        rows: Rows of the input.
        transform: Applied to a tensor and its position axis before it is kept (slicing, moving), or None.
        may_defer: Whether the inside of attention may be computed later. It may not if positions are picked, or if keys
            and values lie in a KV cache that later forwards may write.
        relocation: Brings attention's calls to where they are kept; by default they stay where they are.
        positions: How many tokens go into the forward, where that is known.

    Attributes:
        values: Values in canonical axes by point's name; they take precedence over raw tensors.
        wanted: Names of the points whose values come from the taps.
        autocast: What autocast computed in during the run, or None where it was off: look-ups compute as the run did.
    """

    def __init__(
        self,
        rows: int,
        transform: Transform | None = None,
        may_defer: bool = True,
        relocation: Relocation | None = None,
        positions: int | None = None,
    ) -> None:
        self.values: dict[str, Tensor] = {}
        self.wanted: frozenset[str] = frozenset()
        self.autocast: torch.dtype | None = None
        self._rows = rows
        self._positions = positions
        self._raw: dict[str, Tensor] = {}
        self._calls: dict[str, AttentionCall] = {}
        self._versions: dict[str, int] = {}
        self._counted = CountedViews()
        self._called: dict[Callable[..., Any], int] = {}
        self._transform = transform
        self._defers = may_defer
        self._relocation = relocation

    # --- reading -----------------------------------------------------------------------------------------------------

    def raw(self, place: Place) -> Tensor:
        """Returns the raw tensor of a place, rows and positions first."""
        if place.key not in self._raw and place.side.is_of_a_call:
            self._keep_inside(self._calls[place.owner], [place])
        return self._counted.of(self._raw[place.key])

    def value(self, point: HookPoint) -> Tensor | None:
        """Returns the value of a point, or None where its raw tensor was kept instead."""
        return self._counted.of(self.values[point.name]) if point.name in self.values else None

    def has(self, point: HookPoint) -> bool:
        """Whether the point's value was kept, or can be computed from what was."""
        inside = point.place.side.is_of_a_call and point.place.owner in self._calls
        return inside or point.name in self.values or point.place.key in self._raw

    def is_of_all(self, plan: RecordingPlan) -> bool:
        """Whether the raw tensor of each place of the plan that it keeps is there."""
        return len(self._raw) == len(plan.places)

    @property
    def has_transform(self) -> bool:
        """Whether tensors are sliced or moved before they are kept."""
        return self._transform is not None

    def was_edited(self, key: str) -> bool:
        """Whether the storage of what is kept under a place's key or a point's name was written since."""
        kept = self.values.get(key, self._raw.get(key))
        if kept is None:  # the inside of attention, not computed yet
            module = key.rpartition(":")[0]
            tensors = self._calls[module].tensors()
            return any(self._was_written(f"{module}:{name}", tensor) for name, tensor in tensors.items())
        return self._was_written(key, kept)

    def _was_written(self, key: str, tensor: Tensor) -> bool:
        if tensor.is_inference():
            return self._counted.was_written(tensor)
        return key in self._versions and tensor._version != self._versions[key]

    def is_deferred(self, place: Place) -> bool:
        """Whether a place's raw tensor has still to be computed."""
        return place.side.is_of_a_call and place.owner in self._calls and place.key not in self._raw

    def length(self, point: HookPoint) -> int:
        """Returns how many positions of a point were kept."""
        if self.is_deferred(point.place):
            return self._calls[point.place.owner].query.shape[2]
        return self._kept(point).shape[point.place.pos_dim]

    def n_keys(self, point: HookPoint) -> int:
        """Returns how many keys the scores or the pattern of a point have."""
        if self.is_deferred(point.place):
            return self._calls[point.place.owner].key.shape[2]
        return self._kept(point).shape[-1]

    def _kept(self, point: HookPoint) -> Tensor:
        return self.values[point.name] if point.name in self.values else self._raw[point.place.key]

    def nbytes(self) -> int:
        """Returns the bytes of all storages kept, each counted once."""
        return sum(storages(self.tensors()).values())

    def storages_for(self, point: HookPoint) -> dict[int, int]:
        """Returns the storages that are kept for a point, with their bytes."""
        key, path = point.place.key, point.place.owner
        if point.name in self.values or key in self._raw:
            return storages([self._kept(point)])
        return storages(self._calls[path].tensors().values())

    def tensors(self) -> Iterator[Tensor]:
        """Yields all tensors that are kept."""
        return (tensor for _, tensor in self._named())

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """Yields all tensors, each with the name under which `_versions` counts its edits."""
        yield from self._raw.items()
        yield from self.values.items()
        for path, call in self._calls.items():
            yield from ((f"{path}:{name}", tensor) for name, tensor in call.tensors().items())

    # --- moving and storing ------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> Self:
        """Returns a recording of the same on a device; tensors that shared a storage share one there."""
        return self.moved(Relocation(device))

    def moved(self, there: Relocation) -> Self:
        """Returns a recording of what `there` makes of the tensors."""
        new = copy.copy(self)
        new._transform, new._relocation = None, None
        new._raw = {key: there(tensor) for key, tensor in self._raw.items()}
        new.values = {name: there(tensor) for name, tensor in self.values.items()}
        new._calls = {path: call.to(there) for path, call in self._calls.items()}
        pairs = [(name, before, after) for (name, before), (_, after) in zip(self._named(), new._named(), strict=True)]
        if not any(after is before for _, before, after in pairs):
            new._counted = CountedViews()
        new._versions = {
            name: self._versions[name] if after is before else after._version
            for name, before, after in pairs
            if name in self._versions or (after is not before and not after.is_inference())
        }
        return new

    def contents(self) -> Contents:
        """Returns what is kept. It includes scores and patterns that cannot be computed from a stored call."""
        calls = {path: StoredCall.of(call) for path, call in self._calls.items()}
        for path in [path for path, stored in calls.items() if stored is None]:
            for place in _inside(path):
                self.raw(place)
        stored = {path: call for path, call in calls.items() if call is not None}
        left_out = {place.key for path in stored for place in _inside(path)}
        raw = {key: tensor for key, tensor in self._raw.items() if key not in left_out}
        return Contents(raw, self.values, stored, self.autocast)

    def of_points(self, points: Iterable[HookPoint]) -> Self:
        """Returns a recording of what these points alone need."""
        points = list(points)
        keys, owners = {point.place.key for point in points}, {point.place.owner for point in points}
        names = {point.name for point in points}
        new = copy.copy(self)
        new._raw = {key: tensor for key, tensor in self._raw.items() if key in keys}
        new.values = {name: tensor for name, tensor in self.values.items() if name in names}
        new._calls = {path: call for path, call in self._calls.items() if path in owners}
        return new

    @staticmethod
    def of(contents: Contents, rows: int, model: nn.Module) -> "Recording":
        """Returns a recording with the contents of another one, of a run with this many rows."""
        new = Recording(rows)
        new._raw, new.values = dict(contents.raw), dict(contents.values)
        new.autocast = contents.autocast
        new._calls = {
            owner: call.restored(acting(module_at(model, owner.partition("#")[0])))
            for owner, call in contents.calls.items()
        }
        new._versions = {name: tensor._version for name, tensor in new._named() if not tensor.is_inference()}
        return new

    # --- keeping -----------------------------------------------------------------------------------------------------

    def keep_raw(self, place: Place, tensor: Tensor) -> None:
        """Keeps a place's raw tensor, rows and positions first; a copy if the model will write into it."""
        self._keep(self._raw, place.key, tensor.clone() if place.is_overwritten else tensor, place.pos_dim)

    def keep_value(self, point: HookPoint, tensor: Tensor) -> None:
        """Keeps a point's value."""
        kept = tensor.clone() if point.place.is_overwritten else tensor
        self._keep(self.values, point.name, kept, point.place.pos_dim)

    def _keep_plain(self, key: str, tensor: Tensor) -> None:
        """Keeps a raw tensor with rows and positions first, as `_keep` does."""
        if self._transform is not None:
            self._keep(self._raw, key, tensor, 1)
            return
        if tensor.requires_grad:
            tensor = tensor.detach()
        self._raw[key] = tensor
        if not tensor.is_inference():
            self._versions[key] = tensor._version

    def _keep(self, kept: dict[str, Tensor], key: str, tensor: Tensor, pos_dim: int) -> None:
        # Called hundreds of times in a forward, so it calls nothing that it need not.
        if tensor.requires_grad:
            tensor = tensor.detach()
        if self._transform is not None:
            tensor = self._transform(tensor, pos_dim)
        kept[key] = tensor
        if not tensor.is_inference():
            self._versions[key] = tensor._version

    def _computed(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Returns a call's scores and pattern, computed as the run would have."""
        return with_autocast(self.autocast, execution_device(call.module), call.inside)

    def _keep_inside(self, call: AttentionCall, places: Iterable[Place]) -> None:
        seen: dict[Side | Passed, Tensor] = {Side.QUERY: call.query, Side.KEY: call.key}
        if any(place.side not in seen for place in places):
            seen[Side.SCORES], seen[Side.PATTERN] = self._computed(call)
        for place in places:
            self.keep_raw(place, as_tokens(seen[place.side], place.layout, self._rows, self._positions))

    @contextlib.contextmanager
    def hooks(self, plan: RecordingPlan, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """While the context is open, keeps the plan's raw tensors, by one torch hook a module.

        Forwards of any scope but the present one, such as those inside hook functions, are left out.

        Args:
            plan: What to keep.
            modules: The plan's modules by their paths.
        """
        owner, keepers, handles = HERE.get(), plan.keepers, list[Callable[[], None]]()
        self.autocast = autocast_dtype(execution_device(modules[""])) if is_autocast_on() else None
        with observed(self._observers(plan, modules, owner)):
            try:
                keepers.serve(self._keep_plain, owner)
                left = [plan.plain[path] for path in keepers.put(plan.plain_names, modules)]
                for ends in (*plan.others, *left):
                    handles.append(self._see(modules[ends.path], ends, owner))
                yield
            finally:
                while handles:
                    handles.pop()()
                keepers.rest()

    def _see(self, module: nn.Module, ends: Ends, owner: Scope | None) -> Callable[[], None]:
        """Keeps what was asked for of a module's ends in its calls; returns what ends that."""
        keep = self._hook(module, ends, owner)
        keep = keep if ends.call is None else self._at_call(ends.call, keep, owner)
        if is_unhooked(module):
            return Seen(module, keep).restore
        return after(module, lambda _, *seen: keep(*seen), is_for_one=True).remove

    def _at_call(self, call: int, hook: Callable[..., None], owner: Scope | None) -> Callable[..., None]:
        """Returns a hook that acts at one call of its module in a forward."""

        def keep(*args: Any) -> None:
            if HERE.get() is not owner:
                return
            done = self._called[hook] = self._called.get(hook, 0) + 1
            if done == call + 1:
                hook(*args)

        return keep

    def _hook(self, module: nn.Module, ends: Ends, owner: Scope | None) -> Callable[..., None]:
        def keep(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any = None) -> None:
            if HERE.get() is not owner:
                return
            if ends.entry is not None:
                entered = primary_input(args, kwargs)
                self.keep_raw(ends.entry, as_tokens(entered, ends.entry.layout, self._rows, self._positions))
            for place in ends.arguments:
                given = argument(args, kwargs, place.argument, arguments_at(module, {place.argument})[place.argument])
                self.keep_raw(place, as_tokens(given, place.layout, self._rows, self._positions))
            for place in ends.exits:
                left = primary_output(output, place.item)
                self.keep_raw(place, as_tokens(left, place.layout, self._rows, self._positions))

        return keep

    def _observers(
        self, plan: RecordingPlan, modules: Mapping[str, nn.Module], owner: Scope | None
    ) -> dict[nn.Module, Observer]:
        """Returns what observes the modules whose inside is kept; of one that is called several times, each call."""
        found = {modules[one.path]: self._observer(one, owner) for one in plan.insides if one.call is None}
        calls: dict[str, dict[int, Observer]] = {}
        for one in plan.insides:
            if one.call is not None:
                calls.setdefault(one.path, {})[one.call] = self._observer(one, owner)
        return {**found, **{modules[path]: self._in_turn(there, owner) for path, there in calls.items()}}

    def _in_turn(self, observers: Mapping[int, Observer], owner: Scope | None) -> Observer:
        """Returns an observer that hands each call of a forward to the one who observes this call."""

        def observe(call: Call) -> Any:
            if HERE.get() is not owner:
                return call.run()
            number = self._called.get(observe, 0)
            self._called[observe] = number + 1
            return observers[number](call) if number in observers else call.run()

        return observe

    def _observer(self, inside: Inside, owner: Scope | None) -> Observer:
        def visit(place: Place) -> Callable[[Tensor], Tensor]:
            def keep(tensor: Tensor) -> Tensor:
                self.keep_raw(place, as_tokens(tensor, place.layout, self._rows, self._positions))
                return tensor

            return keep

        def observe(call: Call) -> Any:
            if HERE.get() is not owner:
                return call.run()
            # With dropout, or where others may edit it, what multiplies the values is known only while the call runs.
            is_shared = bool(call.observers or call.watchers)
            if not isinstance(call, AttentionCall) or is_shared or call.kwargs.get("dropout"):
                visits = {side: visit(place) for side, place in inside.places.items()}
                return call.run_watched(visits, lambda: HERE.get() is not owner, is_last=True)
            if Side.VALUE in inside.places:
                visit(inside.places[Side.VALUE])(call.value)
            if Side.Z in inside.places:
                output = of_arguments(call)
                self.keep_raw(inside.places[Side.Z], output[0])
                return output
            return of_arguments(call)

        def of_arguments(call: AttentionCall) -> Any:
            places = [place for place in inside.places.values() if place.side.is_of_a_call]
            if not places:
                return call.run()
            kept = call.detached() if torch.is_grad_enabled() else call
            if not self._defers or not inside.has_square:
                self._keep_inside(kept, places)
                return call.run()
            kept = kept.without_values()  # which may lie in the fused projection
            if self._relocation is not None:
                kept = kept.to(self._relocation)
            self._calls[inside.owner] = kept
            for name, tensor in kept.tensors().items():
                if not tensor.is_inference():
                    self._versions[f"{inside.owner}:{name}"] = tensor._version
            return call.run()

        return observe
