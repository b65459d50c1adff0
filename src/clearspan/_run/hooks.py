"""Hooks and interventions of one run, or of a stretch of code: attached together, taken off together."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Generic, Literal, TypeVar, cast

from torch import Tensor

from clearspan import interrupts
from clearspan._run.sources import Source, Sources, gathered
from clearspan.checks import check_choice, check_flags
from clearspan.errors import InvalidArgumentError, PointNotReachedError, UnwritableError
from clearspan.hf.taps import reset
from clearspan.index import Names, Segment
from clearspan.inputs import Batch
from clearspan.interventions import Intervention, Site, Written
from clearspan.interventions.intervention import interventions_of
from clearspan.interventions.joint import Placed, write_all
from clearspan.interventions.site import all_located
from clearspan.model import Model
from clearspan.modes import Modes, closed_to_compiler, uncompiled
from clearspan.points import Direction, HookFunction, HookPoint, Listener, Passed, Side
from clearspan.scopes import HERE, Scope, end

Hooks = Sequence[tuple[Names, HookFunction]]
"""Pairs of a point's name, several names, a compiled pattern or a predicate of names; and a function."""
Attached = Sequence[tuple[HookPoint, Listener, Direction]]
"""Hooks that were attached: each with its point, and for which direction."""


@contextlib.contextmanager
def attached(
    model: Model,
    fwd_hooks: Hooks = (),
    bwd_hooks: Hooks = (),
    *,
    segment: Segment = (None, None),
    reset_hooks_end: bool = True,
    clear_contexts: bool = False,
) -> Iterator[Attached]:
    """Attaches hooks to the run under way while the context is open; if one cannot be attached, none is.

    All names are looked up before anything is attached. A predicate is asked about the points in the segment alone, and
    for backward hooks about those that have a gradient.

    Args:
        model: The model.
        fwd_hooks: Functions of values.
        bwd_hooks: Functions of gradients.
        segment: The part of the model that is run.
        reset_hooks_end: Whether the hooks come off at the end. Those that stay see every forward of the model.
        clear_contexts: Whether the `ctx` of their points is emptied at the end.

    Raises:
        UnknownPointError: A name is unknown, or a predicate holds for none.
        HookTypeError: A hook is not callable.
    """
    if _are_none(fwd_hooks) and _are_none(bwd_hooks):  # in most runs with a cache
        yield ()
        return
    fwd_hooks, bwd_hooks = list(_pairs(fwd_hooks, "fwd_hooks")), list(_pairs(bwd_hooks, "bwd_hooks"))
    if fwd_hooks or bwd_hooks:  # without any, a run inside a hook function is the plain model's
        model.taps.check_not_in_hook()
    listeners = _looked_up(model, fwd_hooks, bwd_hooks, segment, model.taps.present)
    try:
        _put_on(listeners)
        yield listeners
    finally:
        _take_off(listeners, stay=not reset_hooks_end, clear_contexts=clear_contexts)


Hookable = TypeVar("Hookable", bound=Model)


class Hooked(contextlib.ContextDecorator, Generic[Hookable]):
    """Keeps hooks on while the context is open; the forwards of this context (`contextvars`) alone see them.

    The arguments are those of `TransformerBridge.hooks`.
    """

    def __init__(
        self,
        model: Hookable,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        interventions: Sequence[Intervention] = (),
        sources: Mapping[str, Source] | None = None,
    ) -> None:
        self._model = model
        self._hooks, self._bwd_hooks, self._interventions, self._sources = fwd_hooks, bwd_hooks, interventions, sources
        self._resets, self._clears = reset_hooks_end, clear_contexts
        self._listeners: Attached = ()
        self._scope: Scope | None = None

    def _recreate_cm(self) -> "Hooked[Hookable]":  # each call of a decorated function is a context of its own
        return Hooked(
            self._model,
            self._hooks,
            self._bwd_hooks,
            self._resets,
            self._clears,
            self._interventions,
            self._sources,
        )

    @closed_to_compiler
    def __enter__(self) -> Hookable:
        if self._scope is not None:
            raise InvalidArgumentError("these hooks are on already", fix="with bridge.hooks(...): once more")
        try:
            uncompiled(self._open)
        except BaseException:  # an interrupt can come also when they are on
            self.__exit__()
            raise
        return self._model

    def _open(self) -> None:
        model = self._model
        check_flags(reset_hooks_end=self._resets, clear_contexts=self._clears)
        model.taps.check_not_in_hook()
        own = edits(model, self._hooks, self._interventions, self._sources)
        scope = Scope()
        bwd_hooks = list(_pairs(self._bwd_hooks, "bwd_hooks"))
        self._listeners = _looked_up(model, own, bwd_hooks, (None, None), scope)
        with model.taps.changing():
            interrupts.stay()
            self._scope, self._modes = scope, Modes()
            model.taps.turns.opened.append(scope)
            _put_on(self._listeners)
        HERE.set(scope)  # after `changing`, which sets it back

    @interrupts.clean_up(lambda hooked: hooked._scope is not None)
    def __exit__(self, kind: object = None, *_: object) -> None:
        with interrupts.held_off():
            scope, self._scope = self._scope, None
            if scope is None:
                return
            if kind is not None:
                self._modes.set_back()
            interrupts.leave()
            end(scope)
            self._model.taps.turns.opened.remove(scope)
            listeners, self._listeners = self._listeners, ()
            with self._model.taps.changing():
                _take_off(listeners, stay=not self._resets, clear_contexts=self._clears)


