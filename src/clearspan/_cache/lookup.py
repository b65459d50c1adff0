"""Looking up what a cache keeps: under every name, in canonical axes, at the rows and positions chosen."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from clearspan._cache.run_weights import RunWeights
from clearspan._cache.slices import BatchSlice, PosSlice, check_columns, picked, plain, position_index
from clearspan.checks import check_flags, check_kind, whole
from clearspan.components import GeneralizedComponent
from clearspan.errors import EditedEntryError, InvalidArgumentError, NotCachedError
from clearspan.hf.adapters import Adapted, sources
from clearspan.hf.recording import Recording
from clearspan.inputs import Batch
from clearspan.model import Model, check_bridge
from clearspan.modes import with_autocast, with_gradients
from clearspan.points import Derived, HookPoint, get_act_name, nearest, read
from clearspan.points.names import check_name
from clearspan.tree import module_at

Key = str | tuple[str, int | None] | tuple[str, int | None, str | None]
_POSITIONS = ("pos", "q_pos")


@dataclass(frozen=True)
class Given:
    """A value that was put into a cache, with the axes that the cache showed then.

    Attributes:
        value: The value.
        n_row_choices: How many choices of rows the cache had made by then.
        n_pos_choices: How many of positions.
    """

    value: Tensor
    n_row_choices: int
    n_pos_choices: int


class CacheLookup(MutableMapping[str, Tensor]):
    """A mapping from names to the values of one run, at all of its rows and positions or at some.

    Args:
        cache_dict: Values in canonical axes, by the names of their hook points; kept by reference.
        model: The model that they are of.
        has_batch_dim: Whether they have a batch axis.

    Raises:
        UnknownPointError: The model has no hook point of a name.
        InvalidArgumentError: A value has other axes than its point, or another number of rows or positions than others.

    Attributes:
        model: The model that was run.
        has_batch_dim: Whether entries have a batch axis.
        has_positions: Whether they have an axis of positions.
        batch: The run's rows, with the mask of what is padded.
        is_on_graph: Whether what is computed with weights is on their graph.
    """

    def __init__(self, cache_dict: Mapping[str, Tensor], model: Model, has_batch_dim: bool = True) -> None:
        check_flags(has_batch_dim=has_batch_dim)
        check_kind(Mapping, cache_dict=cache_dict)
        check_bridge(model)
        sizes, has_positions = _sizes_of(cache_dict, model, has_batch_dim)
        rows, width = sizes.get("batch", 1), sizes.get("pos", 1)
        self._start(model, {}, Recording(rows), Batch(None, embeds=torch.empty(rows, width, 0)))
        self._row_choices = () if has_batch_dim else (0,)
        self._pos_choices = () if has_positions else (0,)
        self.has_batch_dim, self.has_positions = has_batch_dim, has_positions
        self.update(cache_dict)

    @classmethod
    def of_run(
        cls,
        model: Model,
        points: Mapping[str, HookPoint],
        recording: Recording,
        *,
        batch: Batch,
        gradients: Mapping[str, Tensor] | None = None,
        run_weights: RunWeights | None = None,
    ) -> Self:
        """Returns the cache of a run.

        Args:
            model: The model that was run.
            points: What is kept, by name.
            recording: What keeps it.
            batch: The run's rows, with the mask of what is padded.
            gradients: Gradients in canonical axes, by their point's name.
            run_weights: What the weights were in the run; by default what they are now.
        """
        cache = object.__new__(cls)
        cache._start(model, points, recording, batch, gradients, run_weights)
        return cache

    def _start(
        self,
        model: Model,
        points: Mapping[str, HookPoint],
        recording: Recording,
        batch: Batch,
        gradients: Mapping[str, Tensor] | None = None,
        run_weights: RunWeights | None = None,
    ) -> None:
        self.model = model
        self.has_batch_dim = True
        self.has_positions = True
        self.is_on_graph = False
        self._points = points
        self._recording = recording
        self._given: dict[str, Given] = {}
        self.batch = batch
        self._rows = batch.rows
        self._column_of_row: Tensor | None = None
        self._gradients = dict(gradients or {})
        self._run_weights = run_weights or RunWeights(model)
        self._row_choices: tuple[BatchSlice, ...] = ()
        self._pos_choices: tuple[PosSlice, ...] = ()

    # --- names -------------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Key) -> Tensor:
        """Returns an activation by full name, alias, short name, or `(short name, layer[, component])`.

        Layers may be negative. Gradients have their point's name with `_grad`.

        Raises:
            UnknownPointError: No such point.
            NotCachedError: The point exists, but is not in this cache.
            EditedEntryError: The entry's storage was written since it was kept, or a weight that it is computed with.
        """
        name = self._full_name(key)
        point, is_gradient = self._point(name), name.endswith("_grad")
        if self._given:
            canonical = point.name + "_grad" * is_gradient
            if canonical in self._given:
                return self._shown(point, self._given[canonical])
        if is_gradient:
            if point.name not in self._gradients:
                raise self._not_cached(f"{point.name}_grad")
            return self._shown(point, self._gradients[point.name])
        if not self._has(point):
            raise self._not_cached(point.name)
        return self._shown(point, self._value(point))

    def _point(self, name: str) -> HookPoint:
        """Returns the point of an entry, which the model may not have any more."""
        base = name.removesuffix("_grad")
        return self._points[base] if base in self._points else self.model.index.find(base)

    def __setitem__(self, key: Key, value: Tensor) -> None:
        """Replaces an entry by a value, or adds one; the tools compute with it.

        Weights that no entry of this cache was computed with until now are to stay as they are from then on.

        Raises:
            UnknownPointError: No such point.
            InvalidArgumentError: The value has other axes, or sizes, than the entry has here.
        """
        name = self._full_name(key)
        point = self.model.index.find(name.removesuffix("_grad"))
        check_kind(Tensor, value=value)
        self._check_axes(point, value)
        given = Given(value, len(self._row_choices), len(self._pos_choices))
        self._run_weights.note_others()
        self._given = {**self._given, point.name + "_grad" * name.endswith("_grad"): given}

    def __delitem__(self, key: Key) -> None:
        """Takes an entry out; a tensor that no other entry shows is freed.

        Raises:
            UnknownPointError: No such point.
            NotCachedError: It is not in this cache.
        """
        if key not in self:
            raise self._not_cached(self._full_name(key))
        name = self._full_name(key)
        point = self._point(name)
        canonical = point.name + "_grad" * name.endswith("_grad")
        self._given = {other: given for other, given in self._given.items() if other != canonical}
        if name.endswith("_grad"):
            self._gradients = {other: kept for other, kept in self._gradients.items() if other != point.name}
            return
        self._points = {other: kept for other, kept in self._points.items() if other != point.name}
        self._recording = self._recording.of_points(self._points.values())

    def is_given(self, name: str) -> bool:
        """Whether an entry is a value that was put into the cache."""
        return name in self._given

    def _check_axes(self, point: HookPoint, value: Tensor) -> None:
        """Raises unless a value has the axes that a point's entry has here, of their sizes as far as they are known."""
        sizes = {**point.sizes, "batch": self.n_rows, "1": 1}
        if self._given or len(self):
            sizes |= dict.fromkeys(_POSITIONS, self.n_positions)
        axes = self._axes_left(point)
        fits = [own == sizes.get(axis, own) for axis, own in zip(axes, value.shape, strict=False)]
        if len(axes) != value.ndim or not all(fits):
            shown = ", ".join(f"{axis} {sizes[axis]}" if axis in sizes else axis for axis in axes)
            raise InvalidArgumentError(
                f"a value for {point.name} has other axes in this cache",
                expected=f"[{shown}]",
                got=str(list(value.shape)),
            )

    def _axes_left(self, point: HookPoint) -> list[str]:
        """Returns the axes that a point's entry has here."""
        left_out = () if self.has_batch_dim else ("batch",)
        left_out = left_out if self.has_positions else (*left_out, *_POSITIONS)
        return [axis for axis in point.axes if axis not in left_out]

    def _full_name(self, key: Key) -> str:
        if isinstance(key, str):
            is_full = "." in key or key.startswith("hook_")
            return key if is_full else get_act_name(key.removesuffix("_grad")) + "_grad" * key.endswith("_grad")
        is_key = isinstance(key, tuple) and 2 <= len(key) <= 3
        if is_key and key[1] is None:
            check_name(key[0])
            base = get_act_name(key[0].removesuffix("_grad"), None, *key[2:])
            return base + "_grad" * key[0].endswith("_grad")
        layer = whole(key[1]) if is_key else None
        if layer is None:
            raise InvalidArgumentError(
                f"cannot look up {key!r}", expected="a name, or (short name, layer[, component]), such as ('q', 3)"
            )
        short, _, *component = key
        n_layers = len(self.model.blocks)
        if not -n_layers <= layer < n_layers:
            raise InvalidArgumentError(
                f"no layer {layer}", expected=f"-{n_layers} to {n_layers - 1}", where=f"cache[{key!r}]"
            )
        check_name(short)
        base = get_act_name(short.removesuffix("_grad"), layer % n_layers, *component)
        return base + "_grad" * short.endswith("_grad")

    def _has(self, point: HookPoint) -> bool:
        return point.name in self._given or (point.name in self._points and self._recording.has(point))

    def _not_cached(self, name: str) -> NotCachedError:
        return NotCachedError(
            f"{name} exists, but is not in this cache",
            got=f"{len(self)} entries",
            nearest=nearest(name, self),
            fix="name it in names_filter" if not name.endswith("_grad") else "run_with_cache(..., incl_bwd=True)",
        )

    def __iter__(self) -> Iterator[str]:
        kept = [name for name, point in self._points.items() if name in self._given or self._recording.has(point)]
        kept += [f"{name}_grad" for name in self._gradients]
        yield from dict.fromkeys([*kept, *self._given])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        try:
            name = self._full_name(key)  # pyright: ignore[reportArgumentType]
            point = self._point(name)
        except (KeyError, ValueError, TypeError):
            return False
        if name.endswith("_grad"):
            return point.name in self._gradients or f"{point.name}_grad" in self._given
        return self._has(point)

    def axes_of(self, name: str) -> dict[str, int | None]:
        """Returns an entry's axes with their sizes; None where only a look-up tells."""
        check_name(name)
        point = self._point(name)
        sizes: dict[str, int | None] = {**dict.fromkeys(point.axes), **point.sizes, **self.sizes}
        sizes["q_pos"] = sizes.get("pos")
        if "k_pos" in point.axes:
            given = self._given.get(point.name)
            sizes["k_pos"] = self._recording.n_keys(point) if given is None else given.value.shape[-1]
        return {axis: sizes[axis] for axis in self._axes_left(point)}

    def check_unedited(self) -> None:
        """Raises if an entry's storage was written since it was kept."""
        for name, point in self._points.items():
            if name not in self._given and self._recording.has(point):
                self._check_unedited(point)

    # --- values ------------------------------------------------------------------------------------------------------

    def _value(self, point: HookPoint) -> Tensor:
        self._check_unedited(point)
        recording, access, place = self._recording, point.access, point.place
        value = recording.value(point)
        if value is not None:
            return value
        are_on = self.is_on_graph and torch.is_grad_enabled()
        if not (isinstance(access, Derived) or recording.is_deferred(place)):
            return with_gradients(are_on, read, access, recording.raw(place), self._rows, {})
        made_of = self._weights_of(point)
        if made_of:
            self._run_weights.check(made_of, f"{point.name} is computed with weights that are")

        def found() -> Tensor:
            return with_gradients(are_on, lambda: read(access, recording.raw(place), self._rows, {}))

        return with_autocast(recording.autocast, self.model.device, found)

    def _weights_of(self, point: HookPoint) -> Sequence[Tensor | Adapted]:
        """Returns what the weights are made of with which a point is computed on look-up."""
        if isinstance(point.access, Derived):
            return point.access.derivation.sources()
        return sources(module_at(self.model.hf_model, point.place.module))

    def _check_unedited(self, point: HookPoint) -> None:
        recording = self._recording
        if recording.was_edited(point.name if point.name in recording.values else point.place.key):
            raise EditedEntryError(
                f"the cache's entry for {point.name} was written after it was kept",
                reason="entries share storage with each other and with what the forward made",
                fix=f"value = cache[{point.name!r}].clone() before editing in place",
            )

    def _shown(self, point: HookPoint, value: Tensor | Given) -> Tensor:
        if not (self._row_choices or self._pos_choices) and self._column_of_row is None:
            return value.value if isinstance(value, Given) else value
        rows_chosen = positions_chosen = 0
        picks_positions = bool(self._pos_choices) or self._column_of_row is not None
        axis = _positions_axis(point) if picks_positions else 0
        if isinstance(value, Given):
            value, rows_chosen, positions_chosen = value.value, value.n_row_choices, value.n_pos_choices
            axis -= any(isinstance(rows, int) for rows in self._row_choices[:rows_chosen])
        if self._column_of_row is not None and not positions_chosen:
            shape = [len(value) if place == 0 else 1 for place in range(value.ndim)]
            columns = self._column_of_row.to(value.device).view(shape)
            value = value.gather(axis, columns.expand(*value.shape[:axis], 1, *value.shape[axis + 1 :]))
        for positions in self._pos_choices[positions_chosen:]:
            value = picked(value, positions, axis)
        for rows in self._row_choices[rows_chosen:]:
            value = picked(value, rows, 0, what="row")
        return value

    def weight(self, part: GeneralizedComponent, weight: Tensor) -> Tensor:
        """Returns a weight of a part to compute with: on its graph only after `toggle_autodiff(True)`.

        Raises:
            EditedEntryError: The part's weights are not those of the run.
        """
        self._run_weights.check(sources(part.module), f"the weights of {part.path} are")
        return weight if self.is_on_graph else weight.detach()

    def bias(self, part: GeneralizedComponent) -> Tensor | None:
        """Returns a part's bias as `weight` does, or None where it has none."""
        bias = part.bias_or_none()
        return None if bias is None else self.weight(part, bias)

    @property
    def device(self) -> torch.device | None:
        """Where the first of its tensors is; None where it has none."""
        first = next(itertools.chain(self._recording.tensors(), (given.value for given in self._given.values())), None)
        return None if first is None else first.device

    # --- rows and positions ------------------------------------------------------------------------------------------

    def apply_slice_to_batch_dim(self, batch_slice: BatchSlice) -> Self:
        """Returns a cache of some rows: one (its axis goes), `(start, stop[, step])`, a list, a slice, or indices.

        Nothing is copied until it is looked up.

        Raises:
            InvalidArgumentError: There is no batch axis, or no such row.
        """
        batch_slice = plain(batch_slice)
        if batch_slice is None:
            return self
        if not self.has_batch_dim:
            raise InvalidArgumentError("cannot pick rows", reason="this cache has no batch axis")
        position_index(batch_slice, self.n_rows, what="row")
        new = copy.copy(self)
        new._row_choices = (*self._row_choices, batch_slice)
        new.has_batch_dim = not isinstance(batch_slice, int)
        return new

    def apply_slice_to_pos_dim(self, pos_slice: PosSlice) -> Self:
        """Returns a cache of some positions, said as in `run_with_cache`; for one, without their axis.

        Nothing is copied until it is looked up.

        Raises:
            InvalidArgumentError: There is no axis of positions, or no such position.
        """
        pos_slice = plain(pos_slice)
        if pos_slice is None:
            return self
        if not self.has_positions:
            raise InvalidArgumentError(
                "cannot pick positions", reason="this cache holds one position, without its axis"
            )
        position_index(pos_slice, self.n_positions)
        if self.n_positions == self.batch.width:
            check_columns(pos_slice, self.batch)
        new = copy.copy(self)
        new._pos_choices = (*self._pos_choices, pos_slice)
        new.has_positions = not isinstance(pos_slice, int)
        return new

    def at(self, position: int) -> Self:
        """Returns a cache of one position of each row, without its axis, counted among the row's real tokens.

        Args:
            position: Negative from each row's last real token.

        Raises:
            InvalidArgumentError: A row does not have the position; or the cache shows a part of its rows or positions.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> _, cache = bridge.run_with_cache(["import os", "x = 1, 2"])
            >>> last = cache.at(-1)["resid_post", 3]
            >>> bool(last[0].allclose(bridge.run_with_cache("import os")[1]["resid_post", 3][0, -1], atol=1e-4))
            True
        """
        if self._row_choices or self._pos_choices or self._n_kept() != self.batch.width:
            raise InvalidArgumentError(
                "positions of rows are read from a cache of all rows and positions",
                got=f"{self.n_rows} rows and {self.n_positions} positions of {self.batch!r}",
            )
        new = copy.copy(self)
        columns = [self.batch.column_of(row, position) for row in range(self.batch.rows)]
        new._column_of_row = torch.tensor(columns)
        new._pos_choices = (0,)
        new.has_positions = False
        return new

    @property
    def n_rows(self) -> int:
        """Rows, also where a single one has no axis."""
        return places_left(self._rows, self._row_choices, "row").numel()

    @property
    def n_positions(self) -> int:
        """Positions, also where a single one has no axis.

        Raises:
            NotCachedError: The cache is empty.
        """
        kept = self._n_kept() if self._column_of_row is None else 1
        return places_left(kept, self._pos_choices, "position").numel()

    def _n_kept(self) -> int:
        """Returns how many positions of the run were kept."""
        kept = (point for point in self._points.values() if self._recording.has(point))
        first = next(kept, None)
        if first is None and self._given:
            return self.batch.width
        if first is None:
            raise NotCachedError("an empty cache has no positions", fix="name points in names_filter")
        # Inside attention there may be keys of a KV cache, which are no positions of this run.
        point = next((point for point in itertools.chain([first], kept) if not point.place.side.is_inside), first)
        return self._recording.length(point)

    @property
    def sizes(self) -> dict[str, int]:
        """The axes of rows and positions that entries have, in order, with their sizes."""
        rows = {"batch": self.n_rows} if self.has_batch_dim else {}
        return {**rows, "pos": self.n_positions} if self.has_positions else rows


