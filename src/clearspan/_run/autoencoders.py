"""Sparse autoencoders in the loop: what one makes of a value takes its place, and its inside has hook points."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from clearspan.checks import check_flags
from clearspan.errors import InvalidArgumentError, PointNotReachedError
from clearspan.hf.taps import Taps
from clearspan.model import Model
from clearspan.points import OF_AUTOENCODERS, HookPoint, Listener, Offered, Place, ReadOnly, Side, Stretch
from clearspan.scopes import Scope, is_inside


class Autoencoder(Protocol):
    """What a sparse autoencoder or a transcoder does; where it belongs is in its `cfg`, see `ends`."""

    def encode(self, x: Tensor, /) -> Tensor:
        """Returns the features' activations `[batch, pos, feature]`."""
        ...

    def decode(self, feature_acts: Tensor, /) -> Tensor:
        """Returns the reconstruction of what was encoded or, of a transcoder, of what it stands for."""
        ...


def ends(autoencoder: object) -> tuple[str, str]:
    """Returns the names of the points that an autoencoder reads and writes.

    They are `hook_name` and `hook_name_out` of its `cfg.metadata`, or of its `cfg`; without the second one the first
    is written.

    Raises:
        InvalidArgumentError: It has none, or no `encode` and `decode`.
    """
    cfg = getattr(autoencoder, "cfg", None)
    said = getattr(cfg, "metadata", None) or cfg
    reads = getattr(said, "hook_name", None)
    if not isinstance(reads, str) or not all(callable(getattr(autoencoder, do, None)) for do in ("encode", "decode")):
        raise InvalidArgumentError(
            "this is no sparse autoencoder that is known to a hook point",
            expected="encode(value), decode(activations), and cfg.metadata.hook_name or cfg.hook_name",
            got=type(autoencoder).__name__,
        )
    writes = getattr(said, "hook_name_out", None)
    return reads, writes if isinstance(writes, str) else reads


def reconstruction(autoencoder: Autoencoder, acts: Tensor, read: Tensor) -> Tensor:
    """Returns what an autoencoder makes of features' activations and, where it has a skip connection, of what it reads.

    A skip transcoder's `decode` leaves out its `W_skip` `[d_out, d_in]`, which its own forward adds.
    """
    made, skip = autoencoder.decode(acts), getattr(autoencoder, "W_skip", None)
    return made + read.to(skip.dtype) @ skip.T if isinstance(skip, Tensor) else made


