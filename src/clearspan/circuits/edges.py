"""Edges and paths patched exactly: receivers read what senders write in another run, and all else as it was.

Both functions have one mechanism. A set of senders writes as in the source run, every other part is frozen to what it
wrote in the base run, and the stream that a receiver reads then is put into the base run, for that receiver alone.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._cache.writes import Mix
from clearspan._forward.readout import exact
from clearspan._run.sources import SourceRun
from clearspan.bridge import TransformerBridge
from clearspan.cache import ActivationCache
from clearspan.circuits.graph import ComputationalGraph, Edge, Node
from clearspan.circuits.runs import copies_at_a_time, listed, swept
from clearspan.components import GeneralAttentionBridge, MLPBridge, Sublayer
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Input
from clearspan.interventions import Intervention, Patch, Scale
from clearspan.modes import no_grad
from clearspan.points import Address, HookFunction, HookPoint
from clearspan.progress import Progress
from clearspan.sweep import Direction, Effects, Grid, Metric, Pair

Freeze = Literal["all", "attention"]
Stream = Float[Tensor, "row pos d_model"]
Receiver = str | Node | Sequence[str | Node]
"""One reader of the residual stream, or several that are changed together."""


def patch_edges(
    bridge: TransformerBridge,
    clean: Input,
    corrupted: Input,
    metric: Metric | Mapping[str, Metric],
    edges: Edge | str | Sequence[Edge | str] | Mapping[str, Edge | str | Sequence[Edge | str]],
    *,
    direction: Direction = "denoising",
    attention_mask: Int[Tensor, "row pos"] | None = None,
    memory: int | None = None,
    progress: bool | Progress = True,
) -> Effects:
    r"""Returns the exact effect of patching edges, one cell for each edge, or for each set of edges.

    A receiver of a cell's edges reads the residual stream of the base run as it would be if the senders of these edges
    wrote what they write in the source run, and all other parts what they do in the base run. Everything is computed
    from there on (direct path patching). Where the model norms attention's output, the norm is computed on the mix of
    the heads that changed and those that did not. So edges from several heads of a layer to one receiver are no sum of
    single edges there. `path_patching(..., freeze="all")` gives the same numbers.

    Args:
        bridge: The model, in evaluation mode.
        clean: Any input.
        corrupted: Another, with as many rows, and as many real tokens in each.
        metric: What is measured of the logits, or several metrics by name; see `clearspan.sweep.Sweep`.
        edges: Edges of `ComputationalGraph.of(bridge)`, or their names; or sets of them by label.
        direction: `"denoising"`: the corrupted run is the base, and gets clean values. `"noising"`: the reverse.
        attention_mask: 1 for real tokens, of an input that is bare token ids with padding.
        memory: Bytes that a batch may take.
        progress: Whether a bar is shown; or a function that is told instead.

    Returns:
        The metric of each cell; `change()` is the effect.

    Raises:
        InvalidArgumentError: No edges, an edge that the graph lacks, or as for `edge_attribution`.

    Example:
        >>> import clearspan
        >>> from clearspan.sweep import LogitDifference
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> metric = LogitDifference.between(bridge, " os", " re")
        >>> edges = ["embed->L0.mlp", "L0H3->L3H1.q"]
        >>> found = patch_edges(bridge, "import os\nimport", "import re\nimport", metric, edges)
        >>> found.mean().shape
        torch.Size([2])

    References:
        Wang et al. (2022), arXiv:2211.00593, section 3.1, and Goldowsky-Dill et al. (2023), arXiv:2304.05969, for path
        patching. The path is one edge here: what lies between sender and receiver is not run again.
    """
    graph = ComputationalGraph.of(bridge)
    pair = Pair.of(bridge, clean, corrupted, metric, direction, attention_mask)
    if isinstance(edges, Mapping):
        cells = {str(label): graph.parsed(chosen) for label, chosen in edges.items()}
    else:
        cells = {edge.name: [edge] for edge in graph.parsed(edges)}
    return patched_edges(pair, graph, cells, memory, progress=progress)


def patched_edges(
    pair: Pair[Any],
    graph: ComputationalGraph,
    cells: Mapping[str, Sequence[Edge]],
    memory: int | None = None,
    *,
    progress: bool | Progress = False,
) -> Effects:
    """Returns the metric with each cell's edges patched. Arguments are those of `patch_edges`, parsed."""
    if not cells or not all(cells.values()):
        raise InvalidArgumentError("edges: there is no edge to patch", expected="one or more, in each cell")
    reads = []
    for edges in cells.values():
        ordered = sorted(edges, key=graph.index_of)
        receivers = dict.fromkeys(edge.receiver for edge in edges)
        reads.append({one: tuple(Sender(edge.sender) for edge in ordered if edge.receiver == one) for one in receivers})
    return _patched(pair, graph, (("edge", tuple(cells)),), reads, "all", memory, progress=progress)


