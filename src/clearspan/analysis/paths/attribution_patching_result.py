"""What attribution patching found: approximate effects, and how they agree with exact ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Patch
from clearspan.plots.charts import bars, heatmap
from clearspan.results import Columns, Result, melted
from clearspan.sweep import Grid, SweepResult, grid

from .agreement import Agreement, compared, sampled
from .patching_pair import PatchingPair

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class AttributionPatching(Result):
    """Approximate effects of patching one part of a model at a time, on the CPU.

    Attributes:
        per_row: Approximate change of the metric, for each row; one row where the metric is one number for all. With
            `grad_drop` a size, without sign.
        axes: The units: names of the axes after `row`, and the places on each.
        base: The metric of the run that is patched, for each row.
        source: The metric of the run that gives values.
        pair: The runs.
        unit: Short name of what is patched.
        qk_fix: Whether changed patterns were computed.
        grad_drop: Whether effects are mean sizes over dropped layers.
        agreement: How some cells compare with exact patching, once `compared_with_exact` has run it.
    """

    per_row: Float[Tensor, "row layer *unit"]
    axes: Mapping[str, tuple[int, ...]]
    base: Float[Tensor, "row"]
    source: Float[Tensor, "row"]
    pair: PatchingPair
    unit: str
    qk_fix: bool
    grad_drop: bool
    agreement: Agreement | None = None

    ranked_by: ClassVar[str | None] = "effect"

    @property
    def scores(self) -> Float[Tensor, "layer *unit"]:
        """Mean over rows."""
        return self.per_row.mean(0)

    @property
    def grid(self) -> Grid:
        """The cells of exact patching that these effects approximate, on the same axes."""
        return grid(self.unit, Patch(self.pair.source_name), **self.axes)

    def compared_with_exact(self, cells: int | None = 64, seed: int = 0) -> Self:
        """Returns the same result with its agreement with exact patching, which is run.

        Args:
            cells: How many cells are run, chosen at random; None for all.
            seed: Of the choice.
        """
        chosen = sampled(self.scores.numel(), cells, seed)
        places = [self._places(number) for number in chosen]
        patch = Patch(self.pair.source_name)
        units = {_label(at): grid(self.unit, patch, **{axis: [at[axis]] for axis in at}).cells[0] for at in places}
        exact = self.pair.swept(Grid.of(units))
        return replace(self, agreement=self._agreement(self.scores.flatten()[chosen], exact, list(units)))

    def compared_with(self, exact: SweepResult) -> Self:
        """Returns the same result with its agreement with a sweep over `grid`.

        Args:
            exact: What `Sweep(bridge, input, found.grid, metric, sources=...).run()` found.

        Raises:
            InvalidArgumentError: The sweep has other axes.
        """
        if dict(exact.axes) != dict(self.axes):
            raise InvalidArgumentError(
                "the sweep is of other cells",
                expected=_described(self.axes),
                got=_described(exact.axes),
                fix="found.grid",
            )
        labels = [_label(self._places(number)) for number in range(self.scores.numel())]
        return replace(self, agreement=self._agreement(self.scores.flatten(), exact, labels))

    def _agreement(self, approximate: Float[Tensor, "cell"], exact: SweepResult, labels: list[str]) -> Agreement:
        change = exact.change().abs() if self.grad_drop else exact.change()
        return Agreement(approximate, change.mean(-1).flatten(), labels, self.scores.numel())

    def _places(self, number: int) -> dict[str, int]:
        """Returns where the unit of a number is on each axis, the last axis running fastest."""
        index = torch.unravel_index(torch.tensor(number), self.scores.shape)
        return {axis: places[int(at)] for (axis, places), at in zip(self.axes.items(), index, strict=True)}

    @property
    def method(self) -> str:
        """What was computed, in words."""
        extras = ["QK fix"] * self.qk_fix + ["GradDrop"] * self.grad_drop
        return "attribution patching" + (f" with {' and '.join(extras)}" if extras else "")

    @property
    def title(self) -> str:
        """What was approximated, and how it agrees with what it approximates."""
        what = "size of the change" if self.grad_drop else "change"
        pair, rows = self.pair, len(self.per_row)
        return (
            f"{self.method}: approximate {what} of {pair.metric_name} with one {', '.join(self.axes)} of {self.unit} "
            f"taken from the {pair.source_name} run; {pair.described(self.base, self.source)}; "
            f"mean over {rows} row{'s' * (rows > 1)}; {compared(self.agreement)}"
        )

    def columns(self) -> Columns:
        """Returns one row for each unit."""
        return melted(self.scores, "effect", **self.axes)

    def plot(self, **at: int) -> "go.Figure":
        """Returns bars for one axis of units, a heat map for two.

        Args:
            **at: Places on further axes, such as `head=3`.

        Raises:
            InvalidArgumentError: There is no such place, or more than two axes are left.
        """
        values, axes = self.scores, dict(self.axes)
        for axis, place in at.items():
            if place not in axes.get(axis, ()):
                raise InvalidArgumentError(f"there is no {axis}={place}", expected=_described(axes))
            values = values.select(list(axes).index(axis), axes.pop(axis).index(place))
        if not 1 <= len(axes) <= 2:
            raise InvalidArgumentError(
                f"a picture has one axis or two, and there are {len(axes)}: {', '.join(axes)}",
                fix=f"plot({', '.join(f'{axis}={places[0]}' for axis, places in list(axes.items())[2:])})",
            )
        names = [list(map(str, places)) for places in axes.values()]
        titles, unit = list(axes), f"approximate change of {self.pair.metric_name}"
        if len(axes) == 1:
            return bars(values.tolist(), names=names[0], value_title=unit, title=self.title)
        return heatmap(
            values, x=names[1], y=names[0], x_title=titles[1], y_title=titles[0], name=unit, title=self.title
        )


def _label(places: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {at}" for axis, at in places.items())


def _described(axes: Mapping[str, tuple[object, ...]]) -> str:
    return ", ".join(
        f"{axis}={list(places)}" if len(places) < 8 else f"{axis}: {len(places)}" for axis, places in axes.items()
    )
