"""The computational graph of a model's residual stream: what writes to it, what reads it, and the edges between."""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, check_flags, check_kind
from clearspan.components import part_kind, projection_input, stream_at
from clearspan.errors import InvalidArgumentError
from clearspan.model import check_bridge
from clearspan.points import nearest
from clearspan.results import Summarised, Summary

Graph = TypeVar("Graph", bound="ComputationalGraph")
Kind = Literal["embed", "head", "q", "k", "v", "mlp", "mixer", "logits"]


@dataclass(frozen=True)
class Node:
    """A part of the model that writes to the residual stream (a sender), or an input that reads it (a receiver).

    Names: `embed`, `L3H5`, `L3.mlp`, `L3.mixer`, `logits`; `L3H5.q`, `L3H5.k`, `L3H5.v` for what a head's projections
    read, and `L3H0-3.k`, `L3H0-3.v` where heads 0 to 3 share keys and values. Of further sublayers in a block:
    `L3.mlp2`, `L3.attn2.H5`, `L3.attn2.H5.q`.

    Attributes:
        kind: `embed` (all that enters the first block), a `head`, an `mlp`, a `mixer`; the input of a query (`q`), key
            (`k`) or value (`v`) projection; `logits`, the last residual stream. An `mlp` or `mixer` is sender and
            receiver.
        layer: The layer; None for `embed` and `logits`.
        heads: The head; all heads that share a key or value.
        part: The sublayer that it is, or is in, where that is not the block's `attn`, `mlp` or `mixer`.
    """

    kind: Kind
    layer: int | None = None
    heads: tuple[int, ...] = ()
    part: str = field(default="", repr=False)

    @property
    def sublayer(self) -> str:
        """Name of the sublayer that it is, or is in; of `embed` and `logits`, their own."""
        return self.part or ("attn" if self.kind in _OF_HEADS else self.kind)

    @property
    def name(self) -> str:
        """Its name, unique in a model."""
        if self.layer is None:
            return self.kind
        if self.kind not in _OF_HEADS:
            return f"L{self.layer}.{self.sublayer}"
        heads = f"{self.heads[0]}" if len(self.heads) == 1 else f"{self.heads[0]}-{self.heads[-1]}"
        around = f"L{self.layer}" + (f".{self.part}." if self.part else "")
        return f"{around}H{heads}" + ("" if self.kind == "head" else f".{self.kind}")

    @property
    def place(self) -> int | None:
        """Its index on the head axis of its hook point, which counts key/value heads for keys and values; or None."""
        return self.heads[0] // len(self.heads) if self.heads else None

    def __str__(self) -> str:
        return self.name


_OF_HEADS = ("head", "q", "k", "v")


@dataclass(frozen=True)
class Wired:
    """A sublayer in a block's wiring.

    Attributes:
        name: Its name.
        reads: The stage whose stream it reads, from 0.
        added: The stage after which it is added.
    """

    name: str
    reads: int
    added: int

    @property
    def kind(self) -> Kind:
        """The kind of its nodes that write."""
        kind = part_kind(self.name)
        return "head" if kind == "attn" else kind

    def node(self, kind: Kind, layer: int, heads: tuple[int, ...] = ()) -> Node:
        """Returns a node of it."""
        usual = Node(kind, layer, heads)
        return usual if usual.sublayer == self.name else Node(kind, layer, heads, self.name)


_USUAL = (Wired("attn", 0, 0), Wired("mlp", 1, 1))
_PARALLEL = (Wired("attn", 0, 0), Wired("mlp", 0, 0))