def _looked_up(
    model: Model, fwd_hooks: Hooks, bwd_hooks: Hooks, segment: Segment, scope: Scope | None
) -> list[tuple[HookPoint, Listener, Direction]]:
    """Returns checked hooks as listeners of a scope, with their points; none is on its point yet."""
    found: list[tuple[HookPoint, Listener, Direction]] = []
    directions: list[tuple[Direction, Hooks]] = [("fwd", fwd_hooks), ("bwd", bwd_hooks)]
    for direction, hooks in directions:
        for names, function in hooks:
            for point, name in model.index.matching(names, segment, with_gradient=direction == "bwd"):
                found.append((point, Listener(function, name, scope=scope), direction))
    return found


def _put_on(listeners: Attached) -> None:
    for point, listener, direction in listeners:
        point.put(listener, direction)


def _take_off(listeners: Attached, *, stay: bool, clear_contexts: bool) -> None:
    for point, listener, _ in reversed(listeners):
        if stay:
            listener.scope = None  # like those of `add_hook`, until `reset_hooks`
        else:
            point.remove(listener)
        if clear_contexts:
            point.ctx.clear()


def _are_none(hooks: object) -> bool:
    return type(hooks) is tuple and not hooks


def _pairs(hooks: object, what: str) -> Iterator[tuple[Names, HookFunction]]:
    """Yields hooks as pairs, checked."""
    if isinstance(hooks, Mapping) or not isinstance(hooks, Iterable):
        raise InvalidArgumentError(f"{what} are pairs", expected="[(name, function), ...]", got=type(hooks).__name__)
    for pair in hooks:
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise InvalidArgumentError(f"{what} holds {pair!r}", expected="pairs (name, function)")
        if isinstance(pair[1], str) and callable(pair[0]):
            raise InvalidArgumentError(f"{what} holds a pair the wrong way round", expected="(name, function)")
        yield cast("tuple[Names, HookFunction]", tuple(pair))


def edits(
    model: Model,
    fwd_hooks: Hooks = (),
    interventions: Sequence[Intervention] = (),
    sources: Mapping[str, Source] | None = None,
    like: Batch | None = None,
    *,
    is_generating: bool = False,
) -> Hooks:
    """Returns interventions, in their order, and then hook functions, as the hooks of a run. Sources are run here.

    Args:
        model: The model.
        fwd_hooks: Functions of values.
        interventions: What is done.
        sources: The runs from which interventions take values.
        like: The whole sequence of the run, or a generation's prompt, where it is known; what does not fit it raises.
        is_generating: Whether it is a prompt.

    Raises:
        UnknownPointError: The model has no such point.
        InvalidArgumentError: Interventions or sources that do not fit.
    """
    interventions = interventions_of(interventions)
    if not interventions and _are_none(fwd_hooks):  # in most runs with a cache
        return fwd_hooks
    fwd_hooks = list(_pairs(fwd_hooks, "fwd_hooks"))
    if not interventions:
        return fwd_hooks
    model.taps.check_not_in_hook()
    sites = sites_of(model, interventions)
    found = gathered(model, sites, sources, like)
    if like is not None:
        for site in sites:
            found.of(Written(site, like, is_generating=is_generating))
    return [*((site.name, SiteWriter(model, site, found)) for site in sites), *fwd_hooks]


