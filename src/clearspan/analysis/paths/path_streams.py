"""What readers of the residual stream read where one part writes something else and the rest is frozen."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.points import Address, HookFunction, HookPoint

from .edge_patching import stream_of
from .graph import ComputationalGraph, Node

Freeze = Literal["all", "attention"]
Stream = Float[Tensor, "row pos d_model"]
AT_A_TIME = 64
"""Senders of one layer that run as the rows of one batch."""


@dataclass(frozen=True)
class Sender:
    """A part that writes to the residual stream.

    Attributes:
        node: `embed`, a head or an MLP.
        neuron: The neuron, where it is one of the MLP's.
    """

    node: Node
    neuron: int | None = None

    @property
    def name(self) -> str:
        """Its name, such as `L3H5` or `L3N100`."""
        return self.node.name if self.neuron is None else f"L{self.node.layer}N{self.neuron}"

    @property
    def layer(self) -> int:
        """Its layer; -1 for the embeddings."""
        return -1 if self.node.layer is None else self.node.layer

    @property
    def writes(self) -> str:
        """The hook point of what its sublayer adds to the stream."""
        if self.node.kind == "embed":
            return "blocks.0.hook_resid_pre"
        return f"blocks.{self.layer}.hook_{'attn' if self.node.kind == 'head' else 'mlp'}_out"

    @property
    def point(self) -> str:
        """The hook point of which it is a part, or all."""
        if self.node.kind == "head":
            return f"blocks.{self.layer}.attn.hook_z"
        return self.writes if self.neuron is None else f"blocks.{self.layer}.mlp.hook_post"

    @property
    def at(self) -> slice | int:
        """Where it is on the third axis of that point."""
        part = self.neuron if self.node.kind != "head" else self.node.place
        return slice(None) if part is None else part


def sender_named(graph: ComputationalGraph, bridge: TransformerBridge, name: str | Node) -> Sender:
    """Returns the sender of a name: a node that writes to the stream, or a neuron `L3N100`.

    Raises:
        InvalidArgumentError: There is none.
    """
    neuron = re.fullmatch(r"L(\d+)N(\d+)", name) if isinstance(name, str) else None
    if neuron is not None:
        layer, number = map(int, neuron.groups())
        size = bridge.index.find(f"blocks.{layer}.mlp.hook_post").sizes["d_mlp"]
        if number >= size:
            raise InvalidArgumentError(f"there is no neuron {name!r}", expected=f"L{layer}N0 to L{layer}N{size - 1}")
        return Sender(graph.node(f"L{layer}.mlp"), number)
    node = name if isinstance(name, Node) else graph.node(name)
    if node not in graph.senders:
        raise InvalidArgumentError(
            f"{node.name!r} writes nothing to the residual stream", expected="embed, L0H0, L0.mlp"
        )
    return Sender(node)


class CarriedStreams(Mapping[str, Tensor]):
    """Streams by hook point's name; inputs by head show the stream once for each head, without a copy.

    Args:
        streams: By the names of `stream_of`.
        change: What is added to each, or None.
        sizes: Heads of `hook_q_input`, `hook_k_input` and `hook_v_input`.
    """

    def __init__(self, streams: Mapping[str, Stream], change: Stream | None, sizes: Mapping[str, int]) -> None:
        self._streams = streams
        self._change = change
        self._sizes = sizes

    def __getitem__(self, name: str) -> Tensor:
        """Returns what the point shows."""
        path, _, leaf = name.rpartition(".")
        by_head = leaf in self._sizes
        stream = self._streams[f"{path}.hook_resid_pre" if by_head else name]
        stream = stream if self._change is None else stream + self._change
        return stream[:, :, None].expand(-1, -1, self._sizes[leaf], -1) if by_head else stream

    def __iter__(self) -> Iterator[str]:
        return iter(self._streams)

    def __len__(self) -> int:
        return len(self._streams)


@torch.no_grad()
def carried_streams(
    bridge: TransformerBridge,
    tokens: Int[Tensor, "row pos"],
    source: Int[Tensor, "row pos"],
    mask: Int[Tensor, "row pos"] | None,
    senders: Sequence[Sender],
    receivers: Sequence[Node],
    freeze: Freeze,
) -> dict[str, CarriedStreams]:
    """Returns, for each sender by name, the streams that receivers read where it writes as in the source run.

    Args:
        bridge: The model.
        tokens: The run that is changed.
        source: The run that senders' values come from.
        mask: Padding mask of both.
        senders: The parts that write.
        receivers: The inputs that read.
        freeze: What stays as it was, between a sender and a receiver.
    """
    if freeze not in ("all", "attention"):
        raise InvalidArgumentError(f"unknown freeze={freeze!r}", expected="'all' or 'attention'")
    n_layers = bridge.cfg.n_layers
    names = {stream_of(bridge, node) for node in receivers}
    layers = {sender.layer for sender in senders}
    first = [f"blocks.{max(layer, 0)}.hook_resid_pre" for layer in layers]
    outs = [f"blocks.{layer}.hook_attn_out" for layer in range(n_layers)] if freeze == "attention" else []
    kept = {*names, *first, *outs, *(sender.writes for sender in senders)}
    _, base = bridge.run_with_cache(tokens, names_filter=sorted(kept), attention_mask=mask)
    wanted = {sender.point for sender in senders}
    _, other = bridge.run_with_cache(source, names_filter=sorted(wanted), attention_mask=mask)
    heads = {f"hook_{kind}_input": _heads(bridge, f"hook_{kind}_input") for kind in "qkv"}
    runs = _Runs(bridge, base, other, mask, sorted(names))
    found = {}
    for _, group in groupby(
        sorted(senders, key=lambda one: (one.layer, one.writes)), key=lambda one: (one.layer, one.writes)
    ):
        alike = list(group)
        for start in range(0, len(alike), AT_A_TIME):
            some = alike[start : start + AT_A_TIME]
            for sender, streams, change in runs.direct(some) if freeze == "all" else runs.through_mlps(some):
                found[sender.name] = CarriedStreams(streams, change, heads)
    return found


Carried = tuple[Sender, Mapping[str, Stream], Stream | None]
"""A sender, the streams that are read, and what is added to each of them."""


@dataclass(frozen=True)
class _Runs:
    """Runs of the changed input in which senders of one layer each write what they do in the other run.

    Attributes:
        bridge: The model.
        base: The cache of the run that is changed.
        other: That of the source run.
        mask: Padding mask.
        names: The streams that are read.
    """

    bridge: TransformerBridge
    base: Mapping[str, Tensor]
    other: Mapping[str, Tensor]
    mask: Int[Tensor, "row pos"] | None
    names: Sequence[str]

    def direct(self, senders: Sequence[Sender]) -> Iterator[Carried]:
        """Yields the streams with all other parts frozen: the run's own, and the change of what the sender adds."""
        whole = senders[0].point == senders[0].writes
        if whole:
            for sender in senders:
                yield sender, self.base, self.other[sender.point] - self.base[sender.writes]
            return
        (written,) = self._run(senders, [senders[0].writes], stop=senders[0].layer + 1)
        for sender, own in zip(senders, written.unflatten(0, (len(senders), -1)), strict=True):
            yield sender, self.base, own - self.base[sender.writes]

    def through_mlps(self, senders: Sequence[Sender]) -> Iterator[Carried]:
        """Yields the streams with the attention of later layers frozen, MLPs being computed."""
        layer = senders[0].layer
        later = [name for name in self.names if _depth(name) >= layer]
        frozen = [
            (f"blocks.{after}.hook_attn_out", self._frozen) for after in range(layer + 1, self.bridge.cfg.n_layers)
        ]
        streams = self._run(senders, later, stop=None, hooks=frozen)
        by_sender = [stream.unflatten(0, (len(senders), -1)) for stream in streams]
        for number, sender in enumerate(senders):
            carried = {name: stream[number] for name, stream in zip(later, by_sender, strict=True)}
            yield sender, {**self.base, **carried}, None

    def _frozen(self, value: Tensor, hook: HookPoint) -> Tensor:
        before = self.base[hook.name]
        return before.repeat(len(value) // len(before), 1, 1)

    def _run(
        self,
        senders: Sequence[Sender],
        names: Sequence[str],
        *,
        stop: int | None,
        hooks: Sequence[tuple[str, HookFunction]] = (),
    ) -> list[Tensor]:
        """Returns the values at hook points of a run from the senders' layer on, with one copy of the rows for each."""
        start, copies = max(senders[0].layer, 0), len(senders)
        residual = self.base[f"blocks.{start}.hook_resid_pre"].repeat(copies, 1, 1)
        rows, kept = len(residual) // copies, {}

        def write(value: Tensor, hook: HookPoint) -> None:  # noqa: ARG001
            for number, sender in enumerate(senders):
                at = slice(number * rows, (number + 1) * rows)
                value[at, :, sender.at] = self.other[sender.point][:, :, sender.at].to(value)

        def keep(value: Tensor, hook: HookPoint) -> None:
            kept[hook.name] = value

        self.bridge.run_with_hooks(
            residual,
            fwd_hooks=[(senders[0].point, write), *hooks, *((name, keep) for name in names)],
            start_at_layer=start,
            stop_at_layer=stop,
            attention_mask=None if self.mask is None else self.mask.repeat(copies, 1),
            return_type=None if stop is None else "logits",
        )
        return [kept[name] for name in names]


def _heads(bridge: TransformerBridge, leaf: str) -> int:
    point = bridge.index.find(f"blocks.0.{leaf}")
    return next(point.sizes[axis] for axis in point.axes if axis in ("head", "kv_head"))


def _depth(name: str) -> int:
    layer = Address.parse(name).layer
    assert layer is not None, "streams are in blocks"
    return layer