def _positions_axis(point: HookPoint) -> int:
    return next(axis for axis, name in enumerate(point.axes) if name in _POSITIONS)


def _sizes_of(values: Mapping[str, Tensor], model: Model, has_batch_dim: bool) -> tuple[dict[str, int], bool]:
    """Returns how many rows and positions all values have, and whether they have an axis of positions.

    Raises:
        UnknownPointError: The model has no hook point of a name.
        InvalidArgumentError: A value is none, or has another number of axes, rows or positions than the others.
    """
    found: dict[str, int] = {}
    has_positions: set[bool] = set()
    for name, value in values.items():
        check_name(name)
        point = model.index.find(name.removesuffix("_grad"))
        check_kind(Tensor, **{name: value})
        axes = [axis for axis in point.axes if axis != "batch" or has_batch_dim]
        lacking = len(axes) - value.ndim
        if lacking not in (0, 1):
            raise InvalidArgumentError(
                f"the value of {name} has other axes", expected=f"[{', '.join(axes)}]", got=str(list(value.shape))
            )
        has_positions.add(not lacking)
        axes = [axis for axis in axes if not (lacking and axis in _POSITIONS)]
        for axis, size in zip(axes, value.shape, strict=True):
            axis = "pos" if axis == "q_pos" else axis
            if axis in ("batch", "pos") and found.setdefault(axis, size) != size:
                raise InvalidArgumentError(
                    f"the value of {name} has another size than those before it",
                    expected=f"{axis} {found[axis]}",
                    got=f"{axis} {size}",
                )
    if len(has_positions) > 1:
        raise InvalidArgumentError("some values have an axis of positions, and others do not")
    return found, False not in has_positions


def places_left(length: int, choices: Iterable[PosSlice], what: str) -> Tensor:
    """Returns the places of an axis that are left after choices; for a single one without its axis, `[]`."""
    places = torch.arange(length)
    for choice in choices:
        places = picked(places, choice, 0, what=what)
    return places
