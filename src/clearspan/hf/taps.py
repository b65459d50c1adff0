"""Taps: torch hooks on the untouched modules, there only while someone listens, that carry values to hook points."""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clearspan.errors import InvalidArgumentError, PointNotReachedError, UnwritableError
from clearspan.hf.adapters import acting
from clearspan.hf.attention import Call
from clearspan.hf.derived import Pending
from clearspan.hf.modules import arguments_at, refuse_compiled
from clearspan.hf.nodes import Node, has_node, no_gradient, put_node
from clearspan.hf.observers import forget_lost, observed
from clearspan.hf.recording import Recording, RecordingPlan
from clearspan.hf.sequence import Follower, Passage
from clearspan.hf.tensors import (
    argument,
    as_tokens,
    from_tokens,
    primary_input,
    primary_output,
    with_argument,
    with_input,
    with_output,
)
from clearspan.hf.torch_hooks import after, before, nothing, take_off_lost
from clearspan.hf.turns import Run, Taken, turns_of
from clearspan.points import (
    Converted,
    Derivation,
    Derived,
    HookPoint,
    InPlace,
    Offered,
    Passed,
    Place,
    ReadOnly,
    SharedRow,
    Side,
    Stretch,
    Whole,
    read,
)
from clearspan.scopes import HERE, Scope, called_in, is_foreign
from clearspan.tree import Ways, module_at


@dataclass(frozen=True)
class _Anchor:
    """What identifies a torch hook: a module, and its input, its output, or its inside.

    Attributes:
        module: The module's path.
        side: `INPUT` or `OUTPUT`, or None for what lies between.
    """

    module: str
    side: Side | Passed | None

    @classmethod
    def of(cls, place: Place) -> "_Anchor":
        """Returns the anchor at which a place is reached."""
        return cls(place.module, None if place.side.is_inside else place.side)


@dataclass(frozen=True)
class _Tap:
    """The torch hooks of one anchor.

    Attributes:
        modules: The modules that they are on, by path.
        hooks: Closed, it takes them off.
    """

    modules: Mapping[str, nn.Module]
    hooks: contextlib.ExitStack