def path_patching(
    bridge: TransformerBridge,
    clean: Input,
    corrupted: Input,
    metric: Metric | Mapping[str, Metric],
    senders: str | Node | Sequence[str | Node],
    receivers: str | Node | Sequence[Receiver],
    *,
    freeze: Freeze = "all",
    direction: Direction = "denoising",
    attention_mask: Int[Tensor, "row pos"] | None = None,
    memory: int | None = None,
    progress: bool | Progress = True,
) -> Effects:
    """Returns the effect of each path from a sender to a receiver, exactly.

    In the base run, the sender writes what it writes in the source run; every other part between it and the receiver is
    frozen to what it wrote; what the receiver then reads is put into the run, whose other readers read what they did,
    and all after the receiver is computed. Where several query heads share one key/value head, what is put in is what
    that one head reads. See `patch_edges` for models that norm attention's output.

    Args:
        bridge: A model whose residual stream is a sum.
        clean: Any input.
        corrupted: Another, with as many rows, and as many real tokens in each.
        metric: What is measured, or several metrics by name; see `clearspan.sweep.Sweep`.
        senders: Names of nodes: `"embed"`, `"L3H5"`, `"L3.mlp"`, and single neurons, `"L3N100"`.
        receivers: Names of nodes, or lists of names that are changed together: `"L4H2.q"`, `"L4H0-7.k"` (the name that
            `ComputationalGraph` has where heads share keys; `"L4H2.k"` finds it too), `"L4.mlp"`, `"logits"`; `"L4H2"`
            for a head's three inputs.
        freeze: `"all"` heads and MLPs between them, which is the direct path; or `"attention"` alone, so that paths
            through MLPs count as the sender's own.
        direction: `"denoising"`: the corrupted run is the base, and gets clean values. `"noising"`: the reverse.
        attention_mask: 1 for real tokens, of an input that is bare token ids with padding.
        memory: Bytes that a batch may take.
        progress: Whether a bar is shown; or a function that is told instead.

    Returns:
        Metrics by sender, receiver and row. A receiver that does not come after the sender leaves the run as it is.

    Raises:
        InvalidArgumentError: No senders or receivers, a node that the graph lacks, inputs that do not lie position on
            position, or a model whose stream is no sum.

    Example:
        >>> import clearspan
        >>> from clearspan.sweep import LogitDifference
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> metric = LogitDifference.between(bridge, " os", " re")
        >>> clean, corrupted = "import os, re, os, re,", "import re, os, re, os,"
        >>> found = path_patching(bridge, clean, corrupted, metric, ["L3H1", "L0.mlp"], ["L4H3.k", "logits"])
        >>> found.change().shape
        torch.Size([2, 2, 1])

    References:
        Wang et al. (2022), "Interpretability in the Wild", arXiv:2211.00593, section 3.1 (there MLPs are not frozen:
        `freeze="attention"`). Goldowsky-Dill et al. (2023), "Localizing Model Behavior with Path Patching",
        arXiv:2304.05969.
    """
    if freeze not in get_args(Freeze):
        raise InvalidArgumentError(f"unknown freeze={freeze!r}", expected="'all' or 'attention'")
    graph = ComputationalGraph.of(bridge)
    pair = Pair.of(bridge, clean, corrupted, metric, direction, attention_mask)
    sent = [_sender_named(graph, bridge, sender) for sender in listed("senders", senders, str, Node)]
    read = [_group(graph, receiver) for receiver in listed("receivers", receivers, str, Node)]
    order = {node: number for number, node in enumerate(graph.senders)}
    reads = [
        {node: (one,) for node in group if order[one.node] < graph.n_senders_before(node)}
        for one in sent
        for group in read
    ]
    axes = (
        ("sender", tuple(one.name for one in sent)),
        ("receiver", tuple("+".join(map(str, group)) for group in read)),
    )
    return _patched(pair, graph, axes, reads, freeze, memory, progress=progress)


