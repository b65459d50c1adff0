"""Circuit discovery: edges pruned by approximate scores, and the survivors re-evaluated exactly, one by one."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from clearspan.analysis.places import Input
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.sweep import Metric

from .agreement import Agreement
from .circuit import Circuit
from .circuit_runs import CircuitRuns
from .discovered_circuit import DiscoveredCircuit, PruningStep
from .edge_attribution import edge_attribution
from .edge_scores import EdgeScores
from .graph import Edge


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
) -> DiscoveredCircuit:
    r"""Returns a circuit that is faithful, and of which no edge can be dropped.

    1. Edges are ordered by the size of their scores, and a number of them is sought, by doubling and then by bisection,
       whose circuit is off the clean run by no more than half of what `target` allows.
    2. Edges on no path from `embed` to `logits` are dropped, which changes nothing.
    3. The circuit is run without each of its edges, exactly. An edge may go if the circuit without it is within
       `target`, and differs by less than `tolerance`. Of those that may, as many are dropped together as the circuit
       stays within `target` without, the least effects first.
    4. From 2, until no edge may go.

    Within the target is a circuit whose faithfulness is at most `1 - target` from 1, on either side. Which circuit is
    found depends on the order: there are others of which no edge can be dropped, and smaller ones may be among them.

    Args:
        bridge: The model, in evaluation mode.
        clean: A text, texts, or token ids.
        corrupted: The other input, position on position with the clean one.
        metric: As for `evaluate_circuits`; with a gradient, unless scores are given.
        target: The faithfulness to keep, above 0 and below 1.
        tolerance: Edges stay whose removal changes faithfulness by as much or more. None for no such limit.
        scores: Of `edge_attribution` on these inputs, or on others; by default EAP-IG on these.
        steps: Of that EAP-IG.
        attention_mask: 1 for real tokens, where token ids have padding.
        memory: Bytes that a batch of runs may take.

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
        al. (2024), arXiv:2403.17806, for the scores, after which nothing is re-evaluated there.
    """
    if not 0 < target < 1:
        raise InvalidArgumentError(f"no circuit is sought for target={target}", expected="a number between 0 and 1")
    runs = CircuitRuns.of(bridge, clean, corrupted, metric, attention_mask, memory)
    if scores is None:
        scores = edge_attribution(bridge, clean, corrupted, metric, steps=steps, attention_mask=attention_mask)
    if scores.graph != runs.graph:
        raise InvalidArgumentError("the scores are of another graph", expected=str(runs.graph), got=str(scores.graph))
    return _Search(runs, scores, target, tolerance).run()


@dataclass(eq=False)
class _Search:
    """The search for one circuit.

    Attributes:
        runs: What evaluates circuits.
        scores: The order in which edges come in.
        target: The faithfulness to keep.
        tolerance: The effect from which on an edge stays.
        history: What was done.
    """

    runs: CircuitRuns
    scores: EdgeScores
    target: float
    tolerance: float | None
    history: list[PruningStep] = field(default_factory=list)

    def run(self) -> DiscoveredCircuit:
        """Returns the circuit that is left in the end."""
        circuit, agreement = self._scored(), None
        while True:
            circuit = circuit.pruned()
            edges = list(circuit)
            own, *others = self.runs.metrics_of(_with_removals(circuit, edges))
            without = torch.stack(others)
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
        order = [edges[number] for number in effects.argsort().tolist() if may_go[number]]
        if len(order) < 2:
            return order

        def is_close(count: int) -> bool:
            return count <= 1 or self._distance(circuit.without(*order[:count])) <= 1 - self.target

        return order if is_close(len(order)) else order[: _last(is_close, len(order))]

    def _distance(self, circuit: Circuit) -> float:
        """Returns how far a circuit's faithfulness is from 1."""
        return float((self.runs.shares(self.runs.metrics([circuit])) - 1).abs())

    def _agreement(self, edges: list[Edge], own: Tensor, without: Tensor) -> Agreement:
        """Returns how scores agree with the exact change of the metric that each edge makes in the circuit."""
        scores = torch.tensor([self.scores.score(edge) for edge in edges])
        return Agreement(scores, (own - without).mean(-1), [edge.name for edge in edges], len(edges))

    def _result(self, circuit: Circuit, own: Tensor, without: Tensor, agreement: Agreement) -> DiscoveredCircuit:
        (rest,) = self.runs.metrics([circuit.complement()])
        ends = self.runs.clean.value, self.runs.corrupted.value
        counts = self.runs.n_circuits, self.runs.n_forwards
        metric = self.runs.pair.metric_name
        return DiscoveredCircuit(
            circuit, own, without, rest, *ends, metric, self.scores, agreement, tuple(self.history), *counts
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
    for number, edge in enumerate(edges):
        masks[(1 + number, *circuit.graph.index_of(edge))] = False
    return masks