class Taps:
    """Carries raw tensors of one model to its hook points and back.

    A place has a torch hook only while one of its points has a listener; so has the target of a derivation. The points
    of a place come in the order in which they were declared.

    Args:
        model: The Hugging Face model.
        points: All its hook points.
        drops_positions: Whether the model leaves positions out of its last blocks where no logits of theirs are read.

    Attributes:
        turns: Whose turn it is on the model.
        points: The hook points.
    """

    def __init__(self, model: nn.Module, points: Iterable[HookPoint], *, drops_positions: bool = False) -> None:
        self.model = model
        self.turns = turns_of(model)
        self.turns.taps.add(self)
        self.points = list(points)
        self._passage = Passage()
        self._follower = Follower(model, self._passage, self.turns, weakref.WeakMethod(self.follow))
        self.drops_positions = self._follower.drops_positions = drops_positions
        self._sources: dict[Place, list[HookPoint]] = {}
        self._places: dict[_Anchor, list[Place]] = {}
        self._arriving: dict[Place, list[Derivation]] = {}
        self._leaving: dict[Place, list[Derivation]] = {}
        self._parts: dict[Derivation, list[HookPoint]] = {}
        self._concerned: dict[_Anchor, list[HookPoint]] = {}
        self._installed: dict[_Anchor, _Tap] = {}
        self._ways: dict[_Anchor, Ways] = {}
        self._handles: set[int] = set()
        for point in self.points:
            self._sources.setdefault(point.place, []).append(point)
            self._add(point, point.place)
            if isinstance(point.access, Derived):
                derivation = point.access.derivation
                self._parts.setdefault(derivation, []).append(point)
                _append_new(self._leaving.setdefault(point.place, []), derivation)
                for target in derivation.reached_by(point.access.part):
                    self._add(point, target)
                    _append_new(self._arriving.setdefault(target, []), derivation)
            point.be_kept_by(self)

    def _add(self, point: HookPoint, place: Place) -> None:
        """Notes that a point needs a tap at a place."""
        anchor = _Anchor.of(place)
        self._concerned.setdefault(anchor, []).append(point)
        _append_new(self._places.setdefault(anchor, []), place)

    # --- a run -------------------------------------------------------------------------------------------------------

    def run(self, batch: Any = None, steps: Iterator[int] | None = None) -> "_TurnOfRun":
        """While the context is open, does one run, in its turn.

        Args:
            batch: The whole sequence of the run, or a generation's prompt.
            steps: Numbers of the forwards, where it is a generation.

        Raises:
            ModelBusyError: Another thread's run is inside a hook function that does not return.
        """
        return _TurnOfRun(self, Run(self._passage, batch, steps))

    @property
    def present(self) -> Run | None:
        """The run under way in this context, or None; a hook function is inside its run."""
        return self.turns.present(self._passage)

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
        run = self.present
        assert run is not None, "values are kept in a run"
        heard = [point for point in points if self._is_shown(point)] if self._installed else []
        if heard:
            plan = RecordingPlan.of(plan.places - {point.place for point in heard})
        modules = plan.ways.modules(self.model)
        refuse_compiled(modules.values())
        recording.wanted = frozenset(point.name for point in heard)
        run.recording = recording
        try:
            with recording.hooks(plan, modules):
                yield
        finally:
            run.recording = None

    @contextlib.contextmanager
    def giving_gradients(
        self, points: Iterable[HookPoint], sink: Callable[[HookPoint, Any], None], rows: int, positions: int
    ) -> Iterator[None]:
        """While the context is open, gives `sink` each point with what has its gradient, in each forward of this run.

        That is a tensor, or an object that computes the gradient. A place with a node is not listened to, so that what
        a recording keeps there are raw tensors.

        Args:
            points: The points.
            sink: What is called.
            rows: Rows of the forward.
            positions: Its positions.
        """
        with contextlib.ExitStack() as stack:
            alone: dict[Place, list[HookPoint]] = {}
            for point in points:
                if has_node(point):
                    alone.setdefault(point.place, []).append(point)
                else:
                    stack.enter_context(point.giving_gradient_to(sink))
            for place, there in alone.items():
                if _Anchor.of(place) in self._installed:  # somebody else listens, and may write
                    for point in there:
                        stack.enter_context(point.giving_gradient_to(sink))
                    continue

                def keep(node: Tensor, there: Sequence[HookPoint] = there) -> None:
                    for point in there:
                        sink(point, Node(point, node, rows, positions))

                module = module_at(self.model, place.module)
                refuse_compiled([module])
                stack.callback(put_node(place, module, there[0].name, keep).remove)
            yield

    def _is_shown(self, point: HookPoint) -> bool:
        """Whether a point's value comes from a tap, or from a hook function, and not from a raw tensor alone."""
        return isinstance(point.access, Offered) or _Anchor.of(point.place) in self._installed

    def check_not_in_hook(self) -> None:
        """Raises if a hook function is running in this context."""
        if self.turns.is_away:
            raise InvalidArgumentError(
                "a run with hooks or a cache was started inside a hook function",
                reason="the run that called the function is still under way on the same model",
                fix="run it before and use the result in the hook; bridge(...) inside a hook is the plain model",
            )

    @property
    def is_listening(self) -> bool:
        """Whether any torch hook is installed."""
        return bool(self._installed)

    @property
    def is_recording(self) -> bool:
        """Whether the values of the run under way are being kept."""
        run = self.present
        return run is not None and run.recording is not None

    # --- torch hooks -------------------------------------------------------------------------------------------------

    @property
    def stretch(self) -> Stretch:
        """Where in the sequence the forward under way in this thread is."""
        return self._passage.stretch

    def call(self, name: str, outer: Scope | None, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a hook function, to which the model is the plain one; see `Turns.call`."""
        return self.turns.call(name, outer, function, *args)

    def changing(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which torch hooks come and go; see `Turns.changing`."""
        return self.turns.changing()

    def changed(self, point: HookPoint) -> None:
        """Installs or removes the torch hooks of the point's places, as its listeners require."""
        self._set(_Anchor.of(point.place))
        if isinstance(point.access, Derived):
            for target in point.access.derivation.reached_by(point.access.part):
                self._set(_Anchor.of(target))

    def _set(self, anchor: _Anchor) -> None:
        wanted = any(point.is_listening for point in self._concerned[anchor])
        if wanted and anchor not in self._installed:
            self._installed[anchor] = self._install(anchor)
            self._follower.install()
            if not anchor.module:
                self._follower.go_last()
        elif not wanted and anchor in self._installed:
            self._installed.pop(anchor).hooks.close()
            self._follower.remove()
            for place in self._places[anchor]:
                for derivation in (*self._arriving.get(place, ()), *self._leaving.get(place, ())):
                    self._passage.pending.pop(derivation, None)
            if not self._installed and not self.turns.is_away:
                self._passage.clear()  # a forward that was broken off does not end

    def follow(self) -> None:
        """Brings torch hooks from modules that have been replaced to those that are there now.

        Raises:
            ModelChangedError: There is none any more.
        """
        left = [
            anchor
            for anchor, tap in list(self._installed.items())  # another thread may change it
            if any(self._there(anchor, path) is not module for path, module in tap.modules.items())
        ]
        if left:
            with self.changing():
                for anchor in left:
                    new = self._install(anchor)
                    self._installed[anchor].hooks.close()
                    self._installed[anchor] = new

    def _there(self, anchor: _Anchor, path: str) -> nn.Module:
        """Returns the module at a path that a tap's hooks belong on now; of copies, the one whose inside is seen."""
        module = module_at(self.model, path)
        return acting(module) if anchor.side is None and path == anchor.module else module

    def _install(self, anchor: _Anchor) -> _Tap:
        places = self._places[anchor]
        rows_of = {place.rows_of for place in places if self._needs_rows(place)}
        if anchor not in self._ways:
            self._ways[anchor] = Ways([anchor.module, *rows_of])
        around = self._ways[anchor].modules(self.model)
        modules = {path: around[path] for path in (anchor.module, *rows_of)}
        module = modules[anchor.module]
        refuse_compiled(around.values())
        with contextlib.ExitStack() as stack:
            for path in rows_of:
                self._note_rows(path, modules[path], stack)
            match anchor.side:
                case Side.INPUT:
                    # Before other torch hooks, which may give the module a copy: an in-place write needs the original.
                    hook = self._where_seen(self._on_entry(places, module), nothing)
                    self._hold(before(module, hook, first=True), stack)
                case Side.OUTPUT:
                    hook = self._where_seen(self._on_exit(places), nothing)
                    self._hold(after(module, hook), stack)
                case _:
                    modules[anchor.module] = acting(module)
                    observer = self._where_seen(self._observer(places), lambda call: call.run())
                    stack.enter_context(observed({module: observer}))
            return _Tap(modules, stack.pop_all())
        raise AssertionError("an ExitStack suppresses no exception")

    def _needs_rows(self, place: Place) -> bool:
        shared = any(isinstance(point.access, SharedRow) for point in self._sources.get(place, ()))
        return shared or place.layout.joins_rows

    def _note_rows(self, path: str, module: nn.Module, stack: contextlib.ExitStack) -> None:
        """Keeps the number of rows of a module's input while the module runs."""

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if not self.turns.is_away:
                self._passage.rows[path] = len(primary_input(args, kwargs))

        def forget(*_: Any) -> None:
            if not self.turns.is_away:
                self._passage.rows.pop(path, None)

        self._hold(before(module, note, first=True), stack)
        self._hold(after(module, forget, always=True), stack)

    def _hold(self, handle: RemovableHandle, stack: contextlib.ExitStack) -> None:
        """Has a torch hook taken off when the stack is closed."""
        self._handles.add(handle.id)
        stack.callback(self._handles.discard, handle.id)
        stack.callback(handle.remove)

    def _where_seen(self, hook: Callable[..., Any], unseen: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a hook for the forwards that the taps look at, and what is called in the others."""

        def called(*args: Any) -> Any:
            if HERE.get() is None:
                if torch._C._current_graph_task_id() < 0 or not is_foreign():
                    return hook(*args)
                return called_in(self.turns.scope_of_graph(), hook, *args)
            return unseen(*args) if self.turns.is_away else hook(*args)

        return called

    def _on_entry(self, places: Sequence[Place], module: nn.Module) -> Callable[..., Any]:
        also = arguments_at(module, {name for place in places for name in place.also})
        others = arguments_at(module, {place.argument for place in places if place.argument})
        first = [place for place in places if not place.argument]

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            given = args, kwargs
            here = self._of_this_call(places, Side.INPUT)
            for place in (place for place in here if place.argument):
                name, position = place.argument, others[place.argument]
                raw = argument(args, kwargs, name, position)
                new = self._through(place, raw, raw)
                if new is not raw:
                    args, kwargs = with_argument(args, kwargs, name, position, new)
            if first:
                raw = new = primary_input(args, kwargs)
                for place in (place for place in here if not place.argument):
                    new = self._through(place, new, new)
                if new is not raw:
                    args, kwargs = with_input(args, kwargs, new, also)
            return None if args is given[0] and kwargs is given[1] else (args, kwargs)

        return enter

    def _on_exit(self, places: Sequence[Place]) -> Callable[..., Any]:
        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
            result = output
            for place in self._of_this_call(places, Side.OUTPUT):
                raw = primary_output(result, place.item)
                new = self._through(place, raw, primary_input(args, kwargs))
                result = result if new is raw else with_output(result, new, place.item)
            return None if result is output else result

        return leave

    def _of_this_call(self, places: Sequence[Place], side: Side | None) -> Sequence[Place]:
        """Returns the places at a module that this call of it is, where a forward calls it several times.

        Raises:
            PointNotReachedError: It is called again by gradient checkpointing, which calls parts of the forward alone.
        """
        if all(place.call is None for place in places):
            return places
        if torch._C._current_graph_task_id() >= 0:
            raise PointNotReachedError(
                "gradient checkpointing calls a module again that has hooks, and that the model calls several times",
                where=str(places[0]),
                reason="which call of the forward this is cannot be told",
                fix="model.gradient_checkpointing_disable()",
            )
        call = self._passage.calls.get((places[0].module, side), 0)
        self._passage.calls[places[0].module, side] = call + 1
        return [place for place in places if place.call in (None, call)]

    def expect(self, path: str, call: int) -> None:
        """Says which call of a module the next one is, outside a forward of the model."""
        self._passage.calls |= dict.fromkeys(((path, Side.INPUT), (path, Side.OUTPUT), (path, None)), call)

    def _observer(self, places: Sequence[Place]) -> Callable[[Call], Any]:
        def visit(place: Place) -> Callable[[Tensor], Tensor]:
            return lambda raw: self._through(place, raw, raw)

        def observe(call: Call) -> Any:
            here = self._of_this_call(places, None)
            visited = [place for place in here if any(map(self._is_concerned, self._sources[place]))]
            if not visited:
                return call.run()
            return call.run_watched({place.side: visit(place) for place in visited}, lambda: self.turns.is_away)

        return observe

    def _is_concerned(self, point: HookPoint) -> bool:
        """Whether someone listens to a point, or its value is kept, in the forward under way."""
        return point.is_heard or self._is_wanted(point)

    def _is_wanted(self, point: HookPoint) -> bool:
        run = self.present
        return run is not None and run.recording is not None and point.name in run.recording.wanted

    # --- the way of a tensor -----------------------------------------------------------------------------------------

    def _through(self, place: Place, given: Tensor, entered: Tensor) -> Tensor:
        """Carries a module's tensor past the place's points; returns the one that the model uses.

        Args:
            place: The place.
            given: The tensor, in the module's own layout.
            entered: The module's input, likewise.
        """
        rows = self._passage.rows.get(place.rows_of, 1)
        positions = self._passage.stretch.length
        raw = new = as_tokens(given, place.layout, rows, positions)
        for derivation in self._arriving.get(place, ()):
            pending = self._passage.pending.get(derivation)
            if pending is not None:
                new = pending.arrive(place, new, as_tokens(entered, place.layout, rows, positions))
        new = self._pass(place, new)
        return given if new is raw else from_tokens(new, place.layout, given)

    def _pass(self, place: Place, raw: Tensor) -> Tensor:
        """Offers the raw tensor to the place's points in order; returns the one that the model uses."""
        points = self._sources.get(place, ())
        for derivation in self._leaving.get(place, ()):
            self._passage.pending.pop(derivation, None)  # left by an earlier forward
        run = self.present
        recording = None if run is None else run.recording
        for point in points:
            wanted, heard = recording is not None and point.name in recording.wanted, point.is_heard
            if not heard and (not wanted or self._is_lazy(point)):
                continue
            value = read(point.access, raw, self._passage.rows.get(place.rows_of), self._edits_so_far(point, raw))
            if heard:
                value, edited = self.turns.call(point.name, HERE.get(), point.offer, value)
                if edited and run is not None:
                    self._check_write(point, run)
                    run.writers += [(point, listener) for listener in point.heard("fwd")]
                if edited:
                    # The model will write into this tensor, which must not be the user's own.
                    raw = self._write(point, raw, value.clone() if place.is_overwritten else value)
                elif value.requires_grad and torch.is_grad_enabled():
                    raw = self._put_on_graph(point, raw, value)
                if point.is_heard_backward:
                    raw, value = self._await_gradient(point, raw, value, edited)
            if wanted and recording is not None and not self._is_lazy(point):
                recording.keep_value(point, value)
        if recording is not None and any(point.name in recording.wanted for point in points):
            recording.keep_raw(place, raw)
        return raw

    def _check_write(self, point: HookPoint, run: Run) -> None:
        if run.refuse_writes is not None:
            raise UnwritableError(
                "this write would be lost",
                where=point.name,
                reason=run.refuse_writes,
                fix="with bridge.hooks(fwd_hooks=...): around forward and backward",
            )

    def _write(self, point: HookPoint, raw: Tensor, value: Tensor) -> Tensor:
        """Puts a value back; returns the raw tensor that the model uses."""
        match point.access:
            case Whole() | SharedRow():
                return value
            case Converted(conversion):
                return conversion.revert(value, raw)
            case InPlace(conversion):
                return raw.copy_(value if conversion is None else conversion.revert(value, raw))
            case ReadOnly():
                raise UnwritableError(
                    "this value can be read, but not written",
                    where=point.name,
                    reason="the model does not compute with it: it is computed of what the model uses",
                    fix="write the points that it is computed of",
                )
            case Derived(derivation, part):
                pending = self._edits(derivation, raw)
                pending.edits[part] = value
                pending.only_gradient = False
                return raw
            case Offered():
                raise AssertionError("an offered value is in no raw tensor")

    def _put_on_graph(self, point: HookPoint, raw: Tensor, value: Tensor) -> Tensor:
        """Has gradients flow through the value that functions were given; returns the raw tensor, with its old numbers.

        Raises:
            PointNotReachedError: A function asks a derived value for its gradient, which does not flow through it.
        """
        match point.access:
            case Whole():
                return torch.empty_like(raw).copy_(value)  # of the strides that the model's kernels expect
            case ReadOnly():
                return raw
            case Derived():
                if value.retains_grad or value._backward_hooks or value.is_leaf:
                    raise PointNotReachedError(
                        "a function asked for the gradient of a derived value, which the model does not compute with",
                        where=point.name,
                        fix=f"bwd_hooks=[({point.name!r}, function)], or run_with_cache(..., incl_bwd=True)",
                    )
                return raw
            case _:
                return self._write(point, raw, value)

    def _await_gradient(self, point: HookPoint, raw: Tensor, value: Tensor, edited: bool) -> tuple[Tensor, Tensor]:
        """Registers the point's backward listeners on the value's gradient; returns raw tensor and value.

        A value that nobody edited is put on the gradient's path as it is. Where it cannot be, its gradient is computed
        apart from the graph.
        """
        if not value.is_floating_point():
            if point.heard("bwd"):
                raise PointNotReachedError("whole numbers have no gradient", where=point.name)
            return raw, value
        if not torch.is_grad_enabled():
            raise no_gradient(point.name)
        match point.access:
            case ReadOnly():
                raise PointNotReachedError(
                    "a backward hook cannot fire: the model does not compute with this value", where=point.name
                )
            case Derived(derivation) if not (edited or derivation.is_in_series or self._may_be_edited(derivation)):
                pending = self._passage.pending.get(derivation)
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
        sink = point.gradient_sink
        if sink is not None:
            sink(point, value)
        for call in point.backward_calls():
            value.register_hook(call)
        return raw, value

    def _may_be_edited(self, derivation: Derivation) -> bool:
        """Whether a listener on a part of the derivation could change it in the forward."""
        return any(point.heard("fwd") for point in self._parts[derivation])

    def _edits_so_far(self, point: HookPoint, raw: Tensor) -> dict[str, Tensor]:
        pending = self._passage.pending.get(point.access.derivation) if isinstance(point.access, Derived) else None
        return pending.edits if pending is not None and pending.source is raw else {}

    def _edits(self, derivation: Derivation, raw: Tensor) -> Pending:
        pending = self._passage.pending.get(derivation)
        if pending is None or pending.source is not raw:
            pending = self._passage.pending[derivation] = Pending(derivation, raw)
        return pending

    def _is_lazy(self, point: HookPoint) -> bool:
        """Whether the point's value can be computed on look-up from the raw tensor that is kept."""
        if not isinstance(point.access, Derived):
            return False
        pending = self._passage.pending.get(point.access.derivation)
        return pending is None or pending.only_gradient


class _TurnOfRun(Taken):
    """The turn of one run.

    Args:
        taps: Those that do the run.
        run: The run.
    """

    def __init__(self, taps: Taps, run: Run) -> None:
        super().__init__(taps.turns, run)
        self._taps = taps
        self._run = run
        self._is_followed = False

    def __enter__(self) -> Run:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().__enter__()
        try:
            self._taps.follow()
            if self._run.steps is not None:
                self._taps._follower.install()
                self._is_followed = True
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self._run

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if self._is_followed:
                self._taps._follower.remove()
            self._run.forget()  # what a backward hook's context keeps of it is empty
            if (self._is_followed or self._taps._installed) and not self._turns.is_away:
                self._taps._passage.clear()
        finally:
            super().__exit__(kind, error, at)


def heard(model: nn.Module) -> list[str]:
    """Returns the names of the points of any bridge to a model with functions that act until they are taken off."""
    points = itertools.chain.from_iterable(taps.points for taps in turns_of(model).taps)
    return sorted({point.name for point in points if point.has_lasting})


def reset(
    model: nn.Module, direction: Literal["fwd", "bwd", "both"] = "both", *, including_permanent: bool = True
) -> None:
    """Takes the functions off all points of all bridges to a model, and what was lost on it."""
    turns = turns_of(model)
    with turns.changing():
        everyone = list(turns.taps)
        for point in itertools.chain.from_iterable(taps.points for taps in everyone):
            if point.is_listening:
                point.remove_hooks(direction, including_permanent)
        if turns.are_a_run:
            return  # whose own torch hooks are on
        handles = set[int]().union(*(taps._handles | taps._follower.handles for taps in everyone))
        watched = {
            tap.modules[anchor.module]
            for taps in everyone
            for anchor, tap in taps._installed.items()
            if anchor.side is None
        }
        forget_lost(model, watched)
        take_off_lost(model, handles, watched)


def _append_new(items: list[Any], item: Any) -> None:
    """Appends an item that is not there yet."""
    if item not in items:
        items.append(item)
