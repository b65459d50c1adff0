"""How often a model answers as a hypothesis expects, when values are exchanged at one place after the other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from torch import Tensor

from clearspan.plots.charts import heatmap, lines
from clearspan.results import Columns, Result, melted
from clearspan.statistics import Interval, share_interval, standard_error

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class InterchangeAccuracy(Result):
    """Interchange intervention accuracy (IIA): shares of pairs that are answered as expected, on the CPU.

    Attributes:
        hits: 1 where the answer after the interchange is the label, otherwise 0.
        unchanged: The same without an interchange.
        axes: Names of the axes before `example`, with the places on each.
        exchanged: What was exchanged, in words.
    """

    hits: Float[Tensor, "*cell example"]
    unchanged: Float[Tensor, "example"]
    axes: Mapping[str, tuple[int | str, ...]]
    exchanged: str

    ranked_by: ClassVar[str | None] = "accuracy"

    @property
    def accuracy(self) -> Float[Tensor, "*cell"]:
        """The share of hits."""
        return self.hits.mean(-1)

    @property
    def standard_error(self) -> Float[Tensor, "*cell"]:
        """Standard error of the accuracy over pairs, which are taken as drawn independently."""
        return standard_error(self.hits.movedim(-1, 0)).float()

    def interval(self, level: float = 0.95) -> Interval:
        """Returns the accuracies with Wilson's score interval around each, which has a width also at 0 and 1."""
        return share_interval(self.hits, level=level)

    @property
    def title(self) -> str:
        """What was exchanged, and on how many pairs."""
        pairs = len(self.unchanged)
        return (
            f"interchange accuracy: {self.exchanged} exchanged; {self.unchanged.mean():z.4f} without an interchange; "
            f"{pairs} pair{'s' * (pairs > 1)}"
        )

    def columns(self) -> Columns:
        """Returns one row for each place; `low` and `high` are the ends of the 95 % interval."""
        interval = self.interval()
        columns = melted(self.accuracy, "accuracy", **self.axes)
        ends = {"low": interval.low, "high": interval.high}
        return {**columns, **{name: end.flatten().tolist() for name, end in ends.items()}}

    def plot(self) -> "go.Figure":
        """Returns a line over one axis of places, beside the accuracy without an interchange; a heat map for two."""
        titles, names = list(self.axes), [list(map(str, places)) for places in self.axes.values()]
        if len(names) == 2:
            return heatmap(
                self.accuracy,
                x=names[1],
                y=names[0],
                x_title=titles[1],
                y_title=titles[0],
                name="accuracy",
                title=self.title,
                sequential=True,
                bound=1,
            )
        without = [self.unchanged.mean().item()] * len(names[0])
        series = {"exchanged": self.accuracy.tolist(), "without": without}
        figure = lines(series, x=names[0], x_title=titles[0], value_title="accuracy", title=self.title)
        return figure.update_layout(xaxis_type="category", yaxis_range=[0, 1.03])
