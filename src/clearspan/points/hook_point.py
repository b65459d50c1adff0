"""Hook points: a name, axes, and listeners in order."""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from clearspan.checks import check_choice, check_flags, check_kind
from clearspan.errors import HookFailedError, HookTypeError, HookValueError, InvalidArgumentError
from clearspan.points.address import Address
from clearspan.points.catalogue import entry_of
from clearspan.points.place import Access, Place, Whole
from clearspan.points.signature import by_position
from clearspan.results import Summarised, Summary
from clearspan.scopes import HERE, Scope, is_inside
from clearspan.shapes import Axes, with_sizes
from clearspan.transformer_lens import HookPointNames, check_no_level

Direction = Literal["fwd", "bwd"]


class _NamesHook(Protocol):
    def __call__(self, value: Tensor, /, *, hook: "HookPoint") -> Tensor | None: ...


Called = Callable[[Tensor, "HookPoint"], Tensor | None]
HookFunction = Called | _NamesHook
"""Takes a value and its hook point. Returns what the model uses instead, or None: edited in place, or only read.

A function of a gradient may return it in a tuple of its own.

The second parameter may have any name. If it must be given by name, or is one of `**kwargs`, its name is `hook`.
"""
Sink = Callable[["HookPoint", Any], None]


@dataclass(eq=False)
class Listener:
    """One function on one point.

    Attributes:
        function: The user's function.
        name: The name under which the point was asked for, which the function sees as `hook.name`.
        is_permanent: Whether `reset_hooks` leaves it.
        scope: The stretch of code whose forwards it sees, or None for every forward of the model.
        calls: How often it was called.
    """

    function: HookFunction
    name: str
    is_permanent: bool = False
    scope: Scope | None = None
    calls: int = 0
    _by_position: Called = field(init=False)

    def __post_init__(self) -> None:
        self._by_position = by_position(self.function, self.name)

    @property
    def is_heard(self) -> bool:
        """Whether it sees forwards of the present context."""
        return self.scope is None or is_inside(self.scope)

    @property
    def is_elsewhere(self) -> bool:
        """Whether it belongs to code that is under way in another context."""
        return self.scope is not None and self.scope.is_elsewhere

    def call(self, value: Tensor, point: "HookPoint") -> Tensor | None:
        """Calls the function, and counts that.

        Raises:
            HookFailedError: It raised what ends loops, which a generator above would take for its own end.
        """
        self.calls += 1
        try:
            return self._by_position(value, point)
        except (StopIteration, StopAsyncIteration, GeneratorExit) as error:
            raise HookFailedError(
                f"a hook function raised {type(error).__name__}",
                where=point.name,
                reason="a loop or a stream above would take it for its own end",
                fix="return, or raise another error",
            ) from error


@dataclass
class Stretch:
    """Where in the sequence the forward under way is. A model's points share one a thread; the taps set it.

    Attributes:
        position: See `HookPoint.position`; a tensor if the KV cache counts in one, None if it is unknown.
        step: See `HookPoint.step`.
        length: Tokens of this forward, or None between forwards.
    """

    position: int | Tensor | None = 0
    step: int | None = None
    length: int | None = None


