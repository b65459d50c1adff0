"""Source runs: where interventions take values from. Each is a cache, tensors by name, or an input that is run once."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from clearspan._forward.given import prepare
from clearspan._run.caching import run_with_cache
from clearspan.cache import ActivationCache
from clearspan.errors import InvalidArgumentError, argument
from clearspan.inputs import Batch, Input, untold_padding
from clearspan.interventions import Action, Site, SourcePosition, Taken, Written
from clearspan.model import Model
from clearspan.modes import no_grad
from clearspan.shapes import Axes
from clearspan.transfers import numbers_on


@dataclass(frozen=True, eq=False)
class SourceRun:
    """Values of a source run, and the rows that they are of.

    Attributes:
        values: By hook point's name.
        batch: Its rows, or None where only the values tell them.
        logits: What the model returned, where the source was run here.
    """

    values: Mapping[str, Tensor]
    batch: Batch | None = None
    logits: Tensor | None = None


Source = ActivationCache | SourceRun | Mapping[str, Tensor] | Input
"""A cache, values of a batch, tensors by hook point's full name, or an input that is run when it is needed."""
_ALONG_TEXT = ("pos", "q_pos", "k_pos")


def batch_of_source(model: Model, source: Source, like: Batch | None = None) -> Batch | None:
    """Returns the batch of a source that is run, or None for one that was.

    Args:
        model: The model.
        source: The source.
        like: The run that is changed. Bare ids may be padded as it is: where their ids at its padding are its own.

    Raises:
        InvalidArgumentError: Bare ids of a padded input's shape, which do not tell where they are padded.
    """
    if isinstance(source, ActivationCache | SourceRun) or (isinstance(source, Mapping) and _holds_values(source)):
        return None
    batch = model.to_batch(cast("Input", source))
    return batch if like is None else batch.told_by(like)


def _holds_values(source: Mapping[str, Any]) -> bool:
    """Returns whether a mapping is one of tensors by hook point's name, and no tokenizer's output or dataset row."""
    return not {"input_ids", "text", "messages", "inputs_embeds"} & source.keys()


@dataclass(eq=False)
class Sources:
    """Source runs by name, and what actions take from them, which is computed once.

    Args:
        model: The model.
        runs: The runs.
    """

    model: Model
    runs: Mapping[str, SourceRun]
    _prepared: dict[tuple[str, object], tuple[Taken, Batch]] = field(default_factory=dict)
    _checked: dict[Written, Taken] = field(default_factory=dict)

    def of(self, written: Written) -> Taken | None:
        """Returns what a site's action takes from its source run, or None for an action without one.

        Raises:
            InvalidArgumentError: The source has not the rows, or a position, that the run needs.
        """
        action = written.site.action
        if action.run is None:
            return None
        if written not in self._checked:
            self._checked[written] = self._taken(written)
        return self._checked[written]

    def _taken(self, written: Written) -> Taken:
        site, action = written.site, written.site.action
        assert action.run is not None, "the action has a source"
        run, name = self.runs[action.run], action.source_point(site.name, len(self.model.blocks))
        values = run.values[name]
        own = run.batch if run.batch is not None else _unpadded(values, site.axes)
        if not _is_of(values, own, site.axes):
            raise InvalidArgumentError(
                f"the source run {action.run!r} holds a value of another shape than its own input",
                expected=repr(own),
                got=str(list(values.shape)),
                where=name,
            )
        if own.may_hide_padding(written.batch):  # a context of hooks was opened before the input was known
            raise untold_padding()
        is_by_column = (
            own.is_laid_out_as(written.batch) and not written.is_generating and not action.is_constant(site.axes)
        )
        if is_by_column and action.source_position is None and type(action).prepared is Action.prepared:
            return Taken(values, is_by_column=True)
        key = (name, action)
        if key not in self._prepared:
            self._prepared[key] = _prepared(site, values, own)
        taken, batch = self._prepared[key]
        if is_by_column and not own.is_padded and not taken.in_order:
            taken = Taken(taken.values, is_by_column=True)
        _check(written, taken, batch)
        return taken


