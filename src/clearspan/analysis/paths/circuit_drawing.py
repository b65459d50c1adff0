"""A circuit as a drawing: layers from the bottom to the top, heads from left to right, MLPs at the right."""

from collections.abc import Iterator, Mapping, Sequence

from clearspan.plots.charts import SERIES
from clearspan.plots.network import Box, Link, Network

from .graph import Edge, Kind, Node

COLUMN, ROW = 74, 58
"""Pixels between the centres of heads next to each other, and of what lies above each other."""
COLORS: Mapping[Kind, str] = {"q": SERIES[3], "k": SERIES[1], "v": SERIES[0], "mlp": SERIES[4], "logits": SERIES[2]}
MEANING: Mapping[Kind, str] = {"q": "queries", "k": "keys", "v": "values", "mlp": "MLPs", "logits": "logits"}


def circuit_network(edges: Sequence[Edge], effects: Mapping[Edge, float] | None = None) -> Network:
    """Returns the drawing of a circuit: of its edges, and of the parts that they join.

    Colours say what reads an edge. Keys and values that several heads share have boxes of their own, from which dotted
    lines go to the heads that are in the circuit. Dashed edges have an effect below 0.

    Args:
        edges: Each is the wider the larger its effect is.
        effects: Of the edges, or None for edges of one width.
    """
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
    return Node("head", receiver.layer, receiver.heads) if is_own else receiver


def _shared(parts: set[Node]) -> Iterator[Link]:
    """Yields dotted links from shared keys and values to heads."""
    for part in sorted(parts, key=lambda part: part.name):
        heads = [Node("head", part.layer, (head,)) for head in part.heads if part.kind in ("k", "v")]
        yield from (Link(part.name, head.name, None) for head in heads if head in parts)


def _placed(parts: set[Node]) -> dict[str, Box]:
    """Returns a box for each part: a column for each head that occurs, and rows for what occurs in a layer."""
    numbers = sorted({head for part in parts if part.kind == "head" for head in part.heads})
    columns = {head: (number + 0.5) * COLUMN for number, head in enumerate(numbers)}
    right = max(len(numbers), 2) * COLUMN
    boxes, height = {"embed": Box("embed", right / 2, ROW / 2, 60)}, ROW * 0.5
    for layer in sorted({part.layer for part in parts if part.layer is not None}):
        here = [part for part in parts if part.layer == layer]
        for row in (("k", "v"), ("head",), ("mlp",)):
            found = sorted((part for part in here if part.kind in row), key=lambda part: (part.heads, part.kind))
            is_beside = row == ("mlp",) and any(part.kind == "head" for part in here)
            height += ROW * (0.8 if is_beside else 1) if found else 0
            for part in found:
                boxes[part.name] = _box(part, columns, right, height)
    boxes["logits"] = Box("logits", right / 2, height + ROW, 60)
    return boxes


def _box(part: Node, columns: Mapping[int, float], right: float, y: float) -> Box:
    match part.kind:
        case "mlp":
            return Box(f"MLP {part.layer}", right + COLUMN / 2, y, 60)
        case "head":
            return Box(part.name, columns[part.heads[0]], y)
    own = [columns[head] for head in part.heads if head in columns] or [right / 2]
    middle = sum(own) / len(own)
    return Box(f"L{part.layer} {MEANING[part.kind]}", middle + (-50 if part.kind == "k" else 50), y, 86)