# --- senders and receivers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sender:
    """A part that writes to the residual stream.

    Attributes:
        node: `embed`, a head, a mixer or an MLP.
        neuron: The neuron, where it is one of the MLP's.
    """

    node: Node
    neuron: int | None = None

    @property
    def name(self) -> str:
        """Its name, such as `L3H5` or `L3N100`."""
        if self.neuron is None:
            return self.node.name
        around = f"L{self.node.layer}" + (f".{self.node.part}." if self.node.part else "")
        return f"{around}N{self.neuron}"

    @property
    def layer(self) -> int:
        """Its layer; -1 for the embeddings."""
        return -1 if self.node.layer is None else self.node.layer

    @property
    def is_part(self) -> bool:
        """Whether it is a part of a sublayer, a head or a neuron, and not added to the stream as it is."""
        return self.node.kind == "head" or self.neuron is not None

    def within(self, bridge: TransformerBridge) -> Sublayer:
        """Returns the sublayer that it is, or is a part of."""
        return bridge.blocks[self.layer].sublayer(self.node.sublayer)

    @property
    def point(self) -> str:
        """The hook point that shows it."""
        if self.node.kind == "embed":
            return "blocks.0.hook_resid_pre"
        name = self.node.sublayer
        if not self.is_part:
            return f"blocks.{self.layer}.hook_{name}_out"
        return f"blocks.{self.layer}.{name}.{'hook_z' if self.node.kind == 'head' else 'hook_post'}"

    @property
    def at(self) -> slice | int:
        """Its index on the third axis of that point."""
        part = self.node.place if self.node.kind == "head" else self.neuron
        return slice(None) if part is None else part


def _sender_named(graph: ComputationalGraph, bridge: TransformerBridge, name: str | Node) -> Sender:
    """Returns the sender of a name: a node that writes to the stream, or a neuron `L3N100`, `L3.mlp2.N100`."""
    neuron = re.fullmatch(r"(L(\d+)(?:\.(\w+)\.)?)N(\d+)", name) if isinstance(name, str) else None
    if neuron is not None:
        around, layer, part, number = neuron[1], neuron[2], neuron[3] or "mlp", int(neuron[4])
        node = graph.node(f"L{layer}.{part}")
        size = bridge.index.find(f"blocks.{layer}.{part}.hook_post").sizes["d_mlp"]
        if number >= size:
            raise InvalidArgumentError(f"there is no neuron {name!r}", expected=f"{around}N0 to {around}N{size - 1}")
        return Sender(node, number)
    node = name if isinstance(name, Node) else graph.node(name)
    if node not in graph.senders:
        raise InvalidArgumentError(
            f"{node.name!r} writes nothing to the residual stream", expected="embed, L0H0, L0.mlp"
        )
    return Sender(node)


def _group(graph: ComputationalGraph, receiver: Receiver) -> tuple[Node, ...]:
    """Returns the inputs of a receiver, or of several."""
    nodes = [name if isinstance(name, Node) else graph.node(name) for name in listed("receivers", receiver, str, Node)]
    found = tuple(dict.fromkeys(one for node in nodes for one in graph.inputs_of(node)))
    unknown = next((one for one in found if one not in graph.receivers), None)
    if not found or unknown is not None:
        raise InvalidArgumentError(
            f"{receiver!r} reads no residual stream", expected="a head, its q, k or v, an MLP, or 'logits'"
        )
    return found


