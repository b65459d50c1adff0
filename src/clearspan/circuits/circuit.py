"""Circuits: edges of a model's computational graph, as an object that can be combined, kept and drawn."""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Bool
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, check_kind, path_of
from clearspan.circuits.edge_scores import EdgeScores, checked_scores
from clearspan.circuits.graph import ComputationalGraph, Edge, Kind, Node, graph_of_data
from clearspan.circuits.runs import shuffled
from clearspan.errors import InvalidArgumentError
from clearspan.files import write_text
from clearspan.plots import SERIES, Box, Link, Network, folded, fragment, still
from clearspan.results import Shown, Summary

if TYPE_CHECKING:
    import plotly.graph_objects as go

FORMAT = "clearspan circuit 1"


@dataclass(frozen=True, repr=False)
class Circuit(Shown):
    """A set of edges of a computational graph. `&`, `|` and `-` work as on sets; so do `in`, `len` and `<=`.

    Attributes:
        graph: All senders and receivers of the model.
        edges: Those that belong to the circuit.
        model: Name of the model that it was found in.

    Example:
        >>> import clearspan
        >>> circuit = Circuit.of(clearspan.boot("tiny-bigcode"), ["embed->L3H1.q", "L3H1->L4H3.q", "L4H3->logits"])
        >>> print(circuit)
        circuit of 3 of 1131 edges in tiny-bigcode
          L3H1.q <- embed
          L4H3.q <- L3H1
          logits <- L4H3
        >>> circuit.without("L3H1->L4H3.q").pruned().n_edges
        0
    """

    graph: ComputationalGraph
    edges: frozenset[Edge]
    model: str = ""

    def __post_init__(self) -> None:
        check_kind(ComputationalGraph, graph=self.graph)
        check_kind(Collection, edges=self.edges)
        check_kind(str, model=self.model)
        for edge in self.edges:
            self.graph.index_of(edge)

    @classmethod
    def of(cls, bridge: TransformerBridge, edges: Iterable[Edge | str]) -> Self:
        """Returns the circuit of some edges of a model, by themselves or by name, such as `L0H1->L2H3.q`.

        Raises:
            InvalidArgumentError: There is no such edge, or the model has no graph.
        """
        return cls(ComputationalGraph.of(bridge), frozenset(), bridge.cfg.model_name).with_edges(edges)

    @classmethod
    def of_scores(cls, scores: EdgeScores, *, n_edges: int | None = None, threshold: float | None = None) -> Self:
        """Returns the circuit of the edges with the largest scores of either sign.

        Args:
            scores: What is known of all edges.
            n_edges: How many.
            threshold: Instead of a number of edges: the least size of a score.

        Raises:
            InvalidArgumentError: Not one of the two was given, or more edges than there are.
        """
        if (n_edges is None) == (threshold is None):
            raise InvalidArgumentError(
                "a circuit of scores has a number of edges, or a threshold",
                expected="one of n_edges= and threshold=",
                got=f"n_edges={n_edges}, threshold={threshold}",
            )
        checked_scores(scores)
        if not isinstance(threshold, int | float | None):
            raise InvalidArgumentError(f"threshold={threshold!r}", expected="a number")
        best = scores.best(scores.graph.n_edges if n_edges is None else _checked(scores.graph, n_edges))
        kept = frozenset(edge for edge in best if threshold is None or abs(scores.score(edge)) >= threshold)
        return cls(scores.graph, kept, scores.pair.bridge.cfg.model_name)

    @classmethod
    def random(cls, graph: ComputationalGraph, n_edges: int, seed: int = 0) -> Self:
        """Returns a circuit of edges that are drawn from all, each as likely as any other.

        Args:
            graph: The edges.
            n_edges: How many.
            seed: Of the choice. Torch's own seed is neither read nor changed.
        """
        if not isinstance(graph, ComputationalGraph):
            raise InvalidArgumentError("graph= is a ComputationalGraph", got=repr(graph)[:80], fix="circuit.graph")
        every = list(graph.edges())
        return cls(graph, frozenset(every[at] for at in shuffled(len(every), seed)[: _checked(graph, n_edges)]))

    # --- what is in it -----------------------------------------------------------------------------------------------

    @property
    def n_edges(self) -> int:
        """How many edges it has."""
        return len(self.edges)

    @cached_property
    def mask(self) -> Bool[Tensor, "sender receiver"]:
        """Which edges of the graph are in it."""
        found = torch.zeros(len(self.graph.senders), len(self.graph.receivers), dtype=torch.bool)
        for edge in self.edges:
            found[self.graph.index_of(edge)] = True
        return found

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The senders and receivers on its edges, an MLP once, in the order of the forward."""
        on = {node for edge in self.edges for node in (edge.sender, edge.receiver)}
        every = dict.fromkeys((*self.graph.senders, *self.graph.receivers))
        return tuple(sorted((node for node in every if node in on), key=self._depth))

    def _depth(self, node: Node) -> tuple[int, int, int]:
        """Returns where a node comes in the forward: heads after their inputs."""
        if node.layer is None:
            return (-1, 0, 0) if node.kind == "embed" else (self.graph.n_layers, 0, 0)
        names = [own.name for own in self.graph.wiring[node.layer]]
        return node.layer, names.index(node.sublayer), node.kind == "head"

    def __iter__(self) -> Iterator[Edge]:
        """Yields its edges, receiver by receiver."""
        yield from sorted(self.edges, key=lambda edge: self.graph.index_of(edge)[::-1])

    def __len__(self) -> int:
        return len(self.edges)

    def __contains__(self, edge: Edge | str) -> bool:
        return self.graph.parsed([edge])[0] in self.edges

    def __le__(self, other: "Circuit") -> bool:
        return self.edges <= self._edges_of(other)

    def __str__(self) -> str:
        summary = self._summary()
        return "\n".join([summary.heading, *(f"  {receiver} <- {senders}" for receiver, senders in summary.rows)])

    def __repr__(self) -> str:
        return f"Circuit({self.n_edges} of {self.graph.n_edges} edges, model={self.model!r})"

    def _summary(self) -> Summary:
        senders: dict[Node, list[str]] = {}
        for edge in self:
            senders.setdefault(edge.receiver, []).append(edge.sender.name)
        where = f" in {self.model}" if self.model else ""
        rows = [[receiver.name, ", ".join(names)] for receiver, names in senders.items()]
        return Summary(f"circuit of {self.n_edges} of {self.graph.n_edges} edges{where}", ["receiver", "senders"], rows)

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: its drawing, and its edges."""
        first, *rows = self._summary().parts("print(...)")
        return fragment(first, still(self.chart(), repr(self)), folded("edges", "".join(rows))) if self.edges else first

    # --- others made of it -------------------------------------------------------------------------------------------

    def with_edges(self, edges: Iterable[Edge | str]) -> Self:
        """Returns the circuit with further edges."""
        return replace(self, edges=self.edges.union(self.graph.parsed(edges)))

    def without(self, *edges: Edge | str) -> Self:
        """Returns the circuit without some edges."""
        return replace(self, edges=self.edges.difference(self.graph.parsed(edges)))

    def complement(self) -> Self:
        """Returns the circuit of all other edges of the graph."""
        return replace(self, edges=frozenset(self.graph.edges()) - self.edges)

    def pruned(self) -> Self:
        """Returns the circuit without the edges that are on no path from `embed` to `logits`.

        An edge into one input of a head leads on to all that the head writes. Outside such paths nothing that differs
        between the two runs reaches the logits, so that a run of the circuit is the same without them.
        """
        read, written = defaultdict(set), defaultdict(set)
        for edge in self.edges:
            read[edge.receiver].add(edge.sender)
            written[edge.sender].add(edge.receiver)
        reached, useful = {Node("embed")}, {Node("logits")}
        for sender in self.graph.senders:
            if any(read[receiver] & reached for receiver in self.graph.inputs_of(sender)):
                reached.add(sender)
        for sender in reversed(self.graph.senders):
            if written[sender] & useful:
                useful.update(self.graph.inputs_of(sender))
        kept = frozenset(edge for edge in self.edges if edge.sender in reached and edge.receiver in useful)
        return replace(self, edges=kept)

    def __and__(self, other: "Circuit") -> Self:
        return replace(self, edges=self.edges & self._edges_of(other))

    def __or__(self, other: "Circuit") -> Self:
        return replace(self, edges=self.edges | self._edges_of(other))

    def __sub__(self, other: "Circuit") -> Self:
        return replace(self, edges=self.edges - self._edges_of(other))

    def _edges_of(self, other: "Circuit") -> frozenset[Edge]:
        """Returns the edges of a circuit of the same graph."""
        if not isinstance(other, Circuit):
            raise InvalidArgumentError("a circuit combines with a circuit", got=repr(other)[:80])
        if other.graph != self.graph:
            raise InvalidArgumentError(
                "the circuits are of different graphs", expected=str(self.graph), got=str(other.graph)
            )
        return other.edges

    # --- drawn, and as data ------------------------------------------------------------------------------------------

    def plot(self, effects: Mapping[Edge, float] | None = None, title: str = "") -> "go.Figure":
        """Returns a drawing: layers from the bottom to the top, heads from left to right, MLPs at the right.

        Colours say what reads an edge. Keys and values that several heads share have boxes of their own, with dotted
        lines to the heads of the circuit.

        Args:
            effects: An effect for each of its edges. The larger it is, the wider the edge; below 0 it is dashed. None
                for one width.
            title: Above the drawing.
        """
        return self.chart(effects, title).figure()

    def chart(self, effects: Mapping[Edge, float] | None = None, title: str = "") -> Network:
        """Returns the same drawing as data. Arguments are those of `plot`."""
        check_kind(str, title=title)
        return replace(_network(list(self), effects), title=title or repr(self))

    def to_svg(self, effects: Mapping[Edge, float] | None = None) -> str:
        """Returns the same drawing as an SVG picture."""
        return self.chart(effects).svg()

    def to_json(self) -> str:
        """Returns the circuit as JSON: the model's name, the graph's sizes and the names of edges."""
        data = {"format": FORMAT, "model": self.model, "graph": asdict(self.graph)}
        return json.dumps({**data, "edges": [edge.name for edge in self]})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Returns the circuit of its JSON.

        Raises:
            InvalidArgumentError: It is none, or it names an edge that its graph does not have.
        """
        try:
            data: Any = json.loads(text)
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise ValueError("another format")
            empty = cls(graph_of_data(data["graph"]), frozenset(), data["model"])
            edges = data["edges"]
        except (ValueError, TypeError, KeyError):
            raise InvalidArgumentError("this is no circuit", expected=f"JSON of the format {FORMAT!r}") from None
        return empty.with_edges(edges)

    def save(self, path: str | Path) -> None:
        """Writes the circuit to a JSON file."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Returns the circuit of a file that `save` wrote."""
        return cls.from_json(path_of(path).read_text())


