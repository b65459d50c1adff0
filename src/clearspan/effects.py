"""Effects: numbers on named axes, row by row, compared with a base. The result of every finding that is such a grid."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.checks import check_choice, check_counts, check_fields, check_kind, path_of
from clearspan.errors import InvalidArgumentError
from clearspan.files import write_text
from clearspan.plots import Chart, chart_of, shaded_tables
from clearspan.points import nearest
from clearspan.results import Columns, Result, counted, number, size
from clearspan.statistics import Interval, bootstrap_interval, standard_error

if TYPE_CHECKING:
    import plotly.graph_objects as go

Label = int | float | str | tuple[int | float | str, ...]
"""A place on an axis. Several at once are a tuple."""
ByMetric = Mapping[str, Float[Tensor, "row"]]
Draws = Literal["change", "value", "share"]

_SHORT = {"layer": "L", "head": "H", "neuron": "N"}


@dataclass(frozen=True, eq=False, repr=False)
class Effects(Result):
    """Metrics at every place of a grid and for every row, on the CPU, and the same metrics in a base run.

    A row that lacks a place, such as a position past its end, is NaN there. Means, errors and shares leave it out.

    Attributes:
        values: By the metric's name. A metric that is one number for all rows has one row.
        axes: The places on each axis, by the axis' name, in the order of the values' axes.
        base: By the metric's name, its values in the run that is compared with. A metric without a base is a change, or
            a score of its own.
        sources: By a source run's name and the metric's, its values there.
        texts: By the name of an axis, a text for each place, where the place itself does not say enough.
        what: What was done at each place, in words; for the title.
        units: By the metric's name, its unit.
        span: The least and the greatest value that is possible, such as (0, 1). Colours and axes end there.
        row: What a row is.

    Example:
        >>> scores = torch.tensor([[[0.25, 0.75]], [[0.0, 0.0]]])
        >>> found = Effects({"score": scores}, {"layer": (3, 4), "head": (0,)}, what="each head")
        >>> found.mean()
        tensor([[0.5000],
                [0.0000]])
        >>> print(found)
        score of each head; mean over 2 rows
        layer  head   score  standard error
            3     0  0.5000          0.2500
            4     0  0.0000          0.0000
    """

    values: Mapping[str, Float[Tensor, "*place row"]]
    axes: Mapping[str, tuple[Label, ...]]
    base: ByMetric = field(default_factory=dict)
    sources: Mapping[str, ByMetric] = field(default_factory=dict)
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    what: str = ""
    units: Mapping[str, str] = field(default_factory=dict)
    span: tuple[float, float] | None = None
    row: str = "row"

    draws: ClassVar[Draws] = "change"
    """What pictures show and tables are ranked by: the change from the base, the value itself, or `normalised()`."""

    def __post_init__(self) -> None:
        mappings = ("values", "axes", "base", "sources", "texts", "units")
        check_kind(Mapping, **{name: getattr(self, name) for name in mappings})
        check_kind(str, what=self.what, row=self.row)
        check_kind(Sequence, **{f"axes[{axis!r}]": places for axis, places in self.axes.items()})
        sizes = {axis: len(places) for axis, places in self.axes.items()}
        shape = tuple(sizes.values())
        for name, values in self.values.items():
            check_kind(Tensor, **{f"values[{name!r}]": values})
            if values.shape[:-1] != shape or values.ndim != len(shape) + 1:
                raise InvalidArgumentError(
                    f"the values of {name!r} do not fill the axes",
                    expected=f"[{', '.join(f'{axis}={count}' for axis, count in sizes.items())}, row]",
                    got=str(list(values.shape)),
                )

    # --- numbers -----------------------------------------------------------------------------------------------------

    def of(self, metric: str | None = None) -> Float[Tensor, "*place row"]:
        """Returns a metric's values by place and row; by default the first metric's."""
        return self.values[self._named(metric)]

    def mean(self, metric: str | None = None) -> Float[Tensor, "*place"]:
        """Returns the mean over the rows that have the place."""
        return self.of(metric).nanmean(-1)

    def change(self, metric: str | None = None) -> Float[Tensor, "*place row"]:
        """Returns each value less the base's, row by row; the value itself where the metric has no base."""
        name = self._named(metric)
        return self.values[name] - self.base[name] if name in self.base else self.values[name]

    def normalised(self, source: str | None = None, metric: str | None = None) -> Float[Tensor, "*place"]:
        """Returns the share of the way from the base run (0) to a source run (1).

        `(value - base) / (source - base)`, each a mean over the same rows: those that have the place.

        Args:
            source: The run's name; by default `clean`, or the only source.
            metric: Which; by default the first.

        Raises:
            InvalidArgumentError: There is no base, or the source's metric is not known, since it was given as a cache.
        """
        name, known = self._named(metric), list(self.sources)
        source = (known[0] if len(known) == 1 else "clean") if source is None else source
        check_kind(str, source=source)
        if name not in self.base or name not in self.sources.get(source, {}):
            raise InvalidArgumentError(
                f"the metric of the source run {source!r} is not known",
                got=", ".join(map(repr, known)) or "no source that was run",
                fix=f"sources={{{source!r}: its tokens or text}}, and not a cache",
            )
        is_missing = self.values[name].isnan()
        low, high = (
            one.expand(is_missing.shape).masked_fill(is_missing, torch.nan).nanmean(-1)
            for one in (self.base[name], self.sources[source][name])
        )
        return (self.mean(name) - low) / (high - low)

    def standard_error(self, metric: str | None = None, draws: Draws | None = None) -> Float[Tensor, "*place"]:
        """Returns the standard error of the mean over rows; NaN where fewer than two rows have the place.

        Args:
            metric: Which; by default the first.
            draws: Whether of the `"change"` or of the `"value"`; by default the change, unless the result is of values.
        """
        return standard_error(self._rows(metric, draws).movedim(-1, 0)).float()

    def interval(self, metric: str | None = None, *, level: float = 0.95, seed: int = 0) -> Interval:
        """Returns a bootstrap interval of the same mean, for each place."""
        return bootstrap_interval(self._rows(metric, None).movedim(-1, 0), level=level, seed=seed)

    def _rows(self, metric: str | None, draws: Draws | None) -> Float[Tensor, "*place row"]:
        return self.of(metric) if self._draws(metric, draws) == "value" else self.change(metric)

    # --- places ------------------------------------------------------------------------------------------------------

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """A text for each place, by axis: `3 import` for a position whose token is known, otherwise the place."""
        return {axis: self.texts.get(axis) or tuple(map(_written, places)) for axis, places in self.axes.items()}

    def select(self, **at: Label | Sequence[Label]) -> Self:
        """Returns the values at some places.

        Args:
            **at: By axis: one place, which leaves the axis out, or a list or range of places, which keeps it.

        Raises:
            InvalidArgumentError: There is no such axis or place.

        Example:
            >>> found = Effects({"score": torch.arange(6.0).reshape(2, 3, 1)}, {"layer": (0, 1), "head": (0, 1, 2)})
            >>> found.select(layer=1, head=[0, 2]).mean()
            tensor([3., 5.])
        """
        found = self
        for axis, wanted in at.items():
            found = found._at(axis, wanted)
        return found

    def _at(self, axis: str, wanted: Label | Sequence[Label]) -> Self:
        if isinstance(wanted, Tensor | np.ndarray):
            wanted = wanted.tolist()
        keeps_axis, places = isinstance(wanted, list | range), self.axes.get(axis, ())
        chosen = list(wanted) if isinstance(wanted, list | range) else [cast("Label", wanted)]
        for place in chosen:
            if place not in places:
                raise InvalidArgumentError(
                    f"there is no {axis}={place!r}",
                    expected=", ".join(f"{name}={_few(own)}" for name, own in self.axes.items()),
                    nearest=nearest(axis, self.axes) if axis not in self.axes else (),
                )
        numbers = [places.index(place) for place in chosen]
        index = (*[slice(None)] * list(self.axes).index(axis), numbers if keeps_axis else numbers[0])
        values = {name: one[index] for name, one in self.values.items()}
        kept = {name: own for name, own in self.texts.items() if name != axis}
        if not keeps_axis:
            axes = {name: own for name, own in self.axes.items() if name != axis}
            what = f"{self._what}, {axis} {self.labels[axis][numbers[0]]}"
            return replace(self, values=values, axes=axes, texts=kept, what=what)
        texts = {axis: tuple(self.texts[axis][number] for number in numbers)} if axis in self.texts else {}
        return replace(self, values=values, axes={**self.axes, axis: tuple(chosen)}, texts=kept | texts)

    def top(self, k: int = 10, metric: str | None = None) -> Self:
        """Returns the places with the largest effects on one axis, largest first.

        Effects are the mean changes, by their size; for scores between the ends of a span, the scores themselves. The
        axis has the names of all axes, such as `layer, head`, and its places are tuples of theirs.

        Args:
            k: How many, at most.
            metric: By which; by default the first.

        Example:
            >>> scores = torch.tensor([[0.1, -0.9], [0.4, 0.2]])[..., None]
            >>> found = Effects({"score": scores}, {"layer": (0, 1), "head": (0, 1)}).top(2)
            >>> found.axes, found.labels["layer, head"]
            ({'layer, head': ((0, 1), (1, 0))}, ('L0H1', 'L1H0'))
        """
        check_counts(0, k=k)
        effects = self._drawn(metric, None).flatten().tolist()
        known = (number for number, effect in enumerate(effects) if effect == effect)
        chosen = sorted(known, key=lambda number: -self._order(effects[number]))[:k]
        values = {name: found.flatten(0, -2)[chosen] for name, found in self.values.items()}
        places, labels = list(itertools.product(*self.axes.values())), list(itertools.product(*self.labels.values()))
        axis, at = ", ".join(self.axes), tuple(places[number] for number in chosen)
        texts = {axis: tuple(_joined(self.axes, labels[number]) for number in chosen)}
        if len(self.axes) == 1:
            at = tuple(place for (place,) in at)
            texts = {axis: tuple(labels[number][0] for number in chosen)} if axis in self.texts else {}
        return replace(self, values=values, axes={axis: at}, texts=texts, what=self._what)

    # --- as a result -------------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """What was measured with what done, without it, and over how many rows."""
        first = self._named(None)
        measured = " and ".join(f"{name} in {self.units[name]}" if name in self.units else name for name in self.values)
        without = [number(self.base[name].nanmean().item()) for name in self.values if name in self.base]
        rows = self.values[first].shape[-1]
        return "; ".join(
            [
                f"{measured} {'with' if without else 'of'} {self._what}",
                *([f"{' and '.join(without)} without"] if without else []),
                *([f"mean over {counted(rows, self.row)}"] if rows > 1 else []),
            ]
        )

    @property
    def _what(self) -> str:
        axes = ", ".join(self.axes)
        return self.what or (f"one cell of {axes} changed" if self.base else f"each {axes}")

    def numbers(self) -> dict[str, Float[Tensor, "*place"]]:
        """Returns the table's columns of numbers: each metric's mean, the first one's change and standard error."""
        first = self._named(None)
        found = {name: self.mean(name) for name in self.values}
        if first in self.base:
            found["change"] = self.change().nanmean(-1)
        if self.draws == "share":
            found["share"] = self.normalised()
        if self.values[first].shape[-1] > 1:
            found["standard error"] = self.standard_error()
        return found

    def columns(self) -> Columns:
        """Returns one row for each place that any row has: the place, and `numbers()`."""
        numbers = self.numbers()
        is_known = ~torch.stack([numbers[name] for name in self.values]).isnan().all(0)
        columns: dict[str, Sequence[Any]] = {}
        for axis, at in zip(self.axes, is_known.nonzero().T.tolist(), strict=True):
            own, names = [self.axes[axis][number] for number in at], axis.split(", ")
            several = zip(*own, strict=True) if len(names) > 1 else [own]  # pyright: ignore[reportArgumentType]
            columns |= dict(zip(names, several, strict=False))
            if axis in self.texts:
                columns[f"{axis} text"] = [self.texts[axis][number] for number in at]
        return columns | {name: one[is_known].tolist() for name, one in numbers.items()}

    def printed(self) -> Columns:
        """Returns the table with the texts of places instead of the places."""
        columns = self.columns()
        hidden = {name for axis in self.texts for name in axis.split(", ")}
        return {name.removesuffix(" text"): column for name, column in columns.items() if name not in hidden}

    @property
    def rank(self) -> str | None:
        """The column by which the printed rows are sorted."""
        drawn = self._draws(None)
        return self._named(None) if drawn == "value" else drawn

    def _order(self, value: float) -> float:
        is_score = self.span is not None and self._draws(None) == "value"
        return math.copysign(size(value), value) if is_score else size(value)

    def plot(
        self, metric: str | None = None, *, draws: Draws | None = None, **at: Label | Sequence[Label]
    ) -> "go.Figure":
        """Returns bars or lines for one axis of places, a heat map or several lines for two.

        Args:
            metric: Which; by default the first.
            draws: The `"change"` from the base, the `"value"`, or the `"share"` of the way to a source.
            **at: Places on further axes, such as `head=3`; see `select`.

        Raises:
            InvalidArgumentError: More than two axes are left, or there is no such place.
        """
        return self.chart(metric, draws=draws, **at).figure()

    def chart(self, metric: str | None = None, *, draws: Draws | None = None, **at: Label | Sequence[Label]) -> Chart:
        """Returns the picture as data. Arguments are those of `plot`."""
        if at:
            return self.select(**at).chart(metric, draws=draws)
        if not 1 <= len(self.axes) <= 2:
            more = list(self.axes.items())[2:]
            raise InvalidArgumentError(
                f"a picture has one axis or two, and there are {len(self.axes)}: {', '.join(self.axes)}",
                fix=f"plot({', '.join(f'{axis}={places[0]!r}' for axis, places in more)})",
            )
        name, drawn = self._named(metric), self._draws(metric, draws)
        has_errors = drawn != "share" and self.values[name].shape[-1] > 1
        return chart_of(
            self._drawn(name, drawn),
            self.axes,
            self.labels,
            unit=self._unit(name, drawn),
            title=self.title,
            errors=self.standard_error(name, drawn) if has_errors else None,
            base=self.base[name].nanmean().item() if drawn == "value" and name in self.base else None,
            span=self.span if drawn == "value" else None,
        )

    def _stills(self) -> Iterator[Chart]:
        """Yields its chart; of more than two axes the first two, each cell the largest over all others."""
        if 1 <= len(self.axes) <= 2:
            yield self.chart()
        elif self.axes:
            (first, second, *others), name = self.axes, self._named(None)
            values = self._drawn(None, None).flatten(2)
            largest = values.gather(2, values.abs().nan_to_num(-1).argmax(2, keepdim=True))[..., 0]
            axes, unit = {axis: self.axes[axis] for axis in (first, second)}, self._unit(name, None)
            span = self.span if self._draws(None) == "value" else None
            unit = f"{unit}: the largest over {', '.join(others)}"
            yield chart_of(largest, axes, self.labels, unit=unit, span=span, kind="heat map")

    def to_html(self, metric: str | None = None, *, draws: Draws | None = None) -> str:
        """Returns a table in HTML that stands alone, each cell in the colour of its value.

        Args:
            metric: Which; by default the first.
            draws: As in `plot`.
        """
        name, drawn = self._named(metric), self._draws(metric, draws)
        caption, span = f"{self.title}: {self._unit(name, drawn)}", self.span if drawn == "value" else None
        return shaded_tables(self._drawn(name, drawn), self.labels, caption=caption, span=span)

    def _draws(self, metric: str | None, draws: Draws | None = None) -> Draws:
        asked = self.draws if draws is None else draws
        check_choice(get_args(Draws), draws=asked)
        return "value" if asked == "change" and self._named(metric) not in self.base else asked

    def _drawn(self, metric: str | None, draws: Draws | None) -> Float[Tensor, "*place"]:
        is_share = self._draws(metric, draws) == "share"
        return self.normalised(metric=metric) if is_share else self._rows(metric, draws).nanmean(-1)

    def _unit(self, metric: str | None, draws: Draws | None) -> str:
        name = self._named(metric)
        unit = f"{name}, {self.units[name]}" if name in self.units else name
        share = f"{name}: share of the way from the base run"
        return {"change": f"change of {unit}", "value": unit, "share": share}[self._draws(metric, draws)]

    # --- files -------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Returns the effects as plain data, without what a subclass adds; None for NaN."""
        plain = {name: getattr(self, name) for name in ("what", "units", "span", "row")}
        axes = {axis: {"places": list(places), "texts": self.labels[axis]} for axis, places in self.axes.items()}
        sources = {source: _plain(found) for source, found in self.sources.items()}
        return plain | {"axes": axes, "values": _plain(self.values), "base": _plain(self.base), "sources": sources}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Effects":
        """Returns the effects of their JSON form.

        Example:
            >>> found = Effects({"score": torch.tensor([[1.0, torch.nan]])}, {"layer": (3,)})
            >>> Effects.from_json(json.loads(json.dumps(found.to_json()))).of()
            tensor([[1., nan]])
        """
        check_fields("effects", data, "axes", "values", "base", "sources", "what", "units", "span", "row")
        axes = {axis: tuple(map(_hashable, one["places"])) for axis, one in data["axes"].items()}
        texts = {axis: tuple(one["texts"]) for axis, one in data["axes"].items()}
        texts = {axis: own for axis, own in texts.items() if own != tuple(map(_written, axes[axis]))}
        sources = {source: _tensors(found) for source, found in data["sources"].items()}
        span = data["span"] and tuple(data["span"])
        values, base = _tensors(data["values"]), _tensors(data["base"])
        return Effects(values, axes, base, sources, texts, data["what"], data["units"], span, data["row"])

    def save(self, path: str | Path) -> None:
        """Writes `to_json()` to a file."""
        write_text(path, json.dumps(self.to_json()))

    @classmethod
    def load(cls, path: str | Path) -> "Effects":
        """Returns the effects of a file that `save` wrote."""
        return cls.from_json(json.loads(path_of(path).read_text()))

    def _named(self, metric: str | None) -> str:
        name = next(iter(self.values)) if metric is None else metric
        if not isinstance(name, str) or name not in self.values:
            raise InvalidArgumentError(
                f"no metric is named {metric!r}",
                expected=", ".join(self.values),
                nearest=nearest(str(metric), self.values),
            )
        return name


