"""Where in the sequence a forward is, and the keys and values of the positions before it."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clearspan.points import Stretch

if TYPE_CHECKING:
    from transformers import Cache

KeysAndValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, `[row, kv_head, pos, d_head]`."""


class Follower:
    """While installed, sets a model's stretch when a forward starts and resets it when the forward ends.

    Args:
        model: The Hugging Face model.
        is_suspended: Asked at each forward: True leaves it out, since it runs inside a hook function.

    Attributes:
        stretch: The stretch of the forward under way.
    """

    def __init__(self, model: nn.Module, is_suspended: Callable[[], bool]) -> None:
        self.stretch = Stretch()
        self._model = model
        self._is_suspended = is_suspended
        self._steps: Iterator[int] = iter(())
        self._entry = contextlib.ExitStack()
        self._exit = contextlib.ExitStack()

    @contextlib.contextmanager
    def counting(self, steps: Iterator[int]) -> Iterator[None]:
        """Numbers the forwards of a generation by these steps while the context is open."""
        before, self._steps = self._steps, steps
        try:
            yield
        finally:
            self._steps = before

    def install(self) -> None:
        """Puts the torch hooks on the model."""
        handle = self._model.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
        self._entry.callback(handle.remove)

    def remove(self) -> None:
        """Takes them off."""
        self._entry.close()
        self._exit.close()

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_suspended():
            return
        kwargs = self._by_name(args, kwargs)
        self.stretch.position = _positions_before(kwargs)
        self.stretch.length = _length(kwargs)
        self.stretch.step = next(self._steps, None)
        # Registered anew in each forward, so that it runs after the hooks of the points at the model's own output.
        self._exit.close()
        self._exit.callback(self._model.register_forward_hook(self._leave, always_call=True).remove)

    def _leave(self, *_: Any) -> None:
        if not self._is_suspended():
            self.stretch.position, self.stretch.step, self.stretch.length = 0, None, None

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the model's arguments by the names of its forward's parameters."""
        if not args:
            return kwargs
        by_position = inspect.signature(type(self._model).forward).bind_partial(self._model, *args)
        return {**by_position.arguments, **kwargs}


def _positions_before(kwargs: dict[str, Any]) -> int | Tensor:
    """Returns how many positions the KV cache of a forward holds."""
    past = kwargs.get("past_key_values")
    count = 0 if past is None else past.get_seq_length()
    # A cache of fixed length counts in this very tensor; reading it here would wait for the device.
    return count.clone() if isinstance(count, Tensor) else count


def _length(kwargs: dict[str, Any]) -> int | None:
    """Returns how many tokens go into a forward."""
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            return kwargs[name].shape[1]
    return None


@dataclass(frozen=True)
class Prefix:
    """What a forward left in its KV cache: keys and values of all layers and positions.

    This includes layers with a sliding window, which in generation keep the last positions alone: the model's masks
    say which of them a query attends to.

    Attributes:
        layers: Keys and values in the order of the model's own cache.
    """

    layers: tuple[KeysAndValues, ...]

    @classmethod
    def of(cls, cache: "Cache") -> "Prefix":
        """Returns what a run has left in a cache that `empty` made."""
        return cls(tuple((layer.keys, layer.values) for layer in vars(cache)["layers"]))

    def cache(self, length: int) -> "Cache":
        """Returns a KV cache of the first positions, for a run of the positions after them.

        It keeps nothing that the run adds. For a run of more rows than are here, these rows are repeated.

        Args:
            length: How many positions.
        """
        from transformers.cache_utils import Cache

        prefixed = _kind()
        return Cache(layers=[prefixed(k[..., :length, :], v[..., :length, :]) for k, v in self.layers])

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(part.nbytes for layer in self.layers for part in layer)


def empty() -> "Cache":
    """Returns a KV cache that keeps all positions of all layers."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache()


@functools.cache
def _kind() -> type[Any]:
    from transformers.cache_utils import DynamicLayer

    class PrefixLayer(DynamicLayer):
        """Gives a run its prefix's keys and values in front of its own, and does not keep the run's."""

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.keys: Tensor = keys
            self.values: Tensor = values
            self.dtype, self.device = keys.dtype, keys.device
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> KeysAndValues:
            """Returns all keys and values that the run's queries see."""
            return _joined(self.keys, key_states), _joined(self.values, value_states)

    return PrefixLayer


def _joined(before: Tensor, new: Tensor) -> Tensor:
    copies = len(new) // len(before)
    rows = before.expand(copies, *before.shape[1:]) if len(before) == 1 else before.repeat(copies, 1, 1, 1)
    return torch.cat([rows, new], dim=-2)
