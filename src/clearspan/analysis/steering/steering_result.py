"""What steering did to a metric at each strength, and what it cost."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from torch import Tensor

from clearspan.errors import InvalidArgumentError
from clearspan.plots.charts import heatmap, lines
from clearspan.results import Columns, Result, melted

if TYPE_CHECKING:
    import plotly.graph_objects as go

_MOST_LINES = 6
"""Points that are drawn as lines; more are a heat map."""


@dataclass(frozen=True, eq=False, repr=False)
class SteeringSweep(Result):
    """A metric under steering, at each point and strength, on the CPU.

    How sure a change is: `bootstrap_interval(found.per_row - found.clean[:, None, None])`, where rows are independent.

    Attributes:
        points: What was steered.
        strengths: Factors of the vector.
        per_row: The metric for each row; one row where it is one number for the whole batch.
        random_per_row: The same for random directions of the same norm.
        clean: The metric without steering, for each row.
        cost: Mean next-token loss in nats on other text, steered at every position; None where it was not measured.
        random_cost: The same for the random directions.
        clean_cost: The same without steering.
        metric: What was measured, with its unit.
        vector: What was added.
    """

    points: tuple[str, ...]
    strengths: tuple[float, ...]
    per_row: Float[Tensor, "row point strength"]
    random_per_row: Float[Tensor, "control row point strength"]
    clean: Float[Tensor, "row"]
    cost: Float[Tensor, "point strength"] | None
    random_cost: Float[Tensor, "control point strength"] | None
    clean_cost: float | None
    metric: str
    vector: str

    shown: ClassVar[int] = 15

    @property
    def value(self) -> Float[Tensor, "point strength"]:
        """The metric, mean over rows."""
        return self.per_row.mean(0)

    @property
    def random_value(self) -> Float[Tensor, "control point strength"]:
        """The metric for each random direction, mean over rows."""
        return self.random_per_row.mean(1)

    @property
    def title(self) -> str:
        """What was measured, and its value without steering."""
        rows = f"mean over {len(self.clean)} row{'s' * (len(self.clean) > 1)}"
        cost = "" if self.clean_cost is None else f"; loss on other text {self.clean_cost:z.4f} nats without"
        return f"{self.metric} by strength of steering, {rows}; {self.clean.mean():z.4f} without{cost}"

    def columns(self) -> Columns:
        """Returns one row for each point and strength.

        `random low` and `random high` are the least and the greatest value that a random direction gives.
        """
        columns = dict(melted(self.value, "value", point=self.points, strength=self.strengths))
        if len(self.random_per_row):
            columns["random low"] = self.random_value.amin(0).flatten().tolist()
            columns["random high"] = self.random_value.amax(0).flatten().tolist()
        if self.cost is not None:
            columns["cost"] = self.cost.flatten().tolist()
        if self.random_cost is not None and len(self.random_cost):
            columns["random cost"] = self.random_cost.mean(0).flatten().tolist()
        return columns

    def plot(self) -> "go.Figure":
        """Returns the metric by strength: a line for each point, with the random directions' where there is one point.

        More than six points are a heat map of changes.
        """
        return self._figure(self.value, self.random_value, self.clean.mean().item(), self.metric)

    def plot_cost(self) -> "go.Figure":
        """Returns the cost by strength, in the same form.

        Raises:
            InvalidArgumentError: It was not measured.
        """
        if self.cost is None or self.random_cost is None or self.clean_cost is None:
            raise InvalidArgumentError("no cost was measured", fix="steering_sweep(..., unrelated=texts)")
        return self._figure(self.cost, self.random_cost, self.clean_cost, "loss on other text in nats")

    def _figure(
        self,
        values: Float[Tensor, "point strength"],
        random: Float[Tensor, "control point strength"],
        clean: float,
        name: str,
    ) -> "go.Figure":
        if len(self.points) > _MOST_LINES:
            return heatmap(
                values - clean,
                x=[f"{strength:g}" for strength in self.strengths],
                y=self.points,
                x_title="strength",
                y_title="point",
                name=f"change of {name}",
                title=self.title,
            )
        series = {point: values[i].tolist() for i, point in enumerate(self.points)}
        if len(self.points) == 1:
            series |= {f"random {i}": direction[0].tolist() for i, direction in enumerate(random)}
        return lines(series, x=self.strengths, x_title="strength", value_title=name, title=self.title)