def _checked(graph: ComputationalGraph, n_edges: int) -> int:
    """Returns a number of edges that a graph has."""
    check_counts(0, n_edges=n_edges)
    if n_edges > graph.n_edges:
        raise InvalidArgumentError(f"no circuit has {n_edges} edges", expected=f"0 to {graph.n_edges}")
    return n_edges


# --- drawings --------------------------------------------------------------------------------------------------------

COLUMN, ROW = 74, 58
"""Pixels between the centres of neighbouring heads, and of rows."""
COLORS: Mapping[Kind, str] = {
    "q": SERIES[3],
    "k": SERIES[1],
    "v": SERIES[0],
    "mlp": SERIES[4],
    "mixer": SERIES[5],
    "logits": SERIES[2],
}
MEANING: Mapping[Kind, str] = {
    "q": "queries",
    "k": "keys",
    "v": "values",
    "mlp": "MLPs",
    "mixer": "mixers",
    "logits": "logits",
}


def _network(edges: Sequence[Edge], effects: Mapping[Edge, float] | None = None) -> Network:
    """Returns the drawing of edges and of the parts that they join. Arguments are those of `Circuit.plot`."""
    if effects is not None and not (isinstance(effects, Mapping) and set(edges) <= effects.keys()):
        raise InvalidArgumentError(f"effects={effects!r}"[:80], expected="a number for each edge, or None")
    weights = dict.fromkeys(edges, 1.0) if effects is None else {edge: effects[edge] for edge in edges}
    most = 5.0 if effects is None else max(map(abs, weights.values()), default=0.0) or 1.0
    links = [
        Link(
            edge.sender.name,
            _box_of(edge.receiver).name,
            abs(weights[edge]) / most,
            COLORS[edge.receiver.kind],
            edge.name if effects is None else f"{edge.name}: {weights[edge]:z.3f}",
            weights[edge] < 0,
        )
        for edge in sorted(edges, key=lambda edge: -abs(weights[edge]))
    ]
    shown = dict.fromkeys(edge.receiver.kind for edge in edges)
    legend = {MEANING[kind]: color for kind, color in COLORS.items() if kind in shown}
    parts = {part for edge in edges for part in (edge.sender, _box_of(edge.receiver))}
    return Network(_placed(parts), [*_shared(parts), *links], legend)


