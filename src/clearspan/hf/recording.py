"""Recordings: the raw tensors of one forward, kept by reference."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from clearspan.hf.tensors import primary_input, primary_output
from clearspan.points import HookPoint, Place, Side

Transform = Callable[[Tensor, int], Tensor]


class Recording:
    """What one forward left behind: raw tensors by place, and values by point where listeners stood beside.

    Args:
        transform: Applied to a tensor and its position axis before it is kept (slicing, moving), or None.

    Attributes:
        raw: Raw tensors by place.
        values: Values in canonical axes by point's name; they go before the raw tensors.
        versions: The edit count of each tensor when it was kept, where torch counts edits.
        wanted: Names of the points that the taps hand over themselves.
    """

    def __init__(self, transform: Transform | None = None) -> None:
        self.raw: dict[Place, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.versions: dict[Place | str, int] = {}
        self.wanted: set[str] = set()
        self._transform = transform

    @property
    def has_transform(self) -> bool:
        """Whether tensors are sliced or moved before they are kept."""
        return self._transform is not None

    def keep_raw(self, place: Place, tensor: Tensor) -> None:
        """Keeps a place's raw tensor."""
        self.raw[place] = self._note(place, tensor, place.pos_dim)

    def keep_value(self, point: HookPoint, tensor: Tensor) -> None:
        """Keeps a point's value."""
        self.values[point.name] = self._note(point.name, tensor, point.place.pos_dim)

    def _note(self, key: Place | str, tensor: Tensor, pos_dim: int) -> Tensor:
        if tensor.requires_grad:
            tensor = tensor.detach()
        if self._transform is not None:
            tensor = self._transform(tensor, pos_dim)
        if not tensor.is_inference():
            self.versions[key] = tensor._version
        return tensor

    @contextlib.contextmanager
    def hooks(self, model: nn.Module, places: Iterable[Place]) -> Iterator[None]:
        """Keeps the raw tensors of these places by one torch hook a module while the context is open."""
        modules: dict[str, dict[Side, Place]] = {}
        for place in places:
            modules.setdefault(place.module, {})[place.side] = place
        handles = []
        try:
            for path, sides in modules.items():
                module = model.get_submodule(path)
                handles.append(module.register_forward_hook(self._hook(sides), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, sides: dict[Side, Place]) -> Callable[..., None]:
        entry, exit_ = sides.get(Side.INPUT), sides.get(Side.OUTPUT)
        if self._transform is None and torch.is_inference_mode_enabled():
            return self._bare_hook(entry, exit_)

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if entry is not None:
                self.keep_raw(entry, primary_input(args, kwargs))
            if exit_ is not None:
                self.keep_raw(exit_, primary_output(output))

        return keep

    def _bare_hook(self, entry: Place | None, exit_: Place | None) -> Callable[..., None]:
        """The hook under inference mode, where there is no graph to leave and there are no edits to count."""
        raw = self.raw

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if entry is not None:
                raw[entry] = args[0] if args else primary_input(args, kwargs)
            if exit_ is not None:
                raw[exit_] = output if type(output) is Tensor else primary_output(output)

        return keep