def sites_of(model: Model, interventions: Iterable[Intervention]) -> list[Site]:
    """Returns interventions laid on a model, in their order."""
    return list(all_located(interventions_of(interventions), model.index.find, len(model.blocks)))


class SiteWriter:
    """A site as a hook function: it writes in whatever batch is running.

    Args:
        model: The model, which says what is running.
        site: The site.
        sources: What its action takes values from.

    Attributes:
        wrote: Whether it has written.
    """

    def __init__(self, model: Model, site: Site, sources: Sources) -> None:
        self._model = model
        self._site = site
        self._sources = sources
        self._written: Written | None = None
        self.wrote = False

    def __call__(self, value: Tensor, *, hook: HookPoint) -> None:
        """Writes into the value what belongs into the columns that it shows."""
        width = hook.width if hook.width is not None else value.shape[self._site.sequence_axis]
        run = self._model.taps.present
        batch = _unpadded(value, width) if run is None or run.batch is None else run.batch
        written = self._written
        is_generating = hook.step is not None
        if written is None or written.batch is not batch or written.is_generating != is_generating:
            written = self._written = Written(self._site, batch, is_generating=is_generating)
        self.wrote |= written.write(value, self._sources.of(written), width=width)


def _unpadded(value: Tensor, width: int) -> Batch:
    """Returns a batch for a forward that is known by one value alone: rows and columns, no padding."""
    return Batch(None, embeds=value.new_empty(len(value), width, 0))


def check_fired(listeners: Attached) -> None:
    """Raises if a forward hook was not called in the run that it was given to."""
    for point, listener, direction in listeners:
        if direction == "fwd" and listener.calls == 0:
            raise PointNotReachedError(
                f"the hook on {listener.name} did not fire",
                where=str(point.place),
                reason="the forward did not pass there in this run",
            )
        if isinstance(listener.function, SiteWriter) and not listener.function.wrote:
            raise PointNotReachedError(
                f"the intervention at {listener.name} wrote nothing",
                where=str(point.place),
                reason="its positions were not reached",
                fix="more new tokens, or positions that there are",
            )


def check_recomputation(listeners: Attached, lost: str | None) -> None:
    """Raises if hooks of one run are of a kind that changes the graph, and gradient checkpointing makes it again.

    Args:
        listeners: The run's hooks.
        lost: Why such hooks would be gone by then, or None where there is no checkpointing.
    """
    for point, listener, direction in listeners if lost is not None else ():
        is_computed = isinstance(point.place.side, Passed) or point.place.side in (Side.SCORES, Side.PATTERN)
        if direction == "bwd" or is_computed:
            raise UnwritableError(
                f"the hook on {listener.name} would be missing when the forward is made again",
                reason=lost,
                fix="with bridge.hooks(...): around forward and backward, or without gradient checkpointing",
            )


def hooks_of(placed: Iterable[Placed], sources: Sources) -> Hooks:
    """Returns one hook for each point at which something is written, sites in their order."""
    by_point: dict[str, list[Placed]] = {}
    for written, rows in placed:
        by_point.setdefault(written.site.name, []).append((written, rows))
    return [(name, _writer(there, sources)) for name, there in by_point.items()]


def _writer(placed: Sequence[Placed], sources: Sources) -> HookFunction:
    def write(value: Tensor, hook: object) -> None:  # noqa: ARG001
        write_all(value, placed, sources.of)

    return write


def add_hook(model: Model, name: Names, hook: HookFunction, dir: Direction, is_permanent: bool, prepend: bool) -> None:
    """Puts a function on points. The arguments are those of `TransformerBridge.add_hook`."""
    points = model.index.matching(name, with_gradient=dir == "bwd")
    with model.taps.changing(), contextlib.ExitStack() as stack:
        for point, found in points:
            stack.callback(point.remove, point.add_hook(hook, dir, is_permanent, prepend, name=found))
        stack.pop_all()


def reset_hooks(
    model: Model, clear_contexts: bool, direction: Literal["fwd", "bwd", "both"], including_permanent: bool
) -> None:
    """Takes hooks off all points. The arguments are those of `TransformerBridge.reset_hooks`."""
    check_flags(clear_contexts=clear_contexts, including_permanent=including_permanent)
    check_choice(("fwd", "bwd", "both"), direction=direction)
    reset(model.hf_model, direction, including_permanent=including_permanent)
    if clear_contexts:
        for point in model.index:
            point.ctx.clear()
