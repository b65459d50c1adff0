"""The activation cache: raw tensors of one forward, shown under any name in canonical axes on look-up."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clearspan.bridge.cache_methods import CacheMethods
from clearspan.bridge.cache_table import described
from clearspan.errors import EditedEntryError, InvalidArgumentError, NotCachedError
from clearspan.points import Derivation, Derived, HookPoint, get_act_name, nearest, read

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge
    from clearspan.hf.recording import Recording

RowIndex = int | slice | list[int] | Tensor
Key = str | tuple[str, int] | tuple[str, int, str]


def _state(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Returns what tells whether weights are still those that they were: their storage, and their count of edits."""
    return [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]


class ActivationCache(CacheMethods, Mapping[str, Tensor]):
    """The activations of one run.

    It keeps the tensors that the forward itself made, by reference, and no others. A look-up converts to canonical axes
    and computes, at that moment, derived values (`hook_scale`, `hook_normalized`, `hook_result`, path inputs) and the
    inside of attention, by the model's own eager function on the run's queries, keys and mask. Entries are detached.
    They share storage with each other where their values do, so clone one before editing it in place: an entry whose
    storage was written since it was kept raises when it is looked up (tensors made under
    `torch.inference_mode` do not count edits, so there it does not).

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> _, cache = bridge.run_with_cache("import os")
        >>> cache["q", 3].shape == cache["blocks.3.attn.hook_q"].shape == cache["q", -2].shape
        True

    Attributes:
        bridge: The model that was run.
        has_batch_dim: Whether entries have a batch axis.
        has_positions: Whether they have an axis of positions.
        is_on_graph: Whether what is computed with weights is on their graph.
    """

    def __init__(
        self,
        bridge: "TransformerBridge",
        points: Mapping[str, HookPoint],
        recording: "Recording",
        *,
        rows: int,
        one_position: bool = False,
        gradients: Mapping[str, Tensor] | None = None,
        weighted: Mapping[str, Derivation] | None = None,
    ) -> None:
        self.bridge = bridge
        self._points = points
        self._find = bridge.index.find
        self._recording = recording
        self._n_layers = bridge.cfg.n_layers
        self._rows = rows
        self.has_positions = not one_position
        self._gradients = dict(gradients or {})
        self._weighted = {name: (one, _state(one.weights())) for name, one in (weighted or {}).items()}
        self.has_batch_dim = True
        self._row_indices: tuple[RowIndex, ...] = ()
        self.is_on_graph = False

    def __getitem__(self, key: Key) -> Tensor:
        """Returns an activation by full name, alias, short name, or `(short name, layer[, component])`.

        Layers may be negative. Gradients have their point's name with `_grad`.

        Raises:
            UnknownPointError: No such point.
            NotCachedError: The point exists, but is not in this cache.
            EditedEntryError: The entry's storage was written since it was kept.
        """
        name = self._full_name(key)
        if name.endswith("_grad"):
            point = self._find(name.removesuffix("_grad"))
            if point.name not in self._gradients:
                raise self._not_cached(f"{point.name}_grad")
            return self._shown(point, self._gradients[point.name])
        point = self._find(name)
        if point.name not in self._points or not self._recording.has(point):
            raise self._not_cached(point.name)
        return self._shown(point, self._value(point))

    def _full_name(self, key: Key) -> str:
        if isinstance(key, str):
            is_full = "." in key or key.startswith("hook_")
            return key if is_full else get_act_name(key.removesuffix("_grad")) + "_grad" * key.endswith("_grad")
        if not (isinstance(key, tuple) and 2 <= len(key) <= 3 and isinstance(key[1], int)):
            raise InvalidArgumentError(
                f"cannot look up {key!r}", expected="a name, or (short name, layer[, component]), such as ('q', 3)"
            )
        short, layer, *component = key
        if not -self._n_layers <= layer < self._n_layers:
            raise InvalidArgumentError(
                f"no layer {layer}", expected=f"-{self._n_layers} to {self._n_layers - 1}", where=f"cache[{key!r}]"
            )
        base = get_act_name(short.removesuffix("_grad"), layer % self._n_layers, *component)
        return base + "_grad" * short.endswith("_grad")

    def _value(self, point: HookPoint) -> Tensor:
        recording = self._recording
        key = point.name if point.name in recording.values else point.place.key
        if recording.was_edited(key):
            raise EditedEntryError(
                f"the cache's entry for {point.name} was written after it was kept",
                reason="entries share storage with each other and with what the forward made",
                fix=f"value = cache[{point.name!r}].clone() before editing in place",
            )
        if point.name in recording.values:
            return recording.values[point.name]
        raw = recording.raw(point.place)
        if isinstance(point.access, Derived):
            self._check_weights(point)
        with torch.set_grad_enabled(self.is_on_graph):
            return read(point.access, raw, self._rows, {})

    def _check_weights(self, point: HookPoint) -> None:
        if point.name in self._weighted:
            derivation, state = self._weighted[point.name]
            if _state(derivation.weights()) != state:
                raise EditedEntryError(
                    f"{point.name} is computed with the model's weights, which were changed since the run",
                    fix="run_with_cache again, or look it up before changing the weights",
                )

    def _shown(self, point: HookPoint, value: Tensor) -> Tensor:
        if not self.has_positions:
            value = value.squeeze(next(i for i, axis in enumerate(point.axes) if axis in ("pos", "q_pos")))
        for index in self._row_indices:
            value = value[index]
        return value

    def _not_cached(self, name: str) -> NotCachedError:
        return NotCachedError(
            f"{name} exists, but is not in this cache",
            got=f"{len(self)} entries",
            nearest=nearest(name, self),
            fix="name it in names_filter" if not name.endswith("_grad") else "run_with_cache(..., incl_bwd=True)",
        )

    def __iter__(self) -> Iterator[str]:
        yield from (name for name, point in self._points.items() if self._recording.has(point))
        yield from (f"{name}_grad" for name in self._gradients)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        try:
            name = self._full_name(key)  # pyright: ignore[reportArgumentType]
            point = self._find(name.removesuffix("_grad"))
        except (KeyError, ValueError, TypeError):
            return False
        if name.endswith("_grad"):
            return point.name in self._gradients
        return point.name in self._points and self._recording.has(point)

    # --- the whole cache ---------------------------------------------------------------------------------------------

    def remove_batch_dim(self) -> "ActivationCache":
        """Has look-ups leave out the batch axis; returns the cache.

        Raises:
            InvalidArgumentError: The run had more than one row.
        """
        if self.has_batch_dim:
            rows = len(self._rows_left())
            if rows != 1:
                raise InvalidArgumentError("cannot leave out the batch axis", expected="one row", got=f"{rows} rows")
            self._row_indices = (*self._row_indices, 0)
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, index: RowIndex) -> "ActivationCache":
        """Returns a cache of some rows: one (its axis goes), a slice, a list, or a tensor of indices. No copy is made.

        Raises:
            InvalidArgumentError: There is no batch axis, or no such row.
        """
        if not self.has_batch_dim:
            raise InvalidArgumentError("cannot pick rows", reason="this cache has no batch axis")
        rows = self._rows_left()
        try:
            rows[index]
        except (IndexError, TypeError) as error:
            raise InvalidArgumentError(
                f"cannot pick rows by {index!r}", expected=f"one of {len(rows)} rows, a slice, or indices"
            ) from error
        new = copy.copy(self)
        new._row_indices = (*self._row_indices, index)
        new.has_batch_dim = not isinstance(index, int)
        return new

    def _rows_left(self) -> Tensor:
        rows = torch.arange(self._rows)
        for index in self._row_indices:
            rows = rows[index]
        return rows

    def rows_and_positions(self, has_batch_dim: bool = True) -> dict[str, int]:
        """Returns the sizes of the axes of rows and positions, as far as entries have them.

        Args:
            has_batch_dim: Whether what they are wanted for has a batch axis.
        """
        sizes = {"batch": len(self._rows_left())} if self.has_batch_dim and has_batch_dim else {}
        if self.has_positions:
            shown = [
                point for name, point in self._points.items() if {"pos", "q_pos"} & set(point.axes) and name in self
            ]
            if shown:
                # What is there goes before what would have to be computed.
                point = min(shown, key=lambda point: (point.place.side.is_inside, isinstance(point.access, Derived)))
                axis = next(i for i, axis in enumerate(point.axes) if axis in ("pos", "q_pos"))
                sizes["pos"] = self[point.name].shape[axis - (0 if self.has_batch_dim else 1)]
        return sizes

    def to(self, device: torch.device | str) -> "ActivationCache":
        """Returns a cache of the same on a device.

        Scores and patterns that were not looked up yet are computed where the model is when they are, and moved.
        """
        new = copy.copy(self)
        new._recording = self._recording.to(device)
        new._gradients = {name: gradient.to(device) for name, gradient in self._gradients.items()}
        return new

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Has what this cache computes with the model's weights be on their graph (True), or off it.

        Entries stay detached from the run. torch's own global mode is not touched.
        """
        self.is_on_graph = mode

    def weights(self, weight: Tensor) -> Tensor:
        """Returns a weight for this cache's computations: on its graph only after `toggle_autodiff(True)`."""
        return weight if self.is_on_graph else weight.detach()

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept, each storage counted once."""
        return self._recording.nbytes() + sum(tensor.nbytes for tensor in self._gradients.values())

    def __repr__(self) -> str:
        return described(self, self._points)
