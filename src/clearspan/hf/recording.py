"""Recordings: the raw tensors of one forward, kept by reference."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clearspan.hf.attention import AttentionCall, Observer, observed
from clearspan.hf.compiled import around
from clearspan.hf.tensors import primary_input, primary_output
from clearspan.points import HookPoint, Place, Side

Transform = Callable[[Tensor, int], Tensor]

INSIDE = (Side.SCORES, Side.PATTERN)


@dataclass(frozen=True)
class RecordingPlan:
    """Which modules give the raw tensors of a choice of points. It is made once and serves every run of that choice.

    Attributes:
        places: The raw tensors.
        modules: Each module with the keys under which its input and its output are kept, or None.
        attentions: Attention modules whose inside is kept, with their paths.
        around: All these modules and those that they are in.
    """

    places: frozenset[Place]
    modules: tuple[tuple[nn.Module, str | None, str | None], ...]
    attentions: tuple[tuple[nn.Module, str], ...]
    around: tuple[nn.Module, ...]

    @classmethod
    def of(cls, model: nn.Module, places: Iterable[Place]) -> "RecordingPlan":
        """Returns the plan for these raw tensors of a model."""
        places = frozenset(places)
        paths = dict.fromkeys(place.module for place in sorted(places, key=str))

        def key(path: str, side: Side) -> str | None:
            place = Place(path, side)
            return place.key if place in places else None

        ends = {path: (key(path, Side.INPUT), key(path, Side.OUTPUT)) for path in paths}
        inside = dict.fromkeys(place.module for place in places if place.side in INSIDE)
        return cls(
            places,
            tuple((model.get_submodule(path), *keys) for path, keys in ends.items() if any(keys)),
            tuple((model.get_submodule(path), path) for path in inside),
            around(model, paths),
        )


class Recording:
    """What one forward left behind: raw tensors by place, and values by point where listeners stood beside.

    The inside of attention is kept as the call of the attention function, whose tensors the forward made anyway; scores
    and pattern are computed from it, by the model's own eager function, when they are looked up.

    Args:
        transform: Applied to a tensor and its position axis before it is kept (slicing, moving), or None.
        may_defer: Whether the inside of attention may be computed later. It may not where keys and values lie in a KV
            cache, which may go on in place.

    Attributes:
        values: Values in canonical axes by point's name; they go before the raw tensors.
        wanted: Names of the points that the taps hand over themselves.
    """

    def __init__(self, transform: Transform | None = None, may_defer: bool = True) -> None:
        self.values: dict[str, Tensor] = {}
        self.wanted: frozenset[str] = frozenset()
        self._raw: dict[str, Tensor] = {}
        self._calls: dict[str, AttentionCall] = {}
        self._versions: dict[str, int] = {}
        self._transform = transform
        self._defers = may_defer and transform is None

    def raw(self, place: Place) -> Tensor:
        """Returns the raw tensor of a place."""
        if place.key not in self._raw and place.side in INSIDE:
            call = self._calls[place.module]
            with torch.no_grad():
                scores, pattern = call.inside()
            self.keep_raw(place, scores if place.side is Side.SCORES else pattern)
        return self._raw[place.key]

    def has(self, point: HookPoint) -> bool:
        """Whether the point's value was kept, or can be computed from what was."""
        inside = point.place.side in INSIDE and point.place.module in self._calls
        return inside or point.name in self.values or point.place.key in self._raw

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
        return key in self._versions and tensor._version != self._versions[key]

    def nbytes(self) -> int:
        """Returns the bytes of all storages kept, each counted once."""
        calls = [tensor for call in self._calls.values() for tensor in call.tensors().values()]
        kept = [*self._raw.values(), *self.values.values(), *calls]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())

    def keep_raw(self, place: Place, tensor: Tensor) -> None:
        """Keeps a place's raw tensor."""
        self._keep(self._raw, place.key, tensor, place.pos_dim)

    def keep_value(self, point: HookPoint, tensor: Tensor) -> None:
        """Keeps a point's value."""
        self._keep(self.values, point.name, tensor, point.place.pos_dim)

    def _keep(self, kept: dict[str, Tensor], key: str, tensor: Tensor, pos_dim: int) -> None:
        # Called hundreds of times in a forward, so it calls nothing that it need not.
        if tensor.requires_grad:
            tensor = tensor.detach()
        if self._transform is not None:
            tensor = self._transform(tensor, pos_dim)
        kept[key] = tensor
        if not tensor.is_inference():
            self._versions[key] = tensor._version

    @contextlib.contextmanager
    def hooks(self, plan: RecordingPlan, is_paused: Callable[[], bool]) -> Iterator[None]:
        """Keeps the plan's raw tensors, by one torch hook a module, while the context is open.

        Args:
            plan: What to keep.
            is_paused: Asked at each tensor whether to leave it, since it belongs to another forward.
        """
        handles = []
        try:
            for module, entry, exit_ in plan.modules:
                handles.append(module.register_forward_hook(self._hook(entry, exit_, is_paused), with_kwargs=True))
            with observed({module: self._observer(path, is_paused) for module, path in plan.attentions}):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _observer(self, path: str, is_paused: Callable[[], bool]) -> Observer:
        def keep(call: AttentionCall) -> Any:
            if is_paused():
                return call.run()
            if call.kwargs.get("dropout"):  # what multiplies the values is known only to the call itself
                return call.run_watched(self._visit(path, Side.SCORES), self._visit(path, Side.PATTERN))
            self._calls[path] = call.detached() if torch.is_grad_enabled() else call
            for name, tensor in call.tensors().items():
                if not tensor.is_inference():
                    self._versions[f"{path}:{name}"] = tensor._version
            if not self._defers:
                for side in INSIDE:
                    self.raw(Place(path, side))
                del self._calls[path]
            return call.run()

        return keep

    def _visit(self, path: str, side: Side) -> Callable[[Tensor], Tensor]:
        def visit(tensor: Tensor) -> Tensor:
            self.keep_raw(Place(path, side), tensor)
            return tensor

        return visit

    def _hook(self, entry: str | None, exit_: str | None, is_paused: Callable[[], bool]) -> Callable[..., None]:
        raw = self._raw

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if is_paused():
                return
            if entry is not None:
                self._keep(raw, entry, args[0] if args else primary_input(args, kwargs), 1)
            if exit_ is not None:
                self._keep(raw, exit_, output if type(output) is Tensor else primary_output(output), 1)

        return keep
