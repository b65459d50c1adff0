"""Circuits evaluated exactly: how faithful each is, and what is left without it."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.analysis.places import Input
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.sweep import Metric

from .circuit import Circuit
from .circuit_result import CircuitEvaluation, FaithfulnessCurve
from .circuit_runs import CircuitRuns
from .edge_scores import EdgeScores


def evaluate_circuits(
    bridge: TransformerBridge,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    circuits: Circuit | Mapping[str, Circuit],
    *,
    attention_mask: Int[Tensor, "row pos"] | None = None,
    memory: int | None = None,
) -> CircuitEvaluation:
    r"""Returns how faithful circuits are, and what all other edges do without them, exactly.

    In a circuit's run, each input of a head or MLP, and the last residual stream, reads

    `corrupted stream + sum over its edges in the circuit of (sender(this run) - sender(corrupted run))`

    with the clean input's embeddings as `embed`: edges outside the circuit carry the corrupted run's values. With `m`
    the mean of the metric over rows,

    `faithfulness = (m(circuit) - m(corrupted)) / (m(clean) - m(corrupted))`

    and completeness is the same of all other edges. What a bias adds after a norm on attention's output is left as it
    was in the corrupted run.

    Args:
        bridge: The model, in evaluation mode.
        clean: A text, texts, or token ids.
        corrupted: The other input, position on position with the clean one.
        metric: What is measured, of logits or as `clearspan.sweep` has it. The tokens it may need are the clean ones.
        circuits: A circuit, or several by name.
        attention_mask: 1 for real tokens, where token ids have padding.
        memory: Bytes that a batch of runs may take.

    Returns:
        Metrics by circuit and row.

    Raises:
        InvalidArgumentError: As for `edge_attribution`; a circuit of another graph; or a metric that is the same in
            both runs.

    Example:
        >>> import clearspan
        >>> from clearspan.sweep import LogitDifference
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> metric = LogitDifference.between(bridge, " os", " re")
        >>> nothing = Circuit.of(bridge, [])
        >>> circuits = {"all": nothing.complement(), "nothing": nothing}
        >>> found = evaluate_circuits(bridge, "import os\nimport", "import re\nimport", metric, circuits)
        >>> [abs(round(share, 3)) for share in found.faithfulness.tolist()]
        [1.0, 0.0]

    References:
        Conmy et al. (2023), "Towards Automated Circuit Discovery", arXiv:2304.14997, for runs of subgraphs. Hanna et
        al. (2024), "Have Faith in Faithfulness", arXiv:2403.17806, for this normalisation. Marks et al. (2024), "Sparse
        Feature Circuits", arXiv:2403.19647, for completeness; Wang et al. (2022), arXiv:2211.00593, take parts of the
        circuit out as well.
    """
    named = {"circuit": circuits} if isinstance(circuits, Circuit) else dict(circuits)
    if not named:
        raise InvalidArgumentError("there is no circuit to evaluate", expected="one or more")
    runs = CircuitRuns.of(bridge, clean, corrupted, metric, attention_mask, memory)
    values = runs.metrics([*named.values(), *(circuit.complement() for circuit in named.values())])
    own, rest = values.split(len(named))
    return CircuitEvaluation(named, own, rest, runs.clean.value, runs.corrupted.value, runs.pair.metric_name)


def faithfulness_curve(
    scores: EdgeScores,
    sizes: Sequence[int] | None = None,
    *,
    draws: int = 3,
    seed: int = 0,
    memory: int | None = None,
) -> FaithfulnessCurve:
    r"""Returns how faithful circuits of the best-scored edges are by size, what is left without each, and a control.

    The inputs and the metric are those of the scores. The control is as many edges drawn from all, most of which lie on
    no path from `embed` to `logits`: it says that size alone is not enough, and no more.

    Args:
        scores: What `edge_attribution` found.
        sizes: Numbers of edges; by default twelve from 1 to all, in equal ratios.
        draws: How many random circuits there are of each size.
        seed: Of the first; the next ones have the next seeds.
        memory: Bytes that a batch of runs may take.

    Raises:
        InvalidArgumentError: A size that is not from 0 to the number of edges.

    Example:
        >>> import clearspan
        >>> from clearspan.analysis import edge_attribution
        >>> from clearspan.sweep import LogitDifference
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> metric = LogitDifference.between(bridge, " os", " re")
        >>> scores = edge_attribution(bridge, "import os\nimport", "import re\nimport", metric, steps=5)
        >>> found = faithfulness_curve(scores, [0, 1131], draws=1)
        >>> found.faithfulness.round(decimals=3).abs().tolist(), found.completeness.round(decimals=3).abs().tolist()
        ([0.0, 1.0], [1.0, 0.0])
    """
    graph, pair = scores.graph, scores.pair
    chosen = _spread(graph.n_edges) if sizes is None else tuple(sizes)
    for size in chosen:
        if not 0 <= size <= graph.n_edges:
            raise InvalidArgumentError(f"no circuit has {size} edges", expected=f"0 to {graph.n_edges}")
    runs = CircuitRuns.of(pair.bridge, pair.clean, pair.corrupted, pair.metric, pair.mask, memory)
    circuits = [Circuit.of_scores(scores, n_edges=size) for size in chosen]
    rest = [circuit.complement() for circuit in circuits]
    random = [Circuit.random(graph, size, seed + draw) for draw in range(draws) for size in chosen]
    own, other, *drawn = runs.metrics([*circuits, *rest, *random]).split(len(chosen))
    drawn = torch.stack(drawn) if drawn else own.new_zeros(0, *own.shape)
    ends = runs.clean.value, runs.corrupted.value
    return FaithfulnessCurve(chosen, own, other, drawn, *ends, pair.metric_name, scores.method)


def _spread(n_edges: int, count: int = 12) -> tuple[int, ...]:
    """Returns sizes from 1 to all in equal ratios.

    Example:
        >>> _spread(100, 3)
        (1, 10, 100)
    """
    return tuple(sorted({round(n_edges ** (step / (count - 1))) for step in range(count)}))