class Keeper(Protocol):
    """Who puts the torch hooks of points in place: the taps of their model."""

    @property
    def stretch(self) -> Stretch:
        """Where in the sequence the forward under way in this thread is."""
        ...

    def call(self, name: str, outer: Scope | None, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a point's function from within a scope; inside of it the model is the plain one."""
        ...

    def changing(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which listeners come and go, as a whole or not at all."""
        ...

    def changed(self, point: "HookPoint") -> None:
        """Puts the torch hooks in place that the point's listeners require, and takes off others."""
        ...


class _Unkept:
    """The keeper of a point that is of no model."""

    stretch = Stretch()

    def call(self, name: str, outer: Scope | None, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def changing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def changed(self, point: "HookPoint") -> None:
        pass


_UNKEPT = _Unkept()


@dataclass(eq=False, repr=False)
class HookPoint(Summarised, HookPointNames):
    """One value of the forward that can be read and written.

    During a forward, `position` and `step` tell where in the sequence it is.

    Attributes:
        name: Its canonical name.
        axes: Its axes, in the vocabulary of `clearspan.shapes`.
        place: Where the raw tensor is reached.
        access: How the value is read there, and what a write does.
        aliases: Other names of the same value with the same effect of a write.
        sizes: Sizes of the axes that the model fixes; the others are the input's.
        ctx: A dictionary for the listeners' own use.
        is_computed: Whether no forward makes the value: a cache keeps it only where it is asked for by name.
    """

    name: str
    axes: Axes
    place: Place
    access: Access = field(default_factory=Whole)
    aliases: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    ctx: dict[str, Any] = field(default_factory=dict)
    is_computed: bool = False
    _listeners: dict[Direction, list[Listener]] = field(default_factory=lambda: {"fwd": [], "bwd": []})
    _sinks: list[tuple[Sink, Scope | None]] = field(default_factory=list)
    _keeper_or_none: Callable[[], Keeper | None] = field(default=lambda: _UNKEPT)
    _past: Stretch | None = None

    def be_kept_by(self, keeper: Keeper) -> None:
        """Has a keeper put torch hooks in place. The point does not keep it, nor its model, from being freed."""
        self._keeper_or_none = weakref.ref(keeper)

    @property
    def _keeper(self) -> Keeper:
        keeper = self._keeper_or_none()
        if keeper is None:
            raise InvalidArgumentError(
                "the bridge of this hook point is gone",
                where=self.name,
                fix="keep the bridge for as long as its points are used",
            )
        return keeper

    def layer(self) -> int:
        """Returns the layer in the point's name.

        Raises:
            InvalidArgumentError: The point is in no block.
        """
        layer = Address.parse(self.name).layer
        if layer is None:
            raise InvalidArgumentError(f"hook point {self.name!r} is in no layer", expected="a point of blocks.{l}")
        return layer

    @property
    def position(self) -> int:
        """Column in the sequence of this forward's first token: how many tokens the KV cache holds; padding counts.

        It is 0 in a forward without a KV cache, and when a component is called alone. `value[:, i]` of a value with a
        `pos` axis is at `hook.position + i`, with two exceptions: in generation the prompt's logits, of which the model
        computes the last position alone, and values of all keys (`hook_rot_k`).

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> seen = []
            >>> def note(value, hook):
            ...     seen.append((hook.step, hook.position, value.shape[1]))
            >>> text = bridge.generate("import os", fwd_hooks=[("blocks.0.hook_resid_post", note)], max_new_tokens=3)
            >>> first = seen[0][2]
            >>> seen == [(0, 0, first), (1, first, 1), (2, first + 1, 1)]
            True

        Raises:
            InvalidArgumentError: The model's cache counts no tokens, and earlier forwards ran while nothing listened.
        """
        position = self._stretch.position
        if position is None:
            raise InvalidArgumentError(
                "it is not known how many tokens came before this forward",
                where=self.name,
                reason="the cache of a model without attention holds a state, and does not count tokens; "
                "nothing listened in the forwards before this one",
                fix="have the hooks on from the first token on",
            )
        return int(position)

    @property
    def _stretch(self) -> Stretch:
        return self._keeper.stretch if self._past is None else self._past

    @property
    def step(self) -> int | None:
        """Number of this forward in `bridge.generate`: 0 for the prompt, then 1, 2, ...; None outside generation."""
        return self._stretch.step

    @property
    def width(self) -> int | None:
        """Columns of the sequence including this forward and the KV cache; None if unknown."""
        return None if self._stretch.length is None else self.position + self._stretch.length

    @property
    def is_listening(self) -> bool:
        """Whether any function is on the point, of whatever context."""
        return bool(self._listeners["fwd"] or self._listeners["bwd"] or self._sinks)

    @property
    def has_lasting(self) -> bool:
        """Whether a function is on the point that acts in every forward of the model until it is taken off."""
        return any(listener.scope is None for there in self._listeners.values() for listener in there)

    @property
    def is_heard(self) -> bool:
        """Whether something needs the value, or its gradient, in forwards of the present context."""
        return self.is_listening and bool(self.heard("fwd") or self.is_heard_backward)

    @property
    def is_heard_backward(self) -> bool:
        """Whether something needs the value's gradient in forwards of the present context."""
        return bool(self.heard("bwd")) or self.gradient_sink is not None

    @property
    def gradient_sink(self) -> Sink | None:
        """What gets the point and a tensor with the value's gradient, or an object that computes the gradient."""
        return next((sink for sink, scope in self._sinks if scope is None or is_inside(scope)), None)

    def listeners(self, dir: Direction) -> tuple[Listener, ...]:
        """Returns the listeners of a direction, in order."""
        return tuple(self._listeners[dir])

    def heard(self, dir: Direction) -> tuple[Listener, ...]:
        """Returns the listeners of a direction that see forwards of the present context, in order."""
        return tuple([listener for listener in self._listeners[dir] if listener.is_heard])

    def add_hook(
        self,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
        name: str | None = None,
    ) -> Listener:
        """Puts a function on the point.

        Args:
            hook: Called with the value (`"fwd"`) or its gradient (`"bwd"`), and with this point.
            dir: `"fwd"` or `"bwd"`.
            is_permanent: Whether `reset_hooks` leaves it, unless told otherwise.
            prepend: Whether it is called before the functions there already.
            name: The name that the function sees as `hook.name`; by default the canonical one.

        Raises:
            HookTypeError: `hook` cannot be called with a value and a point.
            InvalidArgumentError: `dir` is neither of the two, or another argument is of the wrong kind.
        """
        check_flags(is_permanent=is_permanent, prepend=prepend)
        if name is not None:
            check_kind(str, name=name)
        if not isinstance(dir, str) or dir not in self._listeners:
            raise InvalidArgumentError(f"unknown direction {dir!r}", expected="'fwd' or 'bwd'", where=self.name)
        listener = Listener(hook, name or self.name, is_permanent)
        self.put(listener, dir, prepend=prepend)
        return listener

    def put(self, listener: Listener, dir: Direction, *, prepend: bool = False) -> None:
        """Puts a listener on the point, or raises and leaves the point as it was."""
        there = self._listeners[dir]
        with self._keeper.changing():
            there.insert(0 if prepend else len(there), listener)
            try:
                self._keeper.changed(self)
            except BaseException:
                there.remove(listener)
                raise

    def remove(self, listener: Listener) -> None:
        """Takes one listener off, if it is still on."""
        with self._keeper.changing():
            for there in self._listeners.values():
                if listener in there:
                    there.remove(listener)
            self._keeper.changed(self)

    def remove_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "fwd",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Takes off all functions of a direction.

        Those of a `with bridge.hooks()` that is open in another thread or task stay.

        Args:
            dir: `"fwd"` for those of values, `"bwd"` for those of gradients, or `"both"`.
            including_permanent: Whether permanent ones go too.
            level: None: hooks have no levels.

        Raises:
            InvalidArgumentError: `dir` is none of the three.
        """
        check_choice(("fwd", "bwd", "both"), dir=dir)
        check_no_level(level)
        with self._keeper.changing():
            for direction, there in self._listeners.items():
                if dir in (direction, "both"):
                    kept = [one.is_elsewhere or (one.is_permanent and not including_permanent) for one in there]
                    there[:] = itertools.compress(there, kept)
            self._keeper.changed(self)

    def offer(self, value: Tensor) -> tuple[Tensor, bool]:
        """Calls the listeners in order on a dense private copy of the value.

        Returns:
            The value after the last listener, and whether any of them changed it.
        """
        current, changed = _private_copy(value), False
        listeners = self.heard("fwd")  # a function may take hooks off, or put them on for later
        for listener in listeners:
            version = None if current.is_inference() else current._version
            result = listener.call(current, self._named(listener.name))
            if result is None or result is current:
                changed = changed or version is None or current._version != version
            else:
                self._check(result, value)
                # A function may keep what it returns, so the next one gets a copy.
                current, changed = result if listener is listeners[-1] else _private_copy(result), True
        return current, changed

    @contextlib.contextmanager
    def giving_gradient_to(self, sink: "Sink") -> Iterator[None]:
        """While the context is open, gives `sink` the tensor with the value's gradient in each forward of this run."""
        one = (sink, HERE.get())
        try:
            with self._keeper.changing():
                self._sinks.append(one)
                self._keeper.changed(self)
            yield
        finally:
            with self._keeper.changing():
                self._sinks.remove(one)
                self._keeper.changed(self)

    def backward_calls(self) -> list[Callable[[Tensor], Tensor | None]]:
        """Returns the backward listeners as tensor hooks of torch: from a gradient to an edited one, or None."""
        stretch = replace(self._stretch)  # by the time of backward the forward is over
        run = HERE.get()

        def tensor_hook(listener: Listener) -> Callable[[Tensor], Tensor | None]:
            def call(gradient: Tensor) -> Tensor | None:
                given = gradient.clone(memory_format=torch.contiguous_format)
                version = given._version
                point = self._named(listener.name)
                seen = point if stretch == self._stretch else replace(point, _past=stretch)
                # A thread of autograd's has no context: what it calls belongs to the run of the forward.
                result: object = self._keeper.call(self.name, HERE.get() or run, listener.call, given, seen)
                if isinstance(result, tuple) and len(result) == 1:  # as torch's own backward hooks may return it
                    result = result[0]
                if result is None or result is given:
                    return given if given._version != version else None
                self._check(result, gradient)
                return cast("Tensor", result)

            return call

        return [tensor_hook(listener) for listener in self.heard("bwd")]

    def _named(self, name: str) -> "HookPoint":
        """Returns the point under one of its names; it shares everything but the name."""
        if name == self.name:
            return self
        return replace(self, name=name)

    def _check(self, result: object, value: Tensor) -> None:
        if not isinstance(result, Tensor):
            raise HookTypeError(
                "a hook function returned something that is not a tensor",
                expected="a tensor, or None for 'edited in place or only read'",
                got=type(result).__name__,
                where=self.name,
            )
        if result.shape != value.shape:
            shape = ", ".join(f"{axis}={size}" for axis, size in zip(self.axes, value.shape, strict=False))
            raise HookValueError(
                "a hook function returned a value of the wrong shape",
                expected=f"{list(value.shape)} ({shape})",
                got=str(list(result.shape)),
                where=self.name,
            )
        if result.dtype != value.dtype:
            raise HookTypeError(
                "a hook function returned a value of the wrong dtype",
                expected=str(value.dtype),
                got=str(result.dtype),
                where=self.name,
                fix=f"return value.to({value.dtype})",
            )
        if result.device != value.device:
            raise HookValueError(
                "a hook function returned a value on the wrong device",
                expected=str(value.device),
                got=str(result.device),
                where=self.name,
                fix=f"return value.to({str(value.device)!r})",
            )

    def _summary(self) -> Summary:
        entry = entry_of(self.name)
        rows = {
            "axes": with_sizes(self.axes, self.sizes),
            "value": entry.value,
            "a write changes": entry.write,
            "reached at": str(self.place),
            "other names": ", ".join(self.aliases),
        }
        return Summary(repr(self), ["", "hook point"], [[name, text] for name, text in rows.items() if text])

    def __repr__(self) -> str:
        listeners = sum(map(len, self._listeners.values()))
        count = f", {listeners} listening" if listeners else ""
        return f"HookPoint({self.name}: [{', '.join(self.axes)}]{count})"


def _private_copy(value: Tensor) -> Tensor:
    """Returns a dense copy that counts in-place edits, which tensors made under inference mode do not."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return value.clone(memory_format=torch.contiguous_format)
    return value.clone(memory_format=torch.contiguous_format)