def _written(place: Label) -> str:
    """Returns a place as text: `3`, `0.5`, `1, 2`."""
    match place:
        case tuple():
            return ", ".join(map(_written, place))
        case float():
            return f"{place:g}"
        case _:
            return str(place)


def _few(places: tuple[Label, ...]) -> str:
    return str(list(places)) if len(places) < 8 else f"{places[0]!r}…{places[-1]!r}"


def _joined(axes: Mapping[str, object], labels: Sequence[str]) -> str:
    """Returns one text for a place on several axes: `L3H2`, `L3 5 ·name`."""
    parts = [_SHORT.get(axis, " ") + label for axis, label in zip(axes, labels, strict=True)]
    return "".join(parts).strip()


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns tensors as nested lists, with None for NaN."""

    def known(one: Any) -> Any:
        return [known(each) for each in one] if isinstance(one, list) else None if one != one else one

    return {
        name: {"dtype": str(one.dtype).removeprefix("torch."), "numbers": known(one.tolist())}
        for name, one in tensors.items()
    }


def _tensors(plain: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inverse of `_plain`."""

    def number(one: Any) -> Any:
        return [number(each) for each in one] if isinstance(one, list) else math.nan if one is None else one

    dtypes = {name: getattr(torch, one["dtype"]) for name, one in plain.items()}
    return {name: torch.tensor(number(one["numbers"]), dtype=dtypes[name]) for name, one in plain.items()}


def _hashable(place: Any) -> Label:
    return tuple(place) if isinstance(place, list) else place
