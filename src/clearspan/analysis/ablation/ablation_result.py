"""What ablating one unit at a time changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from torch import Tensor

from clearspan.plots.charts import bars, heatmap
from clearspan.results import Columns, Result, melted

from .replacements import AblationMethod

if TYPE_CHECKING:
    import plotly.graph_objects as go

_MEANING: Mapping[AblationMethod, str] = {
    "zero": "set to zero",
    "mean": "replaced by its mean",
    "resample": "taken from another row",
}


@dataclass(frozen=True, eq=False, repr=False)
class Ablation(Result):
    """What a metric changes by when one unit at a time is ablated, on the CPU.

    Attributes:
        per_row: Metric with the unit ablated, minus the metric of the clean run, for each row; one row where the metric
            is one number for the whole batch. Positive: the metric rises without the unit.
        clean: The metric of the clean run, for each row.
        axes: The units: names of the axes after `row`, and the places on each.
        method: What units were replaced by.
        metric: What was measured, with its unit.
    """

    per_row: Float[Tensor, "row *unit"]
    clean: Float[Tensor, "row"]
    axes: Mapping[str, tuple[int | str, ...]]
    method: AblationMethod
    metric: str

    ranked_by: ClassVar[str | None] = "change"

    @property
    def change(self) -> Float[Tensor, "*unit"]:
        """Mean change over rows."""
        return self.per_row.mean(0)

    @property
    def title(self) -> str:
        """What was measured."""
        rows = f"mean over {len(self.clean)} row{'s' * (len(self.clean) > 1)}"
        of = f"change of {self.metric} with one {list(self.axes)[-1]} {_MEANING[self.method]}"
        return f"{of}; {self.clean.mean():z.4f} in the clean run; {rows}"

    def columns(self) -> Columns:
        """Returns one row for each unit."""
        return melted(self.change, "change", **self.axes)

    def plot(self) -> "go.Figure":
        """Returns a heat map for two axes of units, bars for one."""
        names = [list(map(str, places)) for places in self.axes.values()]
        titles, unit = list(self.axes), f"change of {self.metric}"
        if len(names) == 1:
            return bars(self.change.tolist(), names=names[0], value_title=unit, title=self.title)
        return heatmap(
            self.change, x=names[1], y=names[0], x_title=titles[1], y_title=titles[0], name=unit, title=self.title
        )