def _prepared(site: Site, values: Tensor, own: Batch) -> tuple[Taken, Batch]:
    """Returns what an action takes of a source's values, each row's real positions first, and the source's batch."""
    action = site.action
    justified = _justified(values, site.axes, own)
    read = action.source_position
    if read is not None:
        places = numbers_on(values.device, _read_of(read, own, len(values) if len(values) == own.rows else 1))
        rows = torch.arange(len(places)) if len(justified) > 1 else torch.zeros(len(places), dtype=torch.long)
        prepared = action.prepared(justified[rows[:, None], places], site.axes, own.lengths)
        return Taken(prepared, is_constant=places.shape[1] == 1, in_order=True), own
    prepared = action.prepared(justified, site.axes, own.lengths)
    return Taken(prepared, is_constant=action.is_constant(site.axes)), own


def _read_of(read: SourcePosition, own: Batch, rows: int) -> list[list[int]]:
    """Returns the positions of a source that are read, from 0: a list for each of its rows.

    One row may be read at other positions for each row that is written.
    """
    if isinstance(read, tuple) and isinstance(read[0], tuple):
        by_row = cast("tuple[tuple[int, ...], ...]", read)
        if own.rows not in (1, len(by_row)):
            raise InvalidArgumentError(
                "the positions of a source are not one list for each row",
                expected=f"{own.rows} lists",
                got=str(len(by_row)),
            )
    else:
        by_row = [cast("tuple[int, ...]", read) if isinstance(read, tuple) else (cast("int", read),)] * rows
    return [
        [own.position_of(row % own.rows, one, "source position") for one in each] for row, each in enumerate(by_row)
    ]


def _check(written: Written, taken: Taken, own: Batch) -> None:
    """Raises unless the source has the rows and positions that a run takes."""
    site, target = written.site, written.batch
    rows, name = len(taken.values), site.action.run
    fits = rows in (1, target.rows)
    if fits and not taken.is_constant:
        needed = written.needed
        if needed is None:
            raise InvalidArgumentError(
                f"{site.action.kind} takes values for new tokens, which the source run {name!r} does not have",
                where=site.name,
                expected="positions that come to an end: some, a list for each row, or a slice with an end",
                fix="positions=range(...), or Patch(position=...), one position of the source that each step reads",
            )
        if taken.in_order:
            _check_counts([len(row.positions) for row in needed if not row.is_left], taken.values.shape[1])
        else:
            lengths = own.lengths.tolist() if rows == own.rows and rows > 1 else [int(own.lengths.min())] * target.rows
            is_whole = written.rows is None or ("k_pos" in site.axes and site.intervention.key_positions is None)
            fits = all(row.reach <= length for row, length in zip(needed, lengths, strict=True))
            if is_whole and not written.is_generating:
                fits = fits and lengths == target.lengths.tolist()
    if not fits:
        real = target.lengths.tolist()
        size = f"{real[0]} positions" if len(set(real)) == 1 else f"{real} positions"
        raise InvalidArgumentError(
            f"the source run {name!r} does not fit the run that is changed",
            expected=f"{target.rows} rows (or one) of {size}",
            got=f"{rows} rows of {sorted(set(own.lengths.tolist()))} positions",
            where=site.name,
        )


def _check_counts(written: Sequence[int], read: int) -> None:
    """Raises unless as many positions of the source are read as are written in each row."""
    for count in written:
        if count != read:
            raise InvalidArgumentError(
                "a patch reads as many positions as it writes", expected=f"{count} positions", got=str(read)
            )