@dataclass(frozen=True)
class Edge:
    """What one part writes, as one input reads it.

    Attributes:
        sender: `embed`, a head, an MLP or a mixer.
        receiver: An input of a later head, MLP or mixer, or `logits`.
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
class ComputationalGraph(Summarised):
    """Senders and receivers of a model, in the order of the forward. Each sender has an edge to all later receivers.

    Attributes:
        n_layers: Blocks.
        n_heads: Query heads of each; 0 where no layer attends.
        n_kv_heads: Key and value heads of each.
        is_parallel: Whether attention and MLP of a block read the same stream, so that neither sees the other.
        wiring: The sublayers of each block; by default attention and an MLP, as `is_parallel` says.

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
    wiring: tuple[tuple[Wired, ...], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check_counts(n_layers=self.n_layers)
        check_flags(is_parallel=self.is_parallel)
        check_kind(tuple, wiring=self.wiring)
        usual = _PARALLEL if self.is_parallel else _USUAL
        object.__setattr__(self, "wiring", self.wiring or (usual,) * self.n_layers)
        attends = any(own.kind == "head" for block in self.wiring for own in block)
        check_counts(int(attends), n_heads=self.n_heads, n_kv_heads=self.n_kv_heads)
        if attends and self.n_heads % self.n_kv_heads:
            raise InvalidArgumentError(
                f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}",
                expected="n_heads a multiple of n_kv_heads: each key and value head serves as many query heads",
            )

    def _summary(self) -> Summary:
        rows = [
            [name, len(nodes), ", ".join(node.name for node in (*nodes[:3], nodes[-1]))]
            for name, nodes in (("senders", self.senders), ("receivers", self.receivers))
        ]
        return Summary(f"computational graph of {self.n_edges} edges", ["", "count", "the first, and the last"], rows)

    @classmethod
    def of(cls, bridge: TransformerBridge) -> Self:
        """Returns the graph of a model.

        Raises:
            InvalidArgumentError: The model's residual stream is no sum of what its parts write, or its keys and values
                have no inputs of their own.
        """
        check_bridge(bridge)
        known, key = bridge.remembered, ("graph", cls)
        if key in known:
            _check_sum(bridge)  # by factors that the model may have changed since
            return known[key]
        _check(bridge)
        cfg = bridge.adapter.cfg
        wiring = tuple(
            tuple(Wired(own.name, own.stage, own.adds_at) for own in block.sublayers) for block in bridge.blocks
        )
        n_kv_heads = cfg.n_key_value_heads or cfg.n_heads
        found = _same(cls, cfg.n_layers, cfg.n_heads, n_kv_heads, bridge.blocks[0].is_parallel, wiring)
        return known.setdefault(key, found)

    def _added(self, layer: int) -> list[Wired]:
        """Returns the sublayers of a layer in the order in which they are added to the stream."""
        return sorted(self.wiring[layer], key=lambda own: own.added)

    def _writers(self, layer: int, own: Wired) -> tuple[Node, ...]:
        if own.kind == "head":
            return tuple(own.node("head", layer, (head,)) for head in range(self.n_heads))
        return (own.node(own.kind, layer),)

    @cached_property
    def senders(self) -> tuple[Node, ...]:
        """`embed`, then each layer's heads, mixers and MLPs, in the order in which they are added."""
        layers = range(self.n_layers)
        every = (self._writers(layer, own) for layer in layers for own in self._added(layer))
        return (Node("embed"), *(node for nodes in every for node in nodes))

    @cached_property
    def receivers(self) -> tuple[Node, ...]:
        """Each layer's query, key and value inputs, its mixers and MLPs, in the order of the forward; then `logits`."""
        every = (node for layer, block in enumerate(self.wiring) for own in block for node in self._readers(layer, own))
        return (*every, Node("logits"))

    def _readers(self, layer: int, own: Wired) -> tuple[Node, ...]:
        if own.kind == "head":
            return tuple(self.attention_inputs(layer, own.name))
        return (own.node(own.kind, layer),)

    def attention_inputs(self, layer: int, part: str = "attn") -> Iterator[Node]:
        """Yields the inputs of an attention's queries, then keys, then values; nothing where the layer has none.

        Raises:
            InvalidArgumentError: There is no such layer.
        """
        check_counts(0, layer=layer)
        if layer >= self.n_layers:
            raise InvalidArgumentError(f"layer={layer}", expected=f"a whole number, layer < {self.n_layers}")
        for own in self.wiring[layer]:
            if own.name == part:
                yield from (own.node("q", layer, (head,)) for head in range(self.n_heads))
                size = self.n_heads // self.n_kv_heads
                groups = [tuple(range(first, first + size)) for first in range(0, self.n_heads, size)]
                yield from (own.node("k", layer, heads) for heads in groups)
                yield from (own.node("v", layer, heads) for heads in groups)

    def inputs_of(self, node: Node) -> tuple[Node, ...]:
        """Returns the receivers through which a part reads the stream: three for a head, itself for an MLP."""
        check_kind(Node, node=node)
        match node.kind:
            case "head":
                assert node.layer is not None, "a head is in a layer"
                inputs = self.attention_inputs(node.layer, node.sublayer)
                return tuple(one for one in inputs if node.heads[0] in one.heads)
            case "embed":
                return ()
        return (node,)

    def n_senders_before(self, receiver: Node) -> int:
        """Returns how many senders, in their order, come before a receiver: those with an edge to it."""
        check_kind(Node, receiver=receiver)
        if receiver.kind == "logits":
            return len(self.senders)
        return self._before[receiver.layer, receiver.sublayer]

    @cached_property
    def _before(self) -> dict[tuple[int | None, str], int]:
        found, count = {}, 1
        for layer, block in enumerate(self.wiring):
            sizes = {own.name: self.n_heads if own.kind == "head" else 1 for own in block}
            for own in block:
                earlier = sum(sizes[other.name] for other in block if other.added < own.reads)
                found[layer, own.name] = count + earlier
            count += sum(sizes.values())
        return found

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many senders come before each receiver."""
        return tuple(map(self.n_senders_before, self.receivers))

    @property
    def mask(self) -> Bool[Tensor, "sender receiver"]:
        """Which pairs are edges."""
        return torch.arange(len(self.senders))[:, None] < torch.tensor(self.counts)

    @property
    def n_edges(self) -> int:
        """How many edges the graph has."""
        return sum(self.counts)

    @cached_property
    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """The names of senders and receivers, as axes of effects."""
        return {"sender": tuple(map(str, self.senders)), "receiver": tuple(map(str, self.receivers))}

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
        shared = re.fullmatch(r"L(\d+)(?:\.(\w+)\.)?H(\d+)(?:\.([kv]))?", name)
        if shared is not None and int(shared[1]) < self.n_layers:
            for node in self.attention_inputs(int(shared[1]), shared[2] or "attn"):
                if node.kind == shared[4] and int(shared[3]) in node.heads:
                    return node
        with_heads = [layer for layer, block in enumerate(self.wiring) if any(own.kind == "head" for own in block)]
        has_none = shared is not None and int(shared[1]) < self.n_layers and int(shared[1]) not in with_heads
        raise InvalidArgumentError(
            f"there is no node {name!r}",
            expected=f"a head of layer {', '.join(map(str, with_heads)) or 'none'}" if has_none else None,
            nearest=nearest(name, self._by_name),
            reason=f"layer {name[1 : shared.end(1)]} has no attention" if shared and has_none else None,
        )

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
                reason=self._why_side_by_side(edge),
            )
        return sender, receiver

    def _why_side_by_side(self, edge: Edge) -> str | None:
        """Returns that both ends of an edge read the same stream, or None."""
        ends = [edge.sender, edge.receiver]
        if len({end.layer for end in ends}) > 1 or ends[0].layer is None or ends[0].layer >= self.n_layers:
            return None
        stages = {own.name: own.reads for own in self.wiring[ends[0].layer]}
        first, second = (end.sublayer for end in ends)
        if first == second or stages.get(first) != stages.get(second):
            return None
        names = " and ".join({"attn": "attention", "mlp": "MLP"}.get(name, name) for name in (first, second))
        return f"{names} of a block read the same stream"

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
            case "mlp" | "mixer":
                return f"blocks.{receiver.layer}.hook_{receiver.sublayer}_in"
            case "q" | "k" | "v":
                return f"blocks.{receiver.layer}.{projection_input(receiver.sublayer, receiver.kind)}"
        raise InvalidArgumentError(f"{receiver} reads nothing by itself", expected="a receiver", got=receiver.kind)

    def stream_of(self, receiver: Node) -> str:
        """Returns the hook point of the stream that a receiver reads, without an axis of heads."""
        if receiver.kind not in ("q", "k", "v") or receiver.layer is None:
            return self.input_of(receiver)
        stage = next(own.reads for own in self.wiring[receiver.layer] if own.name == receiver.sublayer)
        return f"blocks.{receiver.layer}.{stream_at(stage)}"

    def heads_at(self, point: str) -> int | None:
        """Returns the size of the head axis of a receiver's hook point, or None where it has none."""
        return self._heads_at.get(point)

    @cached_property
    def _heads_at(self) -> dict[str, int]:
        sizes = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}
        return {self.input_of(one): sizes[one.kind] for one in self.receivers if one.kind in sizes}


