"""Where in the sequence a forward is, and the keys and values of the positions before it."""

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clearspan.hf.derived import Pending
from clearspan.hf.keywords import kv_cache_in
from clearspan.hf.torch_hooks import after, before
from clearspan.hf.turns import Turns
from clearspan.points import Derivation, Side, Stretch

if TYPE_CHECKING:
    from transformers import Cache

KeysAndValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, `[row, kv_head, pos, d_head]`."""


class Passage(threading.local):
    """What is on its way in the forward under way, in the thread that does it.

    Attributes:
        stretch: Where in the sequence the forward is.
        rows: Rows of the input of modules that are running, by their paths.
        pending: Edits of derived values between their source and their targets.
        calls: How often modules that are called several times were entered, left, and seen inside (None), by path.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets what a forward left that did not come to its end."""
        self.stretch = Stretch()
        self.rows: dict[str, int] = {}
        self.pending: dict[Derivation, Pending] = {}
        self.calls: dict[tuple[str, Side | None], int] = {}


class Follower:
    """While installed, sets the stretch when a forward of the model starts and resets it when the forward ends.

    Args:
        model: The Hugging Face model.
        passage: Whose stretch.
        turns: The turns on the model. A forward inside a hook function is left out.
        follow: Returns what brings torch hooks to modules that have taken others' place, or None.
    """

    def __init__(
        self, model: nn.Module, passage: Passage, turns: Turns, follow: Callable[[], Callable[[], None] | None]
    ) -> None:
        self._model = model
        self._passage = passage
        self._turns = turns
        self._follow = follow
        self.drops_positions = False
        self._handles = contextlib.ExitStack()
        self._exit: int | None = None
        self._users = 0
        self.handles: set[int] = set()
        self._counted: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def install(self) -> None:
        """Puts the torch hooks on the model, if they are not there; each call is undone by one of `remove`."""
        self._users += 1
        if self._users > 1:
            return
        entry = before(self._model, self._enter, first=True)
        self._handles.callback(entry.remove)
        exit_ = after(self._model, self._leave, always=True)
        self._handles.callback(exit_.remove)
        self._exit, self.handles = exit_.id, {entry.id, exit_.id}

    def go_last(self) -> None:
        """Has the forward end after the torch hooks of the points at the model's own output."""
        assert self._exit is not None, "it is installed"
        hooks: Any = self._model._forward_hooks  # an OrderedDict
        hooks.move_to_end(self._exit)

    def remove(self) -> None:
        """Takes them off, when nobody needs them any more."""
        self._users -= 1
        if not self._users:
            self._handles.close()

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        if self._turns.is_away:
            return None
        follow = self._follow()
        if follow is not None:
            follow()
        named, run = self._by_name(args, kwargs), self._turns.present(self._passage)
        step = None if run is None or run.steps is None else next(run.steps, None)
        length = _length(named)
        # A generation counts its forwards also while nothing listens; positions are of use to listeners alone.
        is_heard = step is None or self._users > 1
        self._passage.stretch = Stretch(self._positions_before(named, is_heard=is_heard), step, length)
        self._passage.calls.clear()
        return (args, of_all_positions(kwargs, length)) if self.drops_positions and length else None

    def _leave(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if self._turns.is_away:
            return
        stretch, self._passage.stretch = self._passage.stretch, Stretch()
        self._passage.calls.clear()
        past = kv_cache_in(output) if isinstance(output, Mapping) else None
        if past is None or not isinstance(stretch.position, int) or stretch.length is None:
            return
        if not _counts(past):
            self._counted[past] = stretch.position + stretch.length

    def _positions_before(self, kwargs: Mapping[str, Any], *, is_heard: bool) -> int | Tensor | None:
        """Returns how many positions came before a forward; None where its cache does not count them, nor did we.

        A cache of states alone holds no positions: what went into it is counted in the forwards that are followed.

        Args:
            kwargs: The model's arguments by name.
            is_heard: Whether anyone listens. What the cache counts is not asked for otherwise.
        """
        past = kv_cache_in(kwargs)
        if past is None:
            return 0
        if not _counts(past):
            return self._counted.get(past, None if _has_state(past) else 0)
        if not is_heard:
            return None
        layers = _counting(past) or []
        counts = [layer.get_seq_length() for layer in layers] or [0]
        # A cache of fixed length counts in this very tensor; reading it here would wait for the device. Layers of
        # linear attention count nothing, so that the first layer need not tell.
        return counts[0].clone() if isinstance(counts[0], Tensor) else max(counts)

    def _by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the model's arguments by the names of its forward's parameters."""
        if not args:
            return kwargs
        by_position = inspect.signature(type(self._model).forward).bind_partial(self._model, *args)
        return {**by_position.arguments, **kwargs}


def _counting(past: Any) -> list[Any] | None:
    """Returns the layers of a KV cache that count positions, or the cache itself; None where it has states alone."""
    from transformers.cache_utils import CacheLayerMixin

    if not _counts(past):
        return None
    layers = vars(past).get("layers")
    return [layer for layer in layers if isinstance(layer, CacheLayerMixin)] if isinstance(layers, list) else [past]


def _counts(past: Any) -> bool:
    """Whether a KV cache counts positions: it does, unless it has states alone."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    layers = vars(past).get("layers")
    if not isinstance(past, Cache):
        return False
    return not isinstance(layers, list) or not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)


def is_empty(past: Any) -> bool:
    """Returns whether a cache holds nothing of an earlier forward."""
    layers = _counting(past)
    return layers is not None and not any(bool(layer.get_seq_length()) for layer in layers) and not _holds_state(past)


def _holds_state(past: Any) -> bool:
    """Returns whether a cache has layers of states, and they hold what a forward left.

    Layers that use keys and values of others have a place in the cache too, which holds nothing.
    """
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    layers = vars(past).get("layers")
    is_stateful = isinstance(layers, list) and any(isinstance(one, LinearAttentionCacheLayerMixin) for one in layers)
    return is_stateful and _has_state(past)


def _has_state(past: Any) -> bool:
    """Returns whether a cache of states alone holds what a forward left."""
    from transformers.cache_utils import Cache

    return past.has_previous_state() if isinstance(past, Cache) else bool(vars(past).get("seqlen_offset", 1))


def of_all_positions(kwargs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Returns the keywords of a forward that asks for the same logits, and runs all blocks on all positions.

    Models whose last layers use keys of earlier ones (Gemma 4) run these on the last positions alone where a number
    says how many logits are wanted, and on all where positions are listed.
    """
    kept = kwargs.get("logits_to_keep")
    if not isinstance(kept, int) or not kept:
        return {**kwargs}
    return {**kwargs, "logits_to_keep": torch.arange(max(length - kept, 0), length)}


def _length(kwargs: Mapping[str, Any]) -> int | None:
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
    def of(cls, cache: "Cache", rows: int) -> "Prefix":
        """Returns what a run has left of its first rows in a cache that `empty` made."""
        return cls(tuple((layer.keys[:rows], layer.values[:rows]) for layer in vars(cache)["layers"]))

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


def keeps_more(model: nn.Module) -> bool:
    """Whether layers keep more of earlier positions than keys and values, such as keys by which keys are chosen."""
    from transformers.cache_utils import DynamicCache, DynamicIndexedLayer

    config = vars(model).get("config")
    if config is None:
        return False
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return any(isinstance(layer, DynamicIndexedLayer) for layer in layers)


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
