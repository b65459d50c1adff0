"""The computational graph of a model's residual stream: what writes to it, what reads it, and the edges between."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import torch
from jaxtyping import Bool
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.checks import check_kind
from clearspan.errors import InvalidArgumentError
from clearspan.model import check_bridge
from clearspan.points import nearest

Kind = Literal["embed", "head", "q", "k", "v", "mlp", "logits"]


@dataclass(frozen=True)
class Node:
    """A part of the model that writes to the residual stream (a sender), or an input that reads it (a receiver).

    Names: `embed`, `L3H5`, `L3.mlp`, `logits`; `L3H5.q`, `L3H5.k`, `L3H5.v` for what a head's projections read, and
    `L3H0-3.k`, `L3H0-3.v` where heads 0 to 3 share keys and values.

    Attributes:
        kind: `embed` (all that enters the first block), a `head`, an `mlp`; the input of a query (`q`), key (`k`) or
            value (`v`) projection; `logits`, the last residual stream. An `mlp` is sender and receiver.
        layer: The layer; None for `embed` and `logits`.
        heads: The head; all heads that share a key or value.
    """

    kind: Kind
    layer: int | None = None
    heads: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Its name, unique in a model."""
        match self.kind:
            case "embed" | "logits":
                return self.kind
            case "mlp":
                return f"L{self.layer}.mlp"
        heads = f"{self.heads[0]}" if len(self.heads) == 1 else f"{self.heads[0]}-{self.heads[-1]}"
        return f"L{self.layer}H{heads}" if self.kind == "head" else f"L{self.layer}H{heads}.{self.kind}"

    @property
    def place(self) -> int | None:
        """Its index on the head axis of its hook point, which counts key/value heads for keys and values; or None."""
        return self.heads[0] // len(self.heads) if self.heads else None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Edge:
    """What one part writes, as one input reads it.

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
    """Senders and receivers of a model, in the order of the forward. Each sender has an edge to all later receivers.

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
            InvalidArgumentError: The model's residual stream is no sum of what its parts write, or its keys and values
                have no inputs of their own.
        """
        _check(bridge)
        cfg = bridge.cfg
        return cls(cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads or cfg.n_heads, bridge.blocks[0].is_parallel)

    @cached_property
    def senders(self) -> tuple[Node, ...]:
        """`embed`, then each layer's heads and MLP."""
        heads = [[Node("head", layer, (head,)) for head in range(self.n_heads)] for layer in range(self.n_layers)]
        return (Node("embed"), *(node for layer, own in enumerate(heads) for node in (*own, Node("mlp", layer))))

    @cached_property
    def receivers(self) -> tuple[Node, ...]:
        """Each layer's query, key and value inputs and its MLP, then `logits`."""
        by_layer = [(*self.attention_inputs(layer), Node("mlp", layer)) for layer in range(self.n_layers)]
        return (*(node for nodes in by_layer for node in nodes), Node("logits"))

    def attention_inputs(self, layer: int) -> Iterator[Node]:
        """Yields the inputs of a layer's queries, then keys, then values."""
        yield from (Node("q", layer, (head,)) for head in range(self.n_heads))
        size = self.n_heads // self.n_kv_heads
        groups = [tuple(range(first, first + size)) for first in range(0, self.n_heads, size)]
        yield from (Node("k", layer, heads) for heads in groups)
        yield from (Node("v", layer, heads) for heads in groups)

    def inputs_of(self, node: Node) -> tuple[Node, ...]:
        """Returns the receivers through which a part reads the stream: three for a head, itself for an MLP."""
        check_kind(Node, node=node)
        match node.kind:
            case "head":
                assert node.layer is not None, "a head is in a layer"
                return tuple(one for one in self.attention_inputs(node.layer) if node.heads[0] in one.heads)
            case "embed":
                return ()
        return (node,)

    def n_senders_before(self, receiver: Node) -> int:
        """Returns how many senders, in their order, come before a receiver: those with an edge to it."""
        check_kind(Node, receiver=receiver)
        per_layer = self.n_heads + 1
        if receiver.kind == "logits":
            return 1 + self.n_layers * per_layer
        assert receiver.layer is not None, "it is in a layer"
        sees_own_attention = receiver.kind == "mlp" and not self.is_parallel
        return 1 + receiver.layer * per_layer + sees_own_attention * self.n_heads

    @property
    def mask(self) -> Bool[Tensor, "sender receiver"]:
        """Which pairs are edges."""
        counts = torch.tensor([self.n_senders_before(receiver) for receiver in self.receivers])
        return torch.arange(len(self.senders))[:, None] < counts

    @property
    def n_edges(self) -> int:
        """How many edges the graph has."""
        return sum(map(self.n_senders_before, self.receivers))

    def edges(self) -> Iterator[Edge]:
        """Yields all edges, receiver by receiver."""
        for receiver in self.receivers:
            yield from (Edge(sender, receiver) for sender in self.senders[: self.n_senders_before(receiver)])

    # --- by name -----------------------------------------------------------------------------------------------------

    def node(self, name: str) -> Node:
        """Returns the node of a name. `L1H2.k` also finds the key that head 2 shares with others.

        Raises:
            InvalidArgumentError: No node has the name.
        """
        if not isinstance(name, str):
            raise InvalidArgumentError(f"there is no node {name!r}", expected="a name, such as 'L0H1'")
        if name in self._by_name:
            return self._by_name[name]
        shared = re.fullmatch(r"L(\d+)H(\d+)\.([kv])", name)
        if shared is not None and int(shared[1]) < self.n_layers:
            for node in self.attention_inputs(int(shared[1])):
                if node.kind == shared[3] and int(shared[2]) in node.heads:
                    return node
        raise InvalidArgumentError(f"there is no node {name!r}", nearest=nearest(name, self._by_name))

    def edge(self, name: str) -> Edge:
        """Returns the edge of a name, `sender->receiver`.

        Raises:
            InvalidArgumentError: The graph has no such edge, such as one from a later part to an earlier one.
        """
        check_kind(str, name=name)
        first, _, second = name.partition("->")
        edge = Edge(self.node(first), self.node(second))
        self.index_of(edge)
        return edge

    def parsed(self, edges: Edge | str | Iterable[Edge | str]) -> list[Edge]:
        """Returns edges that are given by themselves or by name, each once.

        Raises:
            InvalidArgumentError: The graph lacks one of them, or something else is given.
        """
        if isinstance(edges, Edge | str):
            edges = [edges]
        if not isinstance(edges, Iterable):
            raise InvalidArgumentError("edges are given as a list", expected="['L0H1->logits', ...]", got=repr(edges))
        found = []
        for edge in edges:
            if not isinstance(edge, Edge | str):
                raise InvalidArgumentError("an edge is given by its name", expected="'L0H1->logits'", got=repr(edge))
            found.append(self.edge(edge) if isinstance(edge, str) else edge)
            self.index_of(found[-1])
        return list(dict.fromkeys(found))

    def index_of(self, edge: Edge) -> tuple[int, int]:
        """Returns the indices of an edge's sender and receiver.

        Raises:
            InvalidArgumentError: It is no edge of this graph.
        """
        check_kind(Edge, edge=edge)
        sender, receiver = self._sender_indices.get(edge.sender), self._receiver_indices.get(edge.receiver)
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
    def _sender_indices(self) -> dict[Node, int]:
        return {node: place for place, node in enumerate(self.senders)}

    @cached_property
    def _receiver_indices(self) -> dict[Node, int]:
        return {node: place for place, node in enumerate(self.receivers)}

    # --- hook points -------------------------------------------------------------------------------------------------

    def input_of(self, receiver: Node) -> str:
        """Returns the hook point at which a receiver, and nothing else, reads the residual stream.

        Raises:
            InvalidArgumentError: It is no receiver.
        """
        match receiver.kind:
            case "logits":
                return f"blocks.{self.n_layers - 1}.hook_resid_post"
            case "mlp":
                return f"blocks.{receiver.layer}.hook_mlp_in"
            case "q" | "k" | "v":
                return f"blocks.{receiver.layer}.hook_{receiver.kind}_input"
        raise InvalidArgumentError(f"{receiver} reads nothing by itself", expected="a receiver", got=receiver.kind)

    def stream_of(self, receiver: Node) -> str:
        """Returns the hook point of the stream that a receiver reads, without an axis of heads."""
        return (
            f"blocks.{receiver.layer}.hook_resid_pre" if receiver.kind in ("q", "k", "v") else self.input_of(receiver)
        )

    def heads_at(self, point: str) -> int | None:
        """Returns the size of the head axis of a receiver's hook point, or None where it has none."""
        leaf = point.rpartition(".")[2]
        return {"hook_q_input": self.n_heads, "hook_k_input": self.n_kv_heads, "hook_v_input": self.n_kv_heads}.get(
            leaf
        )


def _check(bridge: TransformerBridge) -> None:
    check_bridge(bridge)
    block = bridge.blocks[0]
    if any(one.attn.changes_z for one in bridge.blocks):
        raise InvalidArgumentError(
            "edges are not known on this model",
            where=bridge.cfg.architecture,
            reason="a gate or norm lies between z and what heads write",
            fix="cache.stack_head_results() for what heads write",
        )
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