def _box_of(receiver: Node) -> Node:
    """Returns the part that a receiver is drawn at: the head, where it is one head's own."""
    is_own = receiver.kind in ("q", "k", "v") and len(receiver.heads) == 1
    return Node("head", receiver.layer, receiver.heads, receiver.part) if is_own else receiver


def _shared(parts: set[Node]) -> Iterator[Link]:
    """Yields dotted links from shared keys and values to heads."""
    for part in sorted(parts, key=lambda part: part.name):
        heads = [Node("head", part.layer, (head,), part.part) for head in part.heads if part.kind in ("k", "v")]
        yield from (Link(part.name, head.name, None) for head in heads if head in parts)


def _placed(parts: set[Node]) -> dict[str, Box]:
    """Returns a box for each part: a column for each head that occurs, and rows for what occurs in a layer."""
    numbers = sorted({head for part in parts if part.kind == "head" for head in part.heads})
    columns = {head: (number + 0.5) * COLUMN for number, head in enumerate(numbers)}
    right = max(len(numbers), 2) * COLUMN
    boxes, height = {"embed": Box("embed", right / 2, ROW / 2, 60)}, ROW * 0.5
    for layer in sorted({part.layer for part in parts if part.layer is not None}):
        here = [part for part in parts if part.layer == layer]
        for row in (("k", "v"), ("head",), ("mixer",), ("mlp",)):
            found = sorted(
                (part for part in here if part.kind in row), key=lambda part: (part.part, part.heads, part.kind)
            )
            is_with_heads = row == ("mlp",) and any(part.kind == "head" for part in here)
            height += ROW * (0.8 if is_with_heads else 1) if found else 0
            for number, part in enumerate(found):
                if number and part.part != found[number - 1].part:
                    height += ROW
                boxes[part.name] = _box(part, columns, right, height)
    boxes["logits"] = Box("logits", right / 2, height + ROW, 60)
    return boxes


def _box(part: Node, columns: Mapping[int, float], right: float, y: float) -> Box:
    match part.kind:
        case "mlp" | "mixer":
            noun = part.part or {"mlp": "MLP"}.get(part.kind, part.kind)
            return Box(f"{noun} {part.layer}", right + COLUMN / 2, y, 60)
        case "head":
            return Box(part.name, columns[part.heads[0]], y)
    own = [columns[head] for head in part.heads if head in columns] or [right / 2]
    middle = sum(own) / len(own)
    return Box(f"L{part.layer} {MEANING[part.kind]}", middle + (-50 if part.kind == "k" else 50), y, 86)