def _justified(values: Tensor, axes: Axes, batch: Batch) -> Tensor:
    """Returns values with each row's real positions first; what comes after them has no meaning."""
    if batch.mask is None:
        return values
    hidden = (1 - batch.mask).argsort(dim=1, stable=True).to(values.device)
    for at, axis in enumerate(axes):
        if axis in _ALONG_TEXT:
            shape = [len(values) if place == 0 else batch.width if place == at else 1 for place in range(values.ndim)]
            values = values.gather(at, hidden.view(shape).expand_as(values))
    return values


def _unpadded(values: Tensor, axes: Axes) -> Batch:
    """Returns the batch of values that nothing is known of: no padding."""
    width = next(size for axis, size in zip(axes, values.shape, strict=True) if axis in _ALONG_TEXT)
    return Batch(None, embeds=values.new_empty(len(values), width, 0, dtype=torch.float32))


def _is_of(values: Tensor, batch: Batch, axes: Axes) -> bool:
    sizes = dict(zip(axes, values.shape, strict=True)) if len(axes) == values.ndim else {}
    return sizes.get("batch") in (1, batch.rows) and all(
        sizes[axis] == batch.width for axis in _ALONG_TEXT if axis in sizes
    )


def checked_sources(sources: Mapping[str, Source] | None) -> Mapping[str, Source]:
    """Returns sources by name, none for None.

    Raises:
        InvalidArgumentError: They are not by name.
    """
    given = {} if sources is None else sources
    if not isinstance(given, Mapping):
        raise InvalidArgumentError("sources are runs by name", expected="{name: input or cache}", got=repr(given)[:80])
    return given


def points_read(model: Model, sites: Iterable[Site]) -> dict[str, list[str]]:
    """Returns the points whose values sites take from source runs, by the run's name."""
    read: dict[str, dict[str, None]] = {}
    alike = {(site.point.name, id(site.intervention.action)): site for site in sites}
    for site in alike.values():
        run = site.action.run
        if run is not None:
            name = site.action.source_point(site.name, len(model.blocks))
            read.setdefault(run, {})[model.index.find(name).name] = None
    return {run: list(names) for run, names in read.items()}


@no_grad
def gathered(
    model: Model, sites: Iterable[Site], sources: Mapping[str, Source] | None, like: Batch | None = None
) -> Sources:
    """Returns the source runs that sites name, with the values that these need.

    Args:
        model: The model.
        sites: What is written.
        sources: Runs by name.
        like: The run that is changed; see `batch_of_source`.

    Raises:
        InvalidArgumentError: A run is not given.
    """
    given = checked_sources(sources)
    read = points_read(model, sites)
    return Sources(model, {run: _run(model, run, names, given, like) for run, names in read.items()})


def _run(model: Model, run: str, names: list[str], sources: Mapping[str, Source], like: Batch | None) -> SourceRun:
    if run not in sources:
        raise InvalidArgumentError(
            f"an intervention takes values from the run {run!r}, which is not given",
            got=", ".join(map(repr, sources)) or "no sources",
            fix=f"sources={{{run!r}: its tokens, text, or cache}}",
        )
    source = sources[run]
    if isinstance(source, SourceRun):
        return source
    if isinstance(source, ActivationCache):
        cache = source
        return SourceRun({name: _with_rows(cache, name) for name in names}, cache.batch)
    with argument(f"sources, {run!r}"):
        batch = batch_of_source(model, source, like)
    if batch is None:
        tensors = cast("Mapping[str, Tensor]", source)
        lacking = [name for name in names if name not in tensors]
        if lacking:
            raise InvalidArgumentError(
                f"the source {run!r} holds no value of {lacking[0]}",
                got=", ".join(map(str, tensors)) or "nothing",
                expected="tensors by hook point's full name",
            )
        return SourceRun(tensors)
    with model.taps.run(batch):
        logits, cache = run_with_cache(model, prepare(model, batch), names_filter=names)
    assert isinstance(logits, Tensor), "a run for logits returns them"
    return SourceRun({name: cache[name] for name in names}, batch, logits)


def _with_rows(cache: ActivationCache, name: str) -> Tensor:
    return cache[name] if cache.has_batch_dim else cache[name][None]
