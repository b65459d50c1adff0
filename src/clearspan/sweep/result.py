"""What a sweep found: each metric of every cell, with means, errors and effects."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from torch import Tensor

from clearspan.errors import InvalidArgumentError
from clearspan.plots.charts import bars, heatmap
from clearspan.points import nearest
from clearspan.results import Columns, Result, melted
from clearspan.statistics import Interval, bootstrap_interval, standard_error
from clearspan.sweep.grid import Label

if TYPE_CHECKING:
    import plotly.graph_objects as go

Axes = Mapping[str, tuple[Label, ...]]


@dataclass(frozen=True, eq=False, repr=False)
class SweepResult(Result):
    """Metrics by cell and row, on the CPU. A metric that is one number for all rows has one row.

    Attributes:
        values: By the metric's name, its values; NaN in cells that were not run.
        base: By the metric's name, its values in the run that is changed.
        sources: By the source run's name and the metric's, its values there, where the run was given as an input.
        axes: Names of the cells' axes, with the labels on each.
    """

    values: Mapping[str, Float[Tensor, "*cell row"]]
    base: Mapping[str, Float[Tensor, "row"]]
    sources: Mapping[str, Mapping[str, Float[Tensor, "row"]]]
    axes: Axes

    ranked_by: ClassVar[str | None] = "change"

    def of(self, metric: str | None = None) -> Float[Tensor, "*cell row"]:
        """Returns a metric's values by cell and row; by default the first metric's."""
        return self.values[self._named(metric)]

    def mean(self, metric: str | None = None) -> Float[Tensor, "*cell"]:
        """Returns the mean over rows."""
        return self.of(metric).mean(-1)

    def change(self, metric: str | None = None) -> Float[Tensor, "*cell row"]:
        """Returns by how much a metric is more than in the run that is changed, row by row."""
        return self.of(metric) - self.base[self._named(metric)]

    def normalised(self, source: str = "clean", metric: str | None = None) -> Float[Tensor, "*cell"]:
        """Returns the share of the way from the run that is changed (0) to a source run (1).

        `(value - base) / (source - base)`, each a mean over rows.

        Raises:
            InvalidArgumentError: The source's metric is not known, since it was given as a cache.
        """
        name = self._named(metric)
        if name not in self.sources.get(source, {}):
            raise InvalidArgumentError(
                f"the metric of the source run {source!r} is not known",
                got=", ".join(map(repr, self.sources)) or "no source that was run",
                fix=f"sources={{{source!r}: its tokens or text}}, and not a cache",
            )
        low, high = self.base[name].mean(), self.sources[source][name].mean()
        return (self.mean(name) - low) / (high - low)

    def standard_error(self, metric: str | None = None) -> Float[Tensor, "*cell"]:
        """Returns the standard error of the mean change over rows."""
        return standard_error(self.change(metric).movedim(-1, 0)).float()

    def interval(self, metric: str | None = None, *, level: float = 0.95, seed: int = 0) -> Interval:
        """Returns a bootstrap interval of the mean change over rows, for each cell."""
        return bootstrap_interval(self.change(metric).movedim(-1, 0), level=level, seed=seed)

    @property
    def title(self) -> str:
        """What was measured, and on how much."""
        first = next(iter(self.values))
        rows = self.values[first].shape[-1]
        return (
            f"{' and '.join(self.values)} with one cell of {', '.join(self.axes)} changed; "
            f"{self.base[first].mean():z.4f} without; mean over {rows} row{'s' * (rows > 1)}"
        )

    def columns(self) -> Columns:
        """Returns one row for each cell: its labels, each metric, and the change of the first."""
        columns: dict[str, list[object]] = {}
        for name in self.values:
            columns |= melted(self.mean(name), name, **self.axes)
        return {**columns, "change": self.change().mean(-1).flatten().tolist()}

    def plot(self, metric: str | None = None, **at: Label) -> "go.Figure":
        """Returns the change of a metric as bars for one axis of cells, as a heat map for two.

        Args:
            metric: Which; by default the first.
            **at: Labels of further axes, such as `head=3`.

        Raises:
            InvalidArgumentError: More than two axes are left.
        """
        name = self._named(metric)
        values, axes = self._chosen(self.change(name).mean(-1), at)
        names = [[str(label) for label in labels] for labels in axes.values()]
        unit, titles = f"change of {name}", list(axes)
        if len(axes) == 1:
            return bars(values.tolist(), names=names[0], value_title=unit, title=self.title)
        return heatmap(
            values, x=names[1], y=names[0], x_title=titles[1], y_title=titles[0], name=unit, title=self.title
        )

    def _chosen(self, values: Tensor, at: Mapping[str, Label]) -> tuple[Tensor, Axes]:
        axes = dict(self.axes)
        for axis, label in at.items():
            if axis not in axes or label not in axes[axis]:
                raise InvalidArgumentError(
                    f"there is no {axis}={label!r}", expected=", ".join(axes), nearest=nearest(axis, axes)
                )
            values = values.select(list(axes).index(axis), axes.pop(axis).index(label))
        if not 1 <= len(axes) <= 2:
            raise InvalidArgumentError(
                f"a picture has one axis or two, and there are {len(axes)}: {', '.join(axes)}",
                fix=f"plot({', '.join(f'{axis}={labels[0]!r}' for axis, labels in list(axes.items())[2:])})",
            )
        return values, axes

    def _named(self, metric: str | None) -> str:
        name = next(iter(self.values)) if metric is None else metric
        if name not in self.values:
            raise InvalidArgumentError(
                f"no metric is named {metric!r}",
                expected=", ".join(self.values),
                nearest=nearest(str(metric), self.values),
            )
        return name