@functools.lru_cache(maxsize=16)
def _same(kind: type[Graph], *sizes: Any) -> Graph:
    """Returns a graph, which is the same object for the same sizes, so that its nodes are made once."""
    return kind(*sizes)


def graph_of_data(data: Mapping[str, Any]) -> ComputationalGraph:
    """Returns the graph of what `dataclasses.asdict` made of one."""
    wiring = tuple(tuple(Wired(**own) for own in block) for block in data.get("wiring", ()))
    return ComputationalGraph(**{**data, "wiring": wiring})


def places_of(nodes: Sequence[Node], layer: int, part: str) -> slice:
    """Returns which of a graph's senders or receivers are a sublayer's: those of its heads, or itself."""
    places = [place for place, node in enumerate(nodes) if (node.layer, node.sublayer) == (layer, part)]
    return slice(places[0], places[-1] + 1)


def _check(bridge: TransformerBridge) -> None:
    """Raises unless the edges of a model are known."""
    if any(attention.changes_z for attention in bridge.attentions):
        raise InvalidArgumentError(
            "edges are not known on this model",
            where=bridge.cfg.architecture,
            reason="a gate or norm lies between z and what heads write",
            fix="cache.stack_head_results() for what heads write",
        )
    fed = next((f"blocks.{layer}" for layer, block in enumerate(bridge.blocks) if block.fed_by), None)
    if fed is not None:
        raise InvalidArgumentError(
            "edges are not known on this model",
            where=fed,
            reason="parts of the block read the residual stream and add nothing to it: they feed another part",
            fix="attribution_patch, which needs no edges",
        )
    _check_sum(bridge)
    for attention in (sublayer for block in bridge.blocks for sublayer in block.of_kind("attn")):
        for projection in ("q", "k", "v"):
            leaf = projection_input(attention.name, projection)
            if f"{attention.block}.{leaf}" not in bridge.hook_dict:
                raise InvalidArgumentError(
                    f"the graph of this model has no receiver at {leaf}",
                    where=bridge.cfg.architecture,
                    reason=bridge.why_absent(f"{attention.block}.{leaf}"),
                    fix="attribution_patch, which needs no inputs by head",
                )


def _check_sum(bridge: TransformerBridge) -> None:
    """Raises unless the residual stream is the sum of what parts write."""
    if not all(block.is_sum for block in bridge.blocks):
        raise InvalidArgumentError(
            "the residual stream of this model is not the sum of what its parts write",
            where=bridge.cfg.architecture,
            reason="it is normed or multiplied between the sublayers, so that no edge carries one part's contribution",
            fix="attribution_patch, which needs no such sum",
        )