# --- what senders write ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Writes:
    """What senders write in the base run and in the source run of a pair.

    Attributes:
        base: The run that is changed, with the points of `points_of`.
        source: The run that gives values, with the same.
    """

    base: ActivationCache
    source: ActivationCache
    _changes: dict[Sender, Stream] = field(default_factory=dict)

    @staticmethod
    def points_of(bridge: TransformerBridge, senders: Iterable[Sender]) -> list[str]:
        """Returns the hook points from which the changes of senders are known."""
        found = {}
        for sender in senders:
            found[sender.point] = None
            if sender.is_part:
                found[Mix.entering_point(sender.within(bridge))] = None
        return [name for name in found if name is not None]

    def change(self, senders: Sequence[Sender]) -> Stream:
        """Returns by how much more is on the stream where senders write as in the source run, and no other part does.

        In float32 at least.
        """
        changes = [self._of(sender) for sender in senders if not sender.is_part]
        parts = [sender for sender in senders if sender.is_part]
        for (layer, name), alike in groupby(parts, key=lambda sender: (sender.layer, sender.node.sublayer)):
            mix = Mix.of(self.base, self.base.model.blocks[layer].sublayer(name))
            changes.append(mix.change_(_summed([self._of(one) for one in alike])))
        return _summed(changes)

    def _of(self, sender: Sender) -> Stream:
        """Returns the change of what a sender writes: of a part of a sublayer, in the sublayer's output."""
        if sender not in self._changes:
            self._changes[sender] = self._computed(sender)
        return self._changes[sender]

    def _computed(self, sender: Sender) -> Stream:
        theirs, ours = (exact(cache[sender.point][:, :, sender.at]) for cache in (self.source, self.base))
        change = theirs - ours
        if not sender.is_part:
            return change
        part = self.base.model.blocks[sender.layer].sublayer(sender.node.sublayer).part
        match part:
            case GeneralAttentionBridge():
                return change @ part.W_O.detach()[sender.at].to(change)
            case MLPBridge():
                return change[..., None] * part.W_out.detach()[sender.at].to(change)
            case _:
                raise AssertionError("only attention and MLPs have parts")


def _summed(changes: Sequence[Stream]) -> Stream:
    return torch.stack(list(changes)).sum(0)


# --- what receivers read ---------------------------------------------------------------------------------------------


@no_grad
def _patched(
    pair: Pair[Any],
    graph: ComputationalGraph,
    axes: tuple[tuple[str, tuple[str, ...]], ...],
    reads: Sequence[Mapping[Node, tuple[Sender, ...]]],
    freeze: Freeze,
    memory: int | None,
    *,
    progress: bool | Progress,
) -> Effects:
    """Returns the metric of cells in which receivers read what senders carry to them.

    Args:
        pair: The inputs and the metric.
        graph: The model's graph.
        axes: Of the cells.
        reads: For each cell its receivers, and the senders that come before each of them.
        freeze: What stays as it was between a sender and a receiver.
        memory: Bytes that a batch may take.
        progress: As for `Sweep.run`.
    """
    read_by: dict[tuple[Sender, ...], dict[Node, None]] = {}
    for receiver, senders in (one for cell in reads for one in cell.items()):
        read_by.setdefault(senders, {})[receiver] = None
    wanted = {senders: list(dict.fromkeys(map(graph.stream_of, own))) for senders, own in read_by.items()}
    sources = {}
    for senders, streams in _carried(pair, wanted, freeze, memory) if wanted else ():
        points = {graph.input_of(receiver): streams[graph.stream_of(receiver)] for receiver in read_by[senders]}
        shown = {name: _by_head(graph, name, stream) for name, stream in points.items()}
        sources[_name(senders)] = SourceRun(shown, pair.base)
    nothing = (Intervention("resid_post", Scale(1.0), layer=-1, positions=-1),)
    cells = tuple(
        tuple(
            Intervention(graph.input_of(receiver), Patch(_name(senders)), heads=receiver.place)
            for receiver, senders in cell.items()
        )
        or nothing
        for cell in reads
    )
    return swept(pair, Grid(axes, cells), sources, memory, progress=progress)


def _name(senders: tuple[Sender, ...]) -> str:
    return " + ".join(sender.name for sender in senders)


def _by_head(graph: ComputationalGraph, name: str, stream: Stream) -> Tensor:
    """Returns what a receiver's hook point shows: the stream, or the stream once for each head, without a copy."""
    heads = graph.heads_at(name)
    return stream if heads is None else stream[:, :, None].expand(-1, -1, heads, -1)


