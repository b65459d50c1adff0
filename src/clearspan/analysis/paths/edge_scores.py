"""What edge attribution found: an approximate effect for each edge, and how they agree with exact ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.plots.charts import heatmap
from clearspan.results import Columns, Result

from .agreement import Agreement, compared, sampled
from .edge_patching import swept_edges
from .graph import ComputationalGraph, Edge
from .patching_pair import PatchingPair

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class ScoredEdge:
    """An edge, and its approximate effect.

    Attributes:
        edge: The edge.
        score: Approximate change of the metric when it is patched; mean over rows.
    """

    edge: Edge
    score: float

    def __str__(self) -> str:
        return self.edge.name


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores(Result):
    """Approximate effects of patching one edge of the computational graph at a time, on the CPU.

    Attributes:
        per_row: Approximate change of the metric, for each row (one, where the metric is one number for all); NaN where
            there is no edge.
        graph: The senders and receivers, in order.
        base: The metric of the run that is patched, for each row.
        source: The metric of the run that gives values.
        pair: The runs.
        steps: Runs over which gradients were averaged (EAP-IG), or None for those at the base run (EAP).
        agreement: How some edges compare with exact patching, once `compared_with_exact` has run it.
    """

    per_row: Float[Tensor, "row sender receiver"]
    graph: ComputationalGraph
    base: Float[Tensor, "row"]
    source: Float[Tensor, "row"]
    pair: PatchingPair
    steps: int | None
    agreement: Agreement | None = None

    ranked_by: ClassVar[str | None] = "score"

    @property
    def scores(self) -> Float[Tensor, "sender receiver"]:
        """Mean over rows."""
        return self.per_row.mean(0)

    def score(self, edge: Edge | str) -> float:
        """Returns the score of an edge, or of its name such as `L0H1->L2H3.q`.

        Raises:
            InvalidArgumentError: There is no such edge.
        """
        (found,) = self.graph.parsed([edge])
        return float(self.scores[self.graph.index_of(found)])

    def top(self, k: int = 10) -> list[ScoredEdge]:
        """Returns the `k` edges with the largest effects of either sign, largest first."""
        sizes = self.scores.abs().nan_to_num(-1.0).flatten()
        places = sizes.topk(min(k, self.graph.n_edges)).indices
        return [ScoredEdge(self._edge(place), float(self.scores.flatten()[place])) for place in places.tolist()]

    def _edge(self, place: int) -> Edge:
        sender, receiver = divmod(place, len(self.graph.receivers))
        return Edge(self.graph.senders[sender], self.graph.receivers[receiver])

    def compared_with_exact(self, edges: int | Sequence[Edge | str] | None = 64, seed: int = 0) -> Self:
        """Returns the same result with its agreement with exact patching, which is run.

        Args:
            edges: How many edges are run, chosen at random; which, by themselves or by name; or None for all.
            seed: Of the choice.
        """
        if isinstance(edges, int | None):
            places = self.graph.mask.flatten().nonzero()[:, 0]
            chosen = [self._edge(int(places[number])) for number in sampled(len(places), edges, seed)]
        else:
            chosen = self.graph.parsed(edges)
        exact = swept_edges(self.pair, self.graph, {edge.name: [edge] for edge in chosen})
        approximate = torch.stack([self.scores[self.graph.index_of(edge)] for edge in chosen])
        names = [edge.name for edge in chosen]
        return replace(self, agreement=Agreement(approximate, exact.change().mean(-1), names, self.graph.n_edges))

    @property
    def method(self) -> str:
        """What was computed, in words."""
        return "EAP" if self.steps is None else f"EAP-IG of {self.steps} step{'s' * (self.steps > 1)}"

    @property
    def title(self) -> str:
        """What was approximated, and how it agrees with what it approximates."""
        pair, rows = self.pair, len(self.per_row)
        return (
            f"{self.method}: approximate change of {pair.metric_name} with one of {self.graph.n_edges} edges from the "
            f"{pair.source_name} run; {pair.described(self.base, self.source)}; mean over {rows} "
            f"row{'s' * (rows > 1)}; {compared(self.agreement)}"
        )

    def columns(self) -> Columns:
        """Returns one row for each edge."""
        places = self.graph.mask.nonzero()
        senders, receivers = places.T.tolist()
        return {
            "sender": [self.graph.senders[place].name for place in senders],
            "receiver": [self.graph.receivers[place].name for place in receivers],
            "score": self.scores[places[:, 0], places[:, 1]].tolist(),
        }

    def plot(self) -> "go.Figure":
        """Returns a heat map: senders down, receivers from left to right."""
        return heatmap(
            self.scores,
            x=[node.name for node in self.graph.receivers],
            y=[node.name for node in self.graph.senders],
            x_title="receiver",
            y_title="sender",
            name=f"approximate change of {self.pair.metric_name}",
            title=self.title,
        )
