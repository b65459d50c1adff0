"""Position: where in the sequence a model's forward is, noted at its entry while somebody listens."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from clearspan.points import Stretch


class Follower:
    """Keeps a model's stretch while it is installed: set when a forward starts, and back when it ends.

    Args:
        model: The Hugging Face model.
        is_suspended: Asked at each forward whether to leave it, since it is one inside a hook function.

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
        """Numbers the forwards in which someone listens by these steps, as generation's, while the context is open."""
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
        self.stretch.position = self._positions_before(kwargs)
        self.stretch.length = _length(kwargs)
        self.stretch.step = next(self._steps, None)
        # Put there anew in each forward, so that it comes after the hooks of the points at the model's own output.
        self._exit.close()
        self._exit.callback(self._model.register_forward_hook(self._leave, always_call=True).remove)

    def _leave(self, *_: Any) -> None:
        if not self._is_suspended():
            self.stretch.position, self.stretch.step, self.stretch.length = 0, None, None

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns what the model is called with, by the names of its forward."""
        if not args:
            return kwargs
        by_position = inspect.signature(type(self._model).forward).bind_partial(self._model, *args)
        return {**by_position.arguments, **kwargs}

    def _positions_before(self, kwargs: dict[str, Any]) -> int | Tensor:
        """Returns how many positions are in the KV cache that the model is called with."""
        past = kwargs.get("past_key_values")
        count = 0 if past is None else past.get_seq_length()
        # A cache of fixed length counts on in this very tensor; to read it here would wait for the device.
        return count.clone() if isinstance(count, Tensor) else count


def _length(kwargs: dict[str, Any]) -> int | None:
    """Returns how many tokens the model is called with."""
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            return kwargs[name].shape[1]
    return None