def _carried(
    pair: Pair[Any], wanted: Mapping[tuple[Sender, ...], Sequence[str]], freeze: Freeze, memory: int | None
) -> Iterator[tuple[tuple[Sender, ...], Mapping[str, Stream]]]:
    """Yields, for each set of senders, the streams that are wanted, by hook point's name."""
    bridge, every = pair.bridge, list(dict.fromkeys(sender for senders in wanted for sender in senders))
    streams = list(dict.fromkeys(name for names in wanted.values() for name in names))
    layers, points = range(bridge.cfg.n_layers), Writes.points_of(bridge, every)
    frozen = [own.hook_out for own in _mixing(bridge)] if freeze == "attention" else []
    first = [f"blocks.{max(sender.layer, 0)}.hook_resid_pre" for sender in every] if freeze == "attention" else []
    base, source = (
        bridge.run_with_cache(batch, list(dict.fromkeys(names)), stop_at_layer=len(layers))[1]
        for batch, names in ((pair.base, [*streams, *points, *frozen, *first]), (pair.source, points))
    )
    if freeze == "all":
        writes = Writes(base, source)
        for senders, names in wanted.items():
            change = writes.change(senders)
            yield senders, {name: (base[name] + change).to(base[name]) for name in names}
        return
    size = copies_at_a_time(pair, memory, 8 + len(streams) + 3 * (bridge.cfg.d_mlp or 0) // bridge.cfg.d_model)
    every.sort(key=lambda sender: (sender.layer, sender.point))
    for _, alike in groupby(every, key=lambda sender: (sender.layer, sender.point)):
        group = list(alike)
        for start in range(0, len(group), size):
            some = group[start : start + size]
            found = _through_mlps(pair, base, source, some, streams)
            for number, sender in enumerate(some):
                yield (sender,), {name: found[name][number] for name in wanted[sender,]}


def _mixing(bridge: TransformerBridge) -> Iterator[Sublayer]:
    """Yields the sublayers that move information between positions: attentions and mixers."""
    for block in bridge.blocks:
        yield from (sublayer for sublayer in block.sublayers if sublayer.kind != "mlp")


def _through_mlps(
    pair: Pair[Any],
    base: ActivationCache,
    source: ActivationCache,
    senders: Sequence[Sender],
    streams: Sequence[str],
) -> dict[str, Float[Tensor, "sender row pos d_model"]]:
    """Returns the streams where each sender writes as in the source run, with the attention of later layers frozen.

    Args:
        pair: The inputs.
        base: The run that is changed.
        source: The run that gives values.
        senders: Senders that one hook point shows. Each has a copy of the rows.
        streams: Hook points of streams; those that come before the senders are not among the result.
    """
    copies, layer, kept = len(senders), senders[0].layer, {}
    rows, n_layers = pair.base.rows, pair.bridge.cfg.n_layers

    def write(value: Tensor, hook: HookPoint) -> None:
        for number, sender in enumerate(senders):
            at = slice(number * rows, (number + 1) * rows)
            value[at, :, sender.at] = source[hook.name][:, :, sender.at].to(value)

    def freeze(value: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
        return base[hook.name].repeat(copies, 1, 1)

    def keep(value: Tensor, hook: HookPoint) -> None:
        kept[hook.name] = value.unflatten(0, (copies, rows))

    later = [name for name in streams if (Address.parse(name).layer or 0) >= layer]
    own = None if senders[0].node.kind == "embed" else senders[0].within(pair.bridge)
    frozen: list[tuple[str, Callable[..., Tensor]]] = [
        (one.hook_out, freeze)
        for one in _mixing(pair.bridge)
        if one.layer > layer or (own is not None and one.layer == layer and one.stage > own.adds_at)
    ]
    hooks: list[tuple[str, HookFunction]] = [(senders[0].point, write), *frozen, *((name, keep) for name in later)]
    start = max(layer, 0)
    residual = base[f"blocks.{start}.hook_resid_pre"].repeat(copies, 1, 1)
    pair.bridge.run_with_hooks(
        pair.base.entering(residual), fwd_hooks=hooks, start_at_layer=start, stop_at_layer=n_layers
    )
    return kept
