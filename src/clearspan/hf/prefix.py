"""Keys and values of earlier positions, in front of those that a run computes for the last ones."""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Cache

KeysAndValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, `[row, kv_head, pos, d_head]`."""


@dataclass(frozen=True)
class Prefix:
    """What a forward left in its KV cache: keys and values of all layers and positions.

    A layer that keeps the last positions alone when it generates (a sliding window) has all of them here; which of
    them a query attends to, the model's masks say.

    Attributes:
        layers: Keys and values by the order of the model's own cache.
    """

    layers: tuple[KeysAndValues, ...]

    @classmethod
    def of(cls, cache: "Cache") -> "Prefix":
        """Returns what a run has left in a cache that `empty` made."""
        return cls(tuple((layer.keys, layer.values) for layer in _layers(cache)))

    def cache(self, length: int) -> "Cache":
        """Returns a cache of the first positions, for a run of the positions after them.

        It keeps nothing that the run adds. A run of more rows than there are here has these rows over and over.

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
    """Returns a cache that keeps all positions of all layers."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache()


def _layers(cache: "Cache") -> Iterator[Any]:
    layers: Iterable[Any] = vars(cache)["layers"]
    yield from layers


@functools.cache
def _kind() -> type[Any]:
    from transformers.cache_utils import DynamicLayer

    class PrefixLayer(DynamicLayer):
        """Keys and values that come before those of a run, which are not kept."""

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
