"""Circuit discovery: edges pruned by approximate scores, and the survivors re-evaluated exactly, one by one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts
from clearspan.circuits.attribution import Agreement
from clearspan.circuits.circuit import Circuit
from clearspan.circuits.edge_scores import EdgeScores, checked_scores, edge_attribution
from clearspan.circuits.evaluation import CircuitRuns, shares
from clearspan.circuits.graph import Edge
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Input
from clearspan.plots import Network
from clearspan.progress import Progress, shown, silent
from clearspan.results import Columns, Result, number
from clearspan.sweep import Metric


def discover_circuit(
    bridge: TransformerBridge,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    *,
    target: float = 0.9,
    tolerance: float | None = None,
    scores: EdgeScores | None = None,
    steps: int = 5,
    attention_mask: Int[Tensor, "row pos"] | None = None,
    memory: int | None = None,
    progress: bool | Progress = True,
) -> "DiscoveredCircuit":
    r"""Returns a circuit that is faithful, and that no single edge can be dropped from.

    1. Edges are ordered by the size of their scores. By doubling and then by bisection the least number of them is
       sought whose circuit is off the clean run by no more than half of what `target` allows.
    2. Edges on no path from `embed` to `logits` are dropped, which changes nothing.
    3. The circuit is run without each of its edges, exactly. An edge may go if the circuit without it is within
       `target`, and differs by less than `tolerance`. As many of those that may go are dropped together, the least
       effects first, as leave the circuit within `target`.
    4. From 2, until no edge may go.

    A circuit is within the target if its faithfulness is at most `1 - target` from 1, on either side. Which circuit is
    found depends on the order: others exist that no edge can be dropped from, and some may be smaller.

    Args:
        bridge: The model, in evaluation mode.
        clean: Any input.
        corrupted: Another, with as many rows, and as many real tokens in each.
        metric: As for `evaluate_circuits`; with a gradient, unless scores are given.
        target: The faithfulness to keep, above 0 and below 1.
        tolerance: Edges stay whose removal changes faithfulness by as much or more. None for no such limit.
        scores: Of `edge_attribution` on these inputs, or on others; by default EAP-IG on these.
        steps: Of that EAP-IG.
        attention_mask: 1 for real tokens, of an input that is bare token ids with padding.
        memory: Bytes that a batch of runs may take.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, total)`: for each round, which
            runs the circuit without each of its edges.

    Returns:
        The circuit with its faithfulness, completeness, the exact effect of each of its edges, the steps on the way,
        and how the scores agree with exact effects.

    Raises:
        InvalidArgumentError: As for `evaluate_circuits` and `edge_attribution`; a target out of its range, or scores of
            another graph.

    Example:
        >>> import clearspan
        >>> from clearspan.sweep import LogitDifference
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> metric = LogitDifference.between(bridge, " os", " re")
        >>> found = discover_circuit(bridge, "import os\nimport", "import re\nimport", metric, target=0.8)
        >>> found.faithfulness >= 0.8, found.circuit.n_edges < 60
        (True, True)

    References:
        Conmy et al. (2023), "Towards Automated Circuit Discovery", arXiv:2304.14997 (ACDC), drops edges one at a time,
        each by a threshold of its own effect, and without a target. Syed et al. (2023), arXiv:2310.10348, and Hanna et
        al. (2024), arXiv:2403.17806, for the scores; they evaluate nothing again after that.
    """
    if not _is_number(target) or not 0 < target < 1:
        raise InvalidArgumentError(f"no circuit is sought for target={target}", expected="a number between 0 and 1")
    if tolerance is not None and not (_is_number(tolerance) and tolerance >= 0):
        raise InvalidArgumentError(f"tolerance={tolerance!r}", expected="a number from 0 on, or None")
    check_counts(steps=steps)
    runs = CircuitRuns.of(bridge, clean, corrupted, metric, attention_mask, memory)
    with shown(progress) as tell:
        if scores is None:
            pair = runs.pair
            scores = edge_attribution(bridge, pair.clean, pair.corrupted, metric, steps=steps, progress=tell)
        if checked_scores(scores).graph != runs.graph:
            expected, got = str(runs.graph), str(scores.graph)
            raise InvalidArgumentError("the scores are of another graph", expected=expected, got=got)
        return _Search(runs, scores, target, tolerance, tell=tell).run()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(eq=False)
class _Search:
    """The search for one circuit.

    Attributes:
        runs: What evaluates circuits.
        scores: The order in which edges come in.
        target: The faithfulness to keep.
        tolerance: The effect from which on an edge stays.
        history: What was done.
        tell: Is told how far each round is.
    """

    runs: CircuitRuns
    scores: EdgeScores
    target: float
    tolerance: float | None
    history: "list[PruningStep]" = field(default_factory=list)
    tell: Progress = silent

    def run(self) -> "DiscoveredCircuit":
        """Returns the circuit that is left in the end."""
        circuit, agreement = self._scored(), None
        while True:
            circuit = circuit.pruned()
            edges = list(circuit)
            own, *others = self.runs.metrics_of(_with_removals(circuit, edges), self.tell)
            without = torch.stack(others) if others else own.new_zeros(0, len(own))
            agreement = agreement or self._agreement(edges, own, without)
            self.history.append(PruningStep(circuit.n_edges, float(self.runs.shares(own))))
            dropped = self._droppable(circuit, edges, own, without)
            if not dropped:
                return self._result(circuit, own, without, agreement)
            circuit = circuit.without(*dropped)

    def _scored(self) -> Circuit:
        """Returns the circuit of the best scores that is close enough: sought by doubling, then by bisection."""
        n_edges, size = self.runs.graph.n_edges, 1

        def is_close(count: int) -> bool:
            best = Circuit.of_scores(self.scores, n_edges=count)
            return self._distance(best) <= (1 - self.target) / 2

        while size < n_edges and not is_close(size):
            size *= 2
        size = min(size, n_edges)
        left_out = _last(lambda count: is_close(size - count), size - size // 2)
        return Circuit.of_scores(self.scores, n_edges=size - left_out)

    def _droppable(self, circuit: Circuit, edges: list[Edge], own: Tensor, without: Tensor) -> list[Edge]:
        """Returns edges that are dropped together, the least effects first."""
        shares = self.runs.shares(without)
        effects = (shares - self.runs.shares(own)).abs()
        may_go = (shares - 1).abs() <= 1 - self.target
        if self.tolerance is not None:
            may_go &= effects < self.tolerance
        order = [edges[at] for at in effects.argsort().tolist() if may_go[at]]
        if len(order) < 2:
            return order

        def is_close(count: int) -> bool:
            return count <= 1 or self._distance(circuit.without(*order[:count])) <= 1 - self.target

        return order if is_close(len(order)) else order[: _last(is_close, len(order))]

    def _distance(self, circuit: Circuit) -> float:
        """Returns how far a circuit's faithfulness is from 1."""
        return float((self.runs.shares(self.runs.metrics(circuit)) - 1).abs())

    def _agreement(self, edges: list[Edge], own: Tensor, without: Tensor) -> Agreement:
        """Returns how scores agree with the exact change of the metric that each edge makes in the circuit."""
        scores = torch.tensor([self.scores.score(edge) for edge in edges])
        return Agreement(scores, (own - without).mean(-1), [edge.name for edge in edges], len(edges))

    def _result(self, circuit: Circuit, own: Tensor, without: Tensor, agreement: Agreement) -> "DiscoveredCircuit":
        (rest,) = self.runs.metrics(circuit.complement())
        return DiscoveredCircuit(
            circuit,
            own,
            rest,
            self.runs.clean.value,
            self.runs.corrupted.value,
            self.runs.pair.metric_name,
            without,
            self.scores,
            agreement,
            tuple(self.history),
            self.runs.n_circuits,
            self.runs.n_forwards,
        )


def _last(holds: Callable[[int], bool], end: int) -> int:
    """Returns a number below `end` at which something holds and after which it does not, by bisection.

    It is taken to hold at 0, and not at `end`.
    """
    low, high = 0, end
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _with_removals(circuit: Circuit, edges: list[Edge]) -> Bool[Tensor, "removal sender receiver"]:
    """Returns a circuit as a mask, then without each of some edges."""
    masks = circuit.mask.repeat(1 + len(edges), 1, 1)
    for at, edge in enumerate(edges):
        masks[(1 + at, *circuit.graph.index_of(edge))] = False
    return masks


# --- the result ------------------------------------------------------------------------------------------------------


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
    """A circuit that no edge could be dropped from, and exact runs of it, on the CPU.

    Attributes:
        circuit: The edges.
        per_row: Metric of its run; one row where it is one number for all.
        rest_per_row: Metric of the run of all other edges.
        clean: Metric of the clean run.
        corrupted: Metric of the corrupted run.
        metric: What was measured.
        without_per_row: Metric of the run without each edge, in the order of the circuit.
        scores: The approximation by which edges were chosen first.
        agreement: How the scores of the first round's edges agree with the change of the metric that each makes there.
        history: The rounds.
        n_circuits: How many circuits were run.
        n_forwards: In how many batches.
    """

    circuit: Circuit
    per_row: Float[Tensor, "row"]
    rest_per_row: Float[Tensor, "row"]
    clean: Float[Tensor, "row"]
    corrupted: Float[Tensor, "row"]
    metric: str
    without_per_row: Float[Tensor, "edge row"]
    scores: EdgeScores
    agreement: Agreement
    history: tuple[PruningStep, ...]
    n_circuits: int
    n_forwards: int

    ranked_by: ClassVar[str | None] = "effect"

    @property
    def faithfulness(self) -> float:
        """How far it comes from the corrupted run (0) to the clean run (1)."""
        return float(self._shares(self.per_row))

    @property
    def completeness(self) -> float:
        """How far all other edges come without it: near 0 where it has all that matters."""
        return float(self._shares(self.rest_per_row))

    def _shares(self, values: Tensor) -> Tensor:
        return shares(values, self.clean, self.corrupted)

    @property
    def effects(self) -> Mapping[Edge, float]:
        """How much of its faithfulness the circuit loses without each edge."""
        lost = self.faithfulness - self._shares(self.without_per_row)
        return dict(zip(self.circuit, lost.tolist(), strict=True))

    @property
    def title(self) -> str:
        """What was found, and how the scores agree with exact effects."""
        circuit, first = self.circuit, self.history[0].n_edges
        clean, corrupted = (number(float(values.mean())) for values in (self.clean, self.corrupted))
        shares = f"faithfulness {self.faithfulness:z.3f}, completeness {self.completeness:z.3f}"
        agreed = f"Pearson {self.agreement.pearson:z.3f}, Spearman {self.agreement.spearman:z.3f}"
        return (
            f"circuit of {circuit.n_edges} of {circuit.graph.n_edges} edges for {self.metric} "
            f"({clean} in the clean run, {corrupted} in the corrupted run): {shares}; "
            f"{self.n_circuits} circuits run in {self.n_forwards} batches; "
            f"{self.scores.method} with exact removal of the first {first} edges: {agreed}"
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

    def chart(self) -> Network:
        """Returns the circuit drawn, edges as wide as their effects; see `Circuit.plot`."""
        shares = f"faithfulness {self.faithfulness:z.3f}, completeness {self.completeness:z.3f}"
        return self.circuit.chart(self.effects, f"{self.circuit.n_edges} edges: {shares}")

    def to_svg(self) -> str:
        """Returns the same drawing as an SVG picture."""
        return self.circuit.to_svg(self.effects)