@dataclass(eq=False)
class Splice:
    """An autoencoder on a hook point: hook functions of that point, and the points inside of it.

    Attributes:
        autoencoder: The autoencoder.
        name: The name by which it names the point that it reads.
        reads: The point that it reads.
        writes: The point whose value it replaces; the same one unless it is a transcoder.
        keeps_error: Whether what it does not reconstruct is added to what it gives.
        points: Its own points by the last part of their names.
        taps: Gives the model's taps.
        scope: The stretch of code whose forwards it acts in, or None for every forward of the model.
        cover: The one that has its place for now, or None.
        is_off: Whether it was taken off.
        lasting: Its hook functions that are on until it is taken off, with their points.
    """

    autoencoder: Autoencoder
    name: str
    reads: HookPoint
    writes: HookPoint
    keeps_error: bool
    points: Mapping[str, HookPoint]
    taps: Callable[[], Taps | None]
    scope: Scope | None = None
    cover: "Splice | None" = None
    is_off: bool = False
    lasting: list[tuple[HookPoint, Listener]] = field(default_factory=list)
    _read: Tensor | None = None

    def hooks(self) -> list[tuple[str, Callable[..., Tensor | None]]]:
        """Returns its hook functions with their points' names."""
        writing = [(self.writes.name, self.written)]
        return writing if self.reads is self.writes else [(self.reads.name, self.remember), *writing]

    @property
    def is_acting(self) -> bool:
        """Whether it acts in the forward under way: it is on, and no other one has its place there."""
        other = self.cover
        return not self.is_off and (other is None or not (other.scope is None or is_inside(other.scope)))

    def remember(self, value: Tensor, hook: HookPoint) -> None:
        """Keeps what a transcoder reads until its output's place is reached."""
        self._read = value

    def written(self, value: Tensor, hook: HookPoint) -> Tensor | None:
        """Returns what takes the value's place, or None where that is the value itself."""
        if not self.is_acting:
            return None
        read, self._read = value if self.reads is self.writes else self._read, None
        if read is None:
            raise PointNotReachedError(
                f"the transcoder on {self.name} was not given what it reads", where=f"it writes {self.writes.name}"
            )
        given, is_given = self._through("hook_sae_input", read)
        acts, are_changed = self._through("hook_sae_acts_post", self.autoencoder.encode(given))
        made = reconstruction(self.autoencoder, acts, given).to(value.dtype)
        result, is_changed = self._through("hook_sae_recons", made)
        if self.keeps_error:
            result, is_changed = self._with_error(value, read, result, is_given or are_changed or is_changed)
            result, is_output = self._through("hook_sae_output", result)
            return result if is_changed or is_output or result.requires_grad else None
        return self._through("hook_sae_output", result)[0]

    def _with_error(self, value: Tensor, read: Tensor, made: Tensor, is_changed: bool) -> tuple[Tensor, bool]:
        """Returns a reconstruction with what it lacks where nobody writes inside, and whether that is another value.

        Args:
            value: The value whose place it takes.
            read: What was encoded.
            made: The reconstruction.
            is_changed: Whether somebody wrote inside.
        """
        with torch.no_grad():
            undisturbed = made
            if is_changed:
                acts = self.autoencoder.encode(read)
                undisturbed = reconstruction(self.autoencoder, acts, read).to(value.dtype)
        error, is_error = self._through("hook_sae_error", value.detach() - undisturbed.detach())
        result = made + error
        if is_changed or is_error:
            return result, True
        return value.detach() + (result - result.detach()), False  # the value itself, with the gradient of the sum

    def _through(self, leaf: str, value: Tensor) -> tuple[Tensor, bool]:
        """Offers a value to the point of its name; returns the value that goes on, and whether it was changed."""
        point, is_changed = self.points[leaf], False
        run = self._model_taps.present
        recording = None if run is None else run.recording
        if point.is_heard:
            value, is_changed = point.offer(value)
        if point.is_heard_backward:
            if not torch.is_grad_enabled():
                raise PointNotReachedError(
                    "a backward hook cannot fire: no gradient flows through the value",
                    where=f"{point.name} (under no_grad)",
                    fix="run with gradients enabled",
                )
            value = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
            if point.gradient_sink is not None:
                point.gradient_sink(point, value)
            for call in point.backward_calls():
                value.register_hook(call)
        if recording is not None and point.name in recording.wanted:
            recording.keep_value(point, value)
        return value, is_changed

    @property
    def _model_taps(self) -> Taps:
        taps = self.taps()
        assert taps is not None, "whose forward calls it"
        return taps


def spliced(model: Model, autoencoder: object, keeps_error: bool | None) -> Splice:
    """Returns an autoencoder made ready for a model; it is tried on zeros, and not on the model yet.

    Args:
        model: The model.
        autoencoder: The autoencoder.
        keeps_error: Whether what it does not reconstruct is added; None for what its own `use_error_term` says.

    Raises:
        InvalidArgumentError: It is no autoencoder, or does not fit the points that it names.
        UnknownPointError: The model has no such points.
    """
    names = ends(autoencoder)
    reads, writes = map(model.index.find, names)
    if keeps_error is None:
        keeps_error = bool(getattr(autoencoder, "use_error_term", False))
    check_flags(use_error_term=keeps_error)
    found = cast("Autoencoder", autoencoder)
    sizes = {**writes.sizes, "feature": _tried(model, found, reads, writes)}
    points = {
        entry.leaf: HookPoint(
            f"{names[1]}.{entry.leaf}",
            _axes(entry.leaf, reads, writes),
            Place(names[1], Side.OUTPUT, argument=entry.leaf),
            Offered(),
            sizes={**reads.sizes, **sizes},
        )
        for entry in OF_AUTOENCODERS
        if keeps_error or entry.leaf != "hook_sae_error"
    }
    return Splice(found, names[0], reads, writes, keeps_error, points, weakref.ref(model.taps))


def _axes(leaf: str, reads: HookPoint, writes: HookPoint) -> tuple[str, ...]:
    match leaf:
        case "hook_sae_acts_post":
            return ("batch", "pos", "feature")
        case "hook_sae_input":
            return reads.axes
        case _:
            return writes.axes


