"""A circuit that was discovered: with what it does, what each of its edges does, and how it was found."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from torch import Tensor

from clearspan.results import Columns, Result

from .agreement import Agreement
from .circuit import Circuit
from .circuit_runs import shares
from .edge_scores import EdgeScores
from .graph import Edge

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class PruningStep:
    """One round of a search.

    Attributes:
        n_edges: Edges of the circuit whose edges were evaluated one by one.
        faithfulness: Of that circuit.
    """

    n_edges: int
    faithfulness: float


@dataclass(frozen=True, eq=False, repr=False)
class DiscoveredCircuit(Result):
    """A circuit of which no edge could be dropped, and exact runs of it, on the CPU.

    Attributes:
        circuit: The edges.
        per_row: Metric of its run; one row where it is one number for all.
        without_per_row: Metric of the run without each edge, in the order of the circuit.
        rest_per_row: Metric of the run of all edges but the circuit's.
        clean: Metric of the clean run.
        corrupted: Metric of the corrupted run.
        metric: What was measured.
        scores: The approximation by which edges were chosen first.
        agreement: How the scores of the first round's edges agree with the change of the metric that each makes there.
        history: The rounds.
        n_circuits: How many circuits were run.
        n_forwards: In how many batches.
    """

    circuit: Circuit
    per_row: Float[Tensor, "row"]
    without_per_row: Float[Tensor, "edge row"]
    rest_per_row: Float[Tensor, "row"]
    clean: Float[Tensor, "row"]
    corrupted: Float[Tensor, "row"]
    metric: str
    scores: EdgeScores
    agreement: Agreement
    history: tuple[PruningStep, ...]
    n_circuits: int
    n_forwards: int

    ranked_by: ClassVar[str | None] = "effect"

    @property
    def faithfulness(self) -> float:
        """How far it comes from the corrupted run (0) to the clean run (1)."""
        return float(shares(self.per_row, self.clean, self.corrupted))

    @property
    def completeness(self) -> float:
        """How far all other edges come without it: near 0 where it has all that matters."""
        return float(shares(self.rest_per_row, self.clean, self.corrupted))

    @property
    def effects(self) -> Mapping[Edge, float]:
        """How much of its faithfulness the circuit loses without each edge."""
        lost = self.faithfulness - shares(self.without_per_row, self.clean, self.corrupted)
        return dict(zip(self.circuit, lost.tolist(), strict=True))

    @property
    def title(self) -> str:
        """What was found, and how the scores agree with exact effects."""
        circuit, first = self.circuit, self.history[0].n_edges
        ends = f"{self.clean.mean():z.4f} in the clean run, {self.corrupted.mean():z.4f} in the corrupted run"
        return (
            f"circuit of {circuit.n_edges} of {circuit.graph.n_edges} edges for {self.metric} ({ends}): faithfulness "
            f"{self.faithfulness:z.3f}, completeness {self.completeness:z.3f}; {self.n_circuits} circuits run in "
            f"{self.n_forwards} batches; {self.scores.method} with exact removal of the first {first} edges: Pearson "
            f"{self.agreement.pearson:z.3f}, Spearman {self.agreement.spearman:z.3f}"
        )

    def columns(self) -> Columns:
        """Returns one row for each edge: its score, in units of the metric, and its effect, in faithfulness."""
        edges = list(self.circuit)
        return {
            "sender": [edge.sender.name for edge in edges],
            "receiver": [edge.receiver.name for edge in edges],
            "score": [self.scores.score(edge) for edge in edges],
            "effect": list(self.effects.values()),
        }

    def plot(self) -> "go.Figure":
        """Returns the circuit drawn, edges as wide as their effects; see `Circuit.plot`."""
        shares = f"faithfulness {self.faithfulness:z.3f}, completeness {self.completeness:z.3f}"
        return self.circuit.plot(self.effects, f"{self.circuit.n_edges} edges: {shares}")

    def to_svg(self) -> str:
        """Returns the same drawing as an SVG picture."""
        return self.circuit.to_svg(self.effects)
