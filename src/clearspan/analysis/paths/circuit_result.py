"""What runs of circuits showed: faithfulness and completeness, of some circuits or by size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from clearspan.plots.charts import lines
from clearspan.results import Columns, Result

from .circuit import Circuit
from .circuit_runs import shares

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class CircuitEvaluation(Result):
    """Metrics of the runs of circuits, and of all that they leave out, on the CPU.

    Attributes:
        circuits: By name.
        per_row: Metric of each circuit's run; one row where it is one number for all.
        rest_per_row: Metric of the run of all other edges.
        clean: Metric of the clean run.
        corrupted: Metric of the corrupted run.
        metric: What was measured.
    """

    circuits: Mapping[str, Circuit]
    per_row: Float[Tensor, "circuit row"]
    rest_per_row: Float[Tensor, "circuit row"]
    clean: Float[Tensor, "row"]
    corrupted: Float[Tensor, "row"]
    metric: str

    @property
    def faithfulness(self) -> Float[Tensor, "circuit"]:
        """How far each circuit comes from the corrupted run (0) to the clean run (1); it may be beyond both."""
        return shares(self.per_row, self.clean, self.corrupted)

    @property
    def completeness(self) -> Float[Tensor, "circuit"]:
        """How far all other edges come without the circuit: near 0 where the circuit has all that matters."""
        return shares(self.rest_per_row, self.clean, self.corrupted)

    @property
    def title(self) -> str:
        """What was measured."""
        return f"runs of circuits by {_measured(self.metric, self.clean, self.corrupted)}"

    def columns(self) -> Columns:
        """Returns one row for each circuit."""
        return {
            "circuit": list(self.circuits),
            "edges": [circuit.n_edges for circuit in self.circuits.values()],
            "metric": self.per_row.mean(-1).tolist(),
            "faithfulness": self.faithfulness.tolist(),
            "completeness": self.completeness.tolist(),
        }

    def plot(self) -> "go.Figure":
        """Returns both shares of each circuit."""
        series = {"circuit": self.faithfulness.tolist(), "the rest alone": self.completeness.tolist()}
        figure = lines(
            series,
            x=list(self.circuits),
            x_title="circuit",
            value_title="share of the way to the clean run",
            title=f"{self.metric} of circuits",
        )
        return figure.update_traces(mode="markers")


@dataclass(frozen=True, eq=False, repr=False)
class FaithfulnessCurve(Result):
    """Metrics of circuits of several sizes, of all that they leave out, and of random circuits, on the CPU.

    Attributes:
        sizes: Numbers of edges.
        per_row: Metric of the circuit of the best-scored edges; one row where it is one number for all.
        rest_per_row: Metric of all other edges.
        random_per_row: Metric of as many edges drawn from all.
        clean: Metric of the clean run.
        corrupted: Metric of the corrupted run.
        metric: What was measured.
        method: By what edges were scored.
    """

    sizes: tuple[int, ...]
    per_row: Float[Tensor, "size row"]
    rest_per_row: Float[Tensor, "size row"]
    random_per_row: Float[Tensor, "draw size row"]
    clean: Float[Tensor, "row"]
    corrupted: Float[Tensor, "row"]
    metric: str
    method: str

    @property
    def faithfulness(self) -> Float[Tensor, "size"]:
        """How far each circuit comes from the corrupted run (0) to the clean run (1)."""
        return shares(self.per_row, self.clean, self.corrupted)

    @property
    def completeness(self) -> Float[Tensor, "size"]:
        """How far all other edges come without it."""
        return shares(self.rest_per_row, self.clean, self.corrupted)

    @property
    def random(self) -> Float[Tensor, "draw size"]:
        """How far random circuits come."""
        return shares(self.random_per_row, self.clean, self.corrupted)

    @property
    def title(self) -> str:
        """What was measured."""
        return f"circuits by {self.method}: {_measured(self.metric, self.clean, self.corrupted)}"

    def columns(self) -> Columns:
        """Returns one row for each size; of random circuits, the mean and the one that came farthest."""
        found = {"edges": list(self.sizes), "faithfulness": self.faithfulness.tolist()}
        found["completeness"] = self.completeness.tolist()
        if len(self.random):
            found |= {"random": self.random.mean(0).tolist(), "random_most": self.random.amax(0).tolist()}
        return found

    def plot(self) -> "go.Figure":
        """Returns the shares by size, which is on a logarithmic axis."""
        series = {"circuit": self.faithfulness.tolist(), "the rest alone": self.completeness.tolist()}
        if len(self.random):
            series["random edges"] = self.random.mean(0).tolist()
        figure = lines(
            series,
            x=list(self.sizes),
            x_title="edges",
            value_title="share of the way to the clean run",
            title=f"{self.metric} of circuits by {self.method}",
        )
        return figure.update_xaxes(type="log", tickvals=list(self.sizes))


def _measured(metric: str, clean: Float[Tensor, "row"], corrupted: Float[Tensor, "row"]) -> str:
    rows = f"{len(clean)} row{'s' * (len(clean) > 1)}"
    return (
        f"{metric} ({clean.mean():z.4f} in the clean run, {corrupted.mean():z.4f} in the corrupted run; mean over "
        f"{rows}), as a share of the way from the corrupted run to the clean run"
    )