def _tried(model: Model, autoencoder: Autoencoder, reads: HookPoint, writes: HookPoint) -> int:
    """Returns how many features an autoencoder has, after a trial on zeros of the shape that its point has.

    Raises:
        InvalidArgumentError: It does not take that, or gives another shape; or the point has no positions.
    """
    for point in (reads, writes):
        if point.axes[:2] != ("batch", "pos") or isinstance(point.access, ReadOnly):
            raise InvalidArgumentError(
                f"no sparse autoencoder can be on {point.name}",
                expected="a point whose values are [batch, pos, ...], and that can be written",
                got=f"[{', '.join(point.axes)}]",
            )
    given, made = ([1, 1, *(point.sizes[axis] for axis in point.axes[2:])] for point in (reads, writes))
    zeros = torch.zeros(given, dtype=model.hf_model.dtype, device=model.device)
    try:
        with torch.no_grad():
            acts = autoencoder.encode(zeros)
            found = reconstruction(autoencoder, acts, zeros)
    except (RuntimeError, ValueError) as error:
        raise _misfit(reads, given, f"{type(error).__name__}: {error}".splitlines()[0]) from error
    if list(acts.shape[:2]) != [1, 1] or acts.ndim != 3 or list(found.shape) != made:
        raise _misfit(reads, given, f"it makes {list(acts.shape)} of that, and {list(found.shape)} again")
    return acts.shape[-1]


def _misfit(point: HookPoint, given: list[int], reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the sparse autoencoder does not fit {point.name}",
        expected=f"one that encodes and decodes {given} ({', '.join(point.axes)})",
        reason=reason,
    )


class Splices(Mapping[str, Splice]):
    """The autoencoders on a model, by the point that each writes; and the keeper of their points.

    Args:
        taps: The model's taps.
    """

    def __init__(self, taps: Taps) -> None:
        self._taps = taps
        self._on: dict[str, Splice] = {}

    def __getitem__(self, name: str) -> Splice:
        return self._on[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._on)

    def __len__(self) -> int:
        return len(self._on)

    def put(self, model: Model, splice: Splice) -> Splice | None:
        """Has an autoencoder's points be the model's; returns the one whose place it takes, which is covered.

        Raises:
            InvalidArgumentError: Another context (`contextvars`) has one there.
        """
        name = splice.writes.name
        earlier = self._on.get(name)
        if earlier is not None:
            if earlier.scope is not None and earlier.scope.is_elsewhere:
                raise InvalidArgumentError(
                    f"another thread has a sparse autoencoder on {name}",
                    fix="clearspan.boot(bridge.hf_model): a bridge for each thread",
                )
            earlier.cover = splice
            self._hide(model, earlier)
        self._on[name] = splice
        self._show(model, splice)
        return earlier

    def remove(self, model: Model, splice: Splice, earlier: Splice | None = None) -> None:
        """Takes an autoencoder off; the one whose place it had comes back."""
        name = splice.writes.name
        if self._on.get(name) is not splice:  # taken off before
            return
        self._hide(model, splice)
        del self._on[name]
        if earlier is not None:
            self._on[name], earlier.cover = earlier, None
            self._show(model, earlier)

    def _show(self, model: Model, splice: Splice) -> None:
        for point in splice.points.values():
            point.be_kept_by(self)
        model.index.add(splice.points.values(), splice.writes)
        model.taps.points += splice.points.values()
        model.remembered.pop("choices", None)

    def _hide(self, model: Model, splice: Splice) -> None:
        model.index.remove(splice.points.values())
        for point in splice.points.values():
            model.taps.points.remove(point)
        model.remembered.pop("choices", None)

    # --- the keeper of their points ----------------------------------------------------------------------------------

    @property
    def stretch(self) -> Stretch:
        """Where in the sequence the forward under way in this thread is."""
        return self._taps.stretch

    def call(self, name: str, outer: Scope | None, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function of their points; see `Taps.call`."""
        return self._taps.call(name, outer, function, *args)

    def changing(self) -> AbstractContextManager[None]:
        """Returns a context in which listeners come and go; see `Taps.changing`."""
        return self._taps.changing()

    def changed(self, point: HookPoint) -> None:
        """Does nothing: the torch hook is that of the point that the autoencoder is on."""
