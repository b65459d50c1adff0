"""Taps: torch hooks on the untouched modules, there only while someone listens, that carry values to hook points."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clearspan.errors import InvalidArgumentError, PointNotReachedError, UnwritableError
from clearspan.hf.attention import Call
from clearspan.hf.derived import Pending
from clearspan.hf.modules import around, refuse_compiled
from clearspan.hf.observers import observed
from clearspan.hf.recording import Recording, RecordingPlan
from clearspan.hf.sequence import Follower
from clearspan.hf.tensors import as_tokens, from_tokens, primary_input, primary_output, with_input, with_output
from clearspan.points import (
    Converted,
    Derivation,
    Derived,
    HookPoint,
    InPlace,
    Layout,
    Listener,
    Place,
    SharedRow,
    Side,
    Whole,
    read,
)


@dataclass(frozen=True)
class _Anchor:
    """What identifies a torch hook: a module, and its input, its output, or its inside.

    Attributes:
        module: The module's path.
        side: `INPUT` or `OUTPUT`, or None for what lies between.
    """

    module: str
    side: Side | None

    @classmethod
    def of(cls, place: Place) -> "_Anchor":
        """Returns the anchor at which a place is reached."""
        return cls(place.module, None if place.side.is_inside else place.side)


class Taps:
    """Carries raw tensors of one model to its hook points and back.

    A place has a torch hook only while one of its points has a listener; so has the target of a derivation. The points
    of a place come in the order in which they were declared.

    Args:
        model: The Hugging Face model.
        points: All its hook points.

    Attributes:
        refuse_writes: Why a write must not happen in the present run, or None.
        writers: The listeners on points that were written since the list was last emptied.
        is_suspended: Whether a hook function is running: the taps ignore a forward of the model inside it.
        follower: Tells the points where in the sequence a forward is, while any torch hook is installed.
    """

    def __init__(self, model: nn.Module, points: Iterable[HookPoint]) -> None:
        self.model = model
        self.refuse_writes: str | None = None
        self.writers: list[tuple[HookPoint, Listener]] = []
        self.is_suspended = False
        self.follower = Follower(model, lambda: self.is_suspended)
        self._rows: dict[str, int] = {}
        self._recording: Recording | None = None
        self._sources: dict[Place, list[HookPoint]] = {}
        self._places: dict[_Anchor, list[Place]] = {}
        self._arriving: dict[Place, list[Derivation]] = {}
        self._leaving: dict[Place, list[Derivation]] = {}
        self._parts: dict[Derivation, list[HookPoint]] = {}
        self._concerned: dict[_Anchor, list[HookPoint]] = {}
        self._pending: dict[Derivation, Pending] = {}
        self._installed: dict[_Anchor, contextlib.ExitStack] = {}
        for point in points:
            self._sources.setdefault(point.place, []).append(point)
            self._add(point, point.place)
            if isinstance(point.access, Derived):
                derivation = point.access.derivation
                self._parts.setdefault(derivation, []).append(point)
                _append_new(self._leaving.setdefault(point.place, []), derivation)
                for target in derivation.reached_by(point.access.part):
                    self._add(point, target)
                    _append_new(self._arriving.setdefault(target, []), derivation)
            point._changed = self._update
            point._stretch = self.follower.stretch

    def _add(self, point: HookPoint, place: Place) -> None:
        """Notes that a point needs a tap at a place."""
        anchor = _Anchor.of(place)
        self._concerned.setdefault(anchor, []).append(point)
        _append_new(self._places.setdefault(anchor, []), place)

    # --- a run -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def record(self, points: Iterable[HookPoint], plan: RecordingPlan, recording: Recording) -> Iterator[None]:
        """While the context is open, keeps the points' values, after any listeners, in the recording.

        The plan's own torch hooks keep raw tensors without listeners, and cost no more than plain ones. A raw tensor
        with listeners is kept after these have run.

        Args:
            points: What to keep.
            plan: The plan of these points' places.
            recording: Where to keep it.
        """
        self.check_not_in_hook()
        refuse_compiled(plan.around)
        heard = [point for point in points if _Anchor.of(point.place) in self._installed] if self._installed else []
        if heard:
            plan = RecordingPlan.of(self.model, plan.places - {point.place for point in heard})
        recording.wanted = frozenset(point.name for point in heard)
        self._recording = recording
        try:
            with recording.hooks(plan, lambda: self.is_suspended):
                yield
        finally:
            self._recording = None

    def check_not_in_hook(self) -> None:
        """Raises if a hook function is running."""
        if self.is_suspended:
            raise InvalidArgumentError(
                "a run with hooks or a cache was started inside a hook function",
                reason="the run that called the function is still under way on the same model",
                fix="run it before and use the result in the hook; bridge(...) inside a hook is the plain model",
            )

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """While the context is open, the taps ignore the model's forwards: no listener and no cache sees them."""
        was, self.is_suspended = self.is_suspended, True
        try:
            yield
        finally:
            self.is_suspended = was

    @property
    def is_listening(self) -> bool:
        """Whether any torch hook is installed."""
        return bool(self._installed)

    @property
    def is_recording(self) -> bool:
        """Whether a run's values are being kept."""
        return self._recording is not None

    # --- torch hooks -------------------------------------------------------------------------------------------------

    def _update(self, point: HookPoint) -> None:
        """Installs or removes the torch hooks of the point's places, as its listeners require."""
        self._set(_Anchor.of(point.place))
        if isinstance(point.access, Derived):
            for target in point.access.derivation.reached_by(point.access.part):
                self._set(_Anchor.of(target))

    def _set(self, anchor: _Anchor) -> None:
        wanted = any(point.is_listening for point in self._concerned[anchor])
        if wanted and anchor not in self._installed:
            installed = self._install(anchor)
            if not self._installed:
                self.follower.install()
            self._installed[anchor] = installed
        elif not wanted and anchor in self._installed:
            self._installed.pop(anchor).close()
            if not self._installed:
                self.follower.remove()
            for place in self._places[anchor]:
                for derivation in (*self._arriving.get(place, ()), *self._leaving.get(place, ())):
                    self._pending.pop(derivation, None)

    def _install(self, anchor: _Anchor) -> contextlib.ExitStack:
        module = self.model.get_submodule(anchor.module)
        refuse_compiled(around(self.model, [anchor.module]))
        places = self._places[anchor]
        with contextlib.ExitStack() as stack:
            for path in {place.rows_of for place in places if self._needs_rows(place)}:
                self._note_rows(path, stack)
            match anchor.side:
                case Side.INPUT:
                    # Before other torch hooks, which may give the module a copy: an in-place write needs the original.
                    handle = module.register_forward_pre_hook(self._on_entry(places), with_kwargs=True, prepend=True)
                    stack.callback(handle.remove)
                case Side.OUTPUT:
                    stack.callback(module.register_forward_hook(self._on_exit(places), with_kwargs=True).remove)
                case _:
                    stack.enter_context(observed({module: self._observer(places)}))
            return stack.pop_all()
        raise AssertionError("an ExitStack suppresses no exception")

    def _needs_rows(self, place: Place) -> bool:
        shared = any(isinstance(point.access, SharedRow) for point in self._sources.get(place, ()))
        return shared or place.layout is Layout.FLAT

    def _note_rows(self, path: str, stack: contextlib.ExitStack) -> None:
        """Keeps the number of rows of a module's input while the module runs."""
        module = self.model.get_submodule(path)

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.is_suspended:
                self._rows[path] = len(primary_input(args, kwargs))

        def forget(*_: Any) -> None:
            if not self.is_suspended:
                self._rows.pop(path, None)

        stack.callback(module.register_forward_pre_hook(note, with_kwargs=True, prepend=True).remove)
        stack.callback(module.register_forward_hook(forget, always_call=True).remove)

    def _on_entry(self, places: Sequence[Place]) -> Callable[..., Any]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.is_suspended:
                return None
            raw = new = primary_input(args, kwargs)
            for place in places:
                new = self._through(place, new, new)
            return None if new is raw else with_input(args, kwargs, new)

        return enter

    def _on_exit(self, places: Sequence[Place]) -> Callable[..., Any]:
        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.is_suspended:
                return None
            result = output
            for place in places:
                raw = primary_output(result, place.item)
                new = self._through(place, raw, primary_input(args, kwargs))
                result = result if new is raw else with_output(result, new, place.item)
            return None if result is output else result

        return leave

    def _observer(self, places: Sequence[Place]) -> Callable[[Call], Any]:
        def visit(place: Place) -> Callable[[Tensor], Tensor]:
            return lambda raw: self._through(place, raw, raw)

        def observe(call: Call) -> Any:
            if self.is_suspended:
                return call.run()
            visited = [place for place in places if any(map(self._is_concerned, self._sources[place]))]
            return call.run_watched({place.side: visit(place) for place in visited}, lambda: self.is_suspended)

        return observe

    def _is_concerned(self, point: HookPoint) -> bool:
        """Whether someone listens to a point, or its value is kept, in the forward under way."""
        return point.is_listening or self._is_wanted(point)

    def _is_wanted(self, point: HookPoint) -> bool:
        return self._recording is not None and point.name in self._recording.wanted

    # --- the way of a tensor -----------------------------------------------------------------------------------------

    def _through(self, place: Place, given: Tensor, entered: Tensor) -> Tensor:
        """Carries a module's tensor past the place's points; returns the one that the model uses.

        Args:
            place: The place.
            given: The tensor, in the module's own layout.
            entered: The module's input, likewise.
        """
        rows = self._rows.get(place.rows_of, 1)
        raw = new = as_tokens(given, place.layout, rows)
        for derivation in self._arriving.get(place, ()):
            pending = self._pending.get(derivation)
            if pending is not None:
                new = pending.arrive(place, new, as_tokens(entered, place.layout, rows))
        new = self._pass(place, new)
        return given if new is raw else from_tokens(new, place.layout, given)

    def _pass(self, place: Place, raw: Tensor) -> Tensor:
        """Offers the raw tensor to the place's points in order; returns the one that the model uses."""
        points = self._sources.get(place, ())
        for derivation in self._leaving.get(place, ()):
            self._pending.pop(derivation, None)  # left by an earlier forward
        for point in points:
            wanted = self._is_wanted(point)
            if not point.is_listening and (not wanted or self._is_lazy(point)):
                continue
            value = read(point.access, raw, self._rows.get(place.rows_of), self._edits_so_far(point, raw))
            if point.is_listening:
                with self.suspended():
                    value, edited = point.offer(value)
                if edited:
                    self._check_write(point)
                    self.writers += [(point, listener) for listener in point.listeners("fwd")]
                    # The model will write into this tensor, which must not be the user's own.
                    raw = self._write(point, raw, value.clone() if place.is_overwritten else value)
                if point.listens_backward:
                    raw, value = self._await_gradient(point, raw, value, edited)
            if wanted and self._recording is not None and not self._is_lazy(point):
                self._recording.keep_value(point, value)
        if self._recording is not None and any(map(self._is_wanted, points)):
            self._recording.keep_raw(place, raw)
        return raw

    def _check_write(self, point: HookPoint) -> None:
        if self.refuse_writes is not None:
            raise UnwritableError(
                "this write would be lost",
                where=point.name,
                reason=self.refuse_writes,
                fix="with bridge.hooks(fwd_hooks=...): around forward and backward",
            )

    def _write(self, point: HookPoint, raw: Tensor, value: Tensor) -> Tensor:
        """Puts a value back; returns the raw tensor that the model uses."""
        match point.access:
            case Whole() | SharedRow():
                return value
            case Converted(conversion):
                return conversion.revert(value, raw)
            case InPlace():
                return raw.copy_(value)
            case Derived(derivation, part):
                pending = self._edits(derivation, raw)
                pending.edits[part] = value
                pending.only_gradient = False
                return raw

    def _await_gradient(self, point: HookPoint, raw: Tensor, value: Tensor, edited: bool) -> tuple[Tensor, Tensor]:
        """Registers the point's backward listeners on the value's gradient; returns raw tensor and value.

        A value that nobody edited is put on the gradient's path as it is. Where it cannot be, its gradient is computed
        apart from the graph.
        """
        if not value.is_floating_point():
            if point.listeners("bwd"):
                raise PointNotReachedError("token ids have no gradient", where=point.name)
            return raw, value
        if not torch.is_grad_enabled():
            raise PointNotReachedError(
                "a backward hook cannot fire: no gradient flows through the value",
                where=f"{point.name} (under no_grad)",
                fix="run with gradients enabled",
            )
        match point.access:
            case Derived(derivation) if not (edited or derivation.is_in_series or self._may_be_edited(derivation)):
                pending = self._pending.get(derivation)
                if pending is None:
                    # A node of its own, to whose gradient a change is added.
                    raw = raw.view_as(raw) if raw.requires_grad else raw.detach().requires_grad_()
                    pending = self._edits(derivation, raw)
                pending.await_gradient(point)
                return raw, value
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        match point.access:
            case Whole() if not edited:
                value = raw.view_as(raw) if raw.requires_grad else value
                raw = value.clone() if point.place.is_overwritten else value
            case Derived(derivation, part):
                pending = self._edits(derivation, raw)
                pending.edits[part] = value
                pending.only_gradient &= not edited
            case _:
                raw = self._write(point, raw, value)
        if point.gradient_sink is not None:
            point.gradient_sink(point, value)
        for call in point.backward_calls():
            value.register_hook(call)
        return raw, value

    def _may_be_edited(self, derivation: Derivation) -> bool:
        """Whether a listener on a part of the derivation could change it in the forward."""
        return any(point.listeners("fwd") for point in self._parts[derivation])

    def _edits_so_far(self, point: HookPoint, raw: Tensor) -> dict[str, Tensor]:
        pending = self._pending.get(point.access.derivation) if isinstance(point.access, Derived) else None
        return pending.edits if pending is not None and pending.source is raw else {}

    def _edits(self, derivation: Derivation, raw: Tensor) -> Pending:
        pending = self._pending.get(derivation)
        if pending is None or pending.source is not raw:
            pending = self._pending[derivation] = Pending(derivation, raw)
        return pending

    def _is_lazy(self, point: HookPoint) -> bool:
        """Whether the point's value can be computed on look-up from the raw tensor that is kept."""
        if not isinstance(point.access, Derived):
            return False
        pending = self._pending.get(point.access.derivation)
        return pending is None or pending.only_gradient


def _append_new(items: list[Any], item: Any) -> None:
    """Appends an item that is not there yet."""
    if item not in items:
        items.append(item)
