"""The computational graph of a model's residual stream: what writes to it, what reads it, and the edges between."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import torch
from jaxtyping import Bool
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.points import nearest

Kind = Literal["embed", "head", "q", "k", "v", "mlp", "logits"]


@dataclass(frozen=True)
class Node:
    """A part of the model that writes to the residual stream (a sender), or an input that reads it (a receiver).

    Names: `embed`, `L3H5`, `L3.mlp`, `logits`; for what a head's projections read `L3H5.q`, `L3H5.k`, `L3H5.v`, and
    where heads 0 to 3 share keys and values `L3H0-3.k`, `L3H0-3.v`.

    Attributes:
        kind: `embed` (all that enters the first block), a `head`, an `mlp`; the input of a query (`q`), key (`k`) or
            value (`v`) projection; `logits`, the last residual stream. An `mlp` is sender and receiver.
        layer: The layer, of all but `embed` and `logits`.
        heads: The head; those that share it, for a key or value.
    """

    kind: Kind
    layer: int | None = None
    heads: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Its name, which no other node of a model has."""
        match self.kind:
            case "embed" | "logits":
                return self.kind
            case "mlp":
                return f"L{self.layer}.mlp"
        heads = f"{self.heads[0]}" if len(self.heads) == 1 else f"{self.heads[0]}-{self.heads[-1]}"
        return f"L{self.layer}H{heads}" if self.kind == "head" else f"L{self.layer}H{heads}.{self.kind}"

    @property
    def place(self) -> int | None:
        """Where it is on the axis of heads of its hook point; None where that has no such axis.

        For keys and values that axis counts key/value heads.
        """
        return self.heads[0] // len(self.heads) if self.heads else None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Edge:
    """What one part writes, as read by one input.

    Attributes:
        sender: `embed`, a head or an MLP.
        receiver: An input of a later head or MLP, or `logits`.
    """

    sender: Node
    receiver: Node

    @property
    def name(self) -> str:
        """`sender->receiver`."""
        return f"{self.sender}->{self.receiver}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ComputationalGraph:
    """Senders and receivers of a model, in the order of the forward. There is an edge wherever a sender comes first.

    Attributes:
        n_layers: Blocks.
        n_heads: Query heads of each.
        n_kv_heads: Key and value heads of each.
        is_parallel: Whether attention and MLP of a block read the same stream, so that neither sees the other.

    Example:
        >>> import clearspan
        >>> graph = ComputationalGraph.of(clearspan.boot("tiny-bigcode"))
        >>> len(graph.senders), len(graph.receivers), graph.n_edges
        (46, 56, 1131)
        >>> graph.node("L1H0-7.k"), graph.edge("L0H3->L1H0-7.k").sender.heads
        (Node(kind='k', layer=1, heads=(0, 1, 2, 3, 4, 5, 6, 7)), (3,))
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    is_parallel: bool = False

    @classmethod
    def of(cls, bridge: TransformerBridge) -> Self:
        """Returns the graph of a model.

        Raises:
            InvalidArgumentError: Its residual stream is no sum of what the parts write, or its keys and values have no
                inputs of their own.
        """
        _check(bridge)
        cfg = bridge.cfg
        return cls(cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads or cfg.n_heads, bridge.blocks[0].is_parallel)

    @cached_property
    def senders(self) -> tuple[Node, ...]:
        """`embed`, then each layer's heads and MLP."""
        return (Node("embed"), *(node for layer in range(self.n_layers) for node in self.writing(layer)))

    @cached_property
    def receivers(self) -> tuple[Node, ...]:
        """Each layer's query, key and value inputs and MLP input, then `logits`."""
        return (*(node for layer in range(self.n_layers) for node in self.reading(layer)), Node("logits"))

    def writing(self, layer: int) -> Iterator[Node]:
        """Yields the senders of a layer."""
        yield from (Node("head", layer, (head,)) for head in range(self.n_heads))
        yield Node("mlp", layer)

    def reading(self, layer: int) -> Iterator[Node]:
        """Yields the receivers of a layer."""
        yield from self.attention_inputs(layer)
        yield Node("mlp", layer)

    def attention_inputs(self, layer: int) -> Iterator[Node]:
        """Yields the inputs of a layer's queries, then keys, then values."""
        yield from (Node("q", layer, (head,)) for head in range(self.n_heads))
        size = self.n_heads // self.n_kv_heads
        groups = [tuple(range(first, first + size)) for first in range(0, self.n_heads, size)]
        yield from (Node("k", layer, heads) for heads in groups)
        yield from (Node("v", layer, heads) for heads in groups)

    def inputs_of(self, node: Node) -> tuple[Node, ...]:
        """Returns the receivers through which a part reads the stream: three for a head, itself for an MLP."""
        match node.kind:
            case "head":
                assert node.layer is not None, "a head is in a layer"
                return tuple(one for one in self.attention_inputs(node.layer) if node.heads[0] in one.heads)
            case "embed":
                return ()
        return (node,)

    def n_senders_before(self, receiver: Node) -> int:
        """Returns how many senders, in their order, come before a receiver: those that it has edges from."""
        per_layer = self.n_heads + 1
        if receiver.kind == "logits":
            return 1 + self.n_layers * per_layer
        assert receiver.layer is not None, "it is in a layer"
        sees_own_attention = receiver.kind == "mlp" and not self.is_parallel
        return 1 + receiver.layer * per_layer + sees_own_attention * self.n_heads

    @property
    def mask(self) -> Bool[Tensor, "sender receiver"]:
        """Where there is an edge."""
        counts = torch.tensor([self.n_senders_before(receiver) for receiver in self.receivers])
        return torch.arange(len(self.senders))[:, None] < counts

    @property
    def n_edges(self) -> int:
        """How many edges there are."""
        return sum(map(self.n_senders_before, self.receivers))

    def edges(self) -> Iterator[Edge]:
        """Yields all edges, receiver by receiver."""
        for receiver in self.receivers:
            yield from (Edge(sender, receiver) for sender in self.senders[: self.n_senders_before(receiver)])

    def node(self, name: str) -> Node:
        """Returns the node of a name.

        Raises:
            InvalidArgumentError: There is none.
        """
        if name not in self._by_name:
            raise InvalidArgumentError(f"there is no node {name!r}", nearest=nearest(name, self._by_name))
        return self._by_name[name]

    def edge(self, name: str) -> Edge:
        """Returns the edge of a name, `sender->receiver`.

        Raises:
            InvalidArgumentError: There is none, such as from a later part to an earlier one.
        """
        first, _, second = name.partition("->")
        edge = Edge(self.node(first), self.node(second))
        self.index_of(edge)
        return edge

    def parsed(self, edges: Iterable[Edge | str]) -> list[Edge]:
        """Returns edges, of which some are given by name.

        Raises:
            InvalidArgumentError: One of them is none of this graph's.
        """
        found = [self.edge(edge) if isinstance(edge, str) else edge for edge in edges]
        for edge in found:
            self.index_of(edge)
        return found

    def index_of(self, edge: Edge) -> tuple[int, int]:
        """Returns where an edge's sender and receiver are among all.

        Raises:
            InvalidArgumentError: It is no edge of this graph.
        """
        sender, receiver = self._sender_places.get(edge.sender), self._receiver_places.get(edge.receiver)
        if sender is None or receiver is None or sender >= self.n_senders_before(edge.receiver):
            raise InvalidArgumentError(
                f"there is no edge {edge.name!r}",
                expected="a sender, and a receiver that comes after it",
                reason="attention and MLP of a block read the same stream" if self.is_parallel else None,
            )
        return sender, receiver

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {node.name: node for node in (*self.senders, *self.receivers)}

    @cached_property
    def _sender_places(self) -> dict[Node, int]:
        return {node: place for place, node in enumerate(self.senders)}

    @cached_property
    def _receiver_places(self) -> dict[Node, int]:
        return {node: place for place, node in enumerate(self.receivers)}


def _check(bridge: TransformerBridge) -> None:
    block = bridge.blocks[0]
    if block.norms_the_sum or block.residual_is_normed:
        raise InvalidArgumentError(
            "the residual stream of this model is not the sum of what its parts write",
            where=bridge.cfg.architecture,
            reason="it is normed between the sublayers, so that no edge carries one part's own contribution",
            fix="attribution_patch, which needs no such sum",
        )
    for name in ("hook_q_input", "hook_k_input", "hook_v_input"):
        if f"blocks.0.{name}" not in bridge.hook_dict:
            raise InvalidArgumentError(
                f"the graph of this model has no receiver at {name}",
                where=bridge.cfg.architecture,
                reason=bridge.why_absent(f"blocks.0.{name}"),
                fix="attribution_patch, which needs no inputs by head",
            )
