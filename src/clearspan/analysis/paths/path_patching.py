"""Path patching: what one part writes, as it differs between two runs, carried to chosen readers alone."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan._forward.given import Input, as_tensor
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Intervention, Patch, Scale
from clearspan.sweep import Grid, Metric, Sweep, SweepResult

from .edge_patching import input_of
from .graph import ComputationalGraph, Node
from .path_streams import Freeze, Sender, carried_streams, sender_named

Direction = Literal["denoising", "noising"]
Receiver = str | Node | Sequence[str | Node]
"""One reader of the residual stream, or several that are changed together."""


@torch.no_grad()
def path_patching(
    bridge: TransformerBridge,
    clean: Input,
    corrupted: Input,
    metric: Metric | Mapping[str, Metric],
    senders: Sequence[str | Node],
    receivers: Sequence[Receiver],
    *,
    freeze: Freeze = "all",
    direction: Direction = "denoising",
    attention_mask: Int[Tensor, "row pos"] | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> SweepResult:
    """Returns the effect of each path from a sender to a receiver, exactly.

    In the run that is changed, the sender writes what it writes in the other run; every other part between it and the
    receiver is frozen to what it wrote; what the receiver then reads is put into the run, whose other readers read what
    they did, and all after the receiver is computed. With one key/value head for several query heads, what is put in is
    what that one head reads.

    Args:
        bridge: A model whose residual stream is a sum.
        clean: The prompts as they are.
        corrupted: The other prompt of each pair, of the same length.
        metric: What is measured, or several by name; see `clearspan.sweep.Sweep`.
        senders: Names of nodes: `"embed"`, `"L3H5"`, `"L3.mlp"`, and single neurons, `"L3N100"`.
        receivers: Names of nodes, or lists of names that are changed together: `"L4H2.q"`, `"L4H0-7.k"` (the name that
            `ComputationalGraph` has where heads share keys; `"L4H2.k"` finds it too), `"L4.mlp"`, `"logits"`; `"L4H2"`
            for a head's three inputs.
        freeze: `"all"` heads and MLPs between them, which is the direct path; or `"attention"` alone, so that paths
            through MLPs count as the sender's own.
        direction: `"denoising"`: the clean run's values go into the corrupted one; `"noising"`: the other way.
        attention_mask: Where token ids are padded, in both runs.
        memory: Bytes that a batch may take.
        progress: Whether a bar is shown.

    Returns:
        Metrics by sender, receiver and row. A receiver that does not come after the sender leaves the run as it is.

    Raises:
        InvalidArgumentError: No such node, runs of different shape, or a model whose stream is no sum.

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
    runs = {"clean": as_tensor(bridge, clean, None, None), "corrupted": as_tensor(bridge, corrupted, None, None)}
    source, changed = ("clean", "corrupted") if direction == "denoising" else ("corrupted", "clean")
    tokens, mask = runs[changed]
    mask = mask if attention_mask is None else attention_mask
    if tokens.shape != runs[source][0].shape:
        raise InvalidArgumentError(
            "path patching needs pairs of prompts of one length",
            expected=str(list(tokens.shape)),
            got=str(list(runs[source][0].shape)),
        )
    graph = ComputationalGraph.of(bridge)
    sent = [sender_named(graph, bridge, sender) for sender in senders]
    read = [_group(graph, receiver) for receiver in receivers]
    every = list(dict.fromkeys(node for group in read for node in group))
    streams = carried_streams(bridge, tokens, runs[source][0], mask, sent, every, freeze)
    cells = Grid(
        (("sender", tuple(one.name for one in sent)), ("receiver", tuple("+".join(map(str, group)) for group in read))),
        tuple(_cell(bridge, graph, one, group) for one in sent for group in read),
    )
    return Sweep(bridge, tokens, cells, metric, sources=streams, attention_mask=mask).run(memory, progress=progress)


def _group(graph: ComputationalGraph, receiver: Receiver) -> tuple[Node, ...]:
    """Returns the inputs of a receiver, or of several."""
    names = [receiver] if isinstance(receiver, str | Node) else receiver
    nodes = [name if isinstance(name, Node) else _reader(graph, name) for name in names]
    found = tuple(dict.fromkeys(one for node in nodes for one in graph.inputs_of(node)))
    if not found:
        raise InvalidArgumentError(
            f"{receiver!r} reads no residual stream", expected="a head, its q, k or v, an MLP, or 'logits'"
        )
    return found


def _reader(graph: ComputationalGraph, name: str) -> Node:
    """Returns a receiver by its name, or by that of one of the heads which share a key or value."""
    found = re.fullmatch(r"L(\d+)H(\d+)\.([qkv])", name)
    if found is not None and int(found[1]) < graph.n_layers:
        for node in graph.attention_inputs(int(found[1])):
            if node.kind == found[3] and int(found[2]) in node.heads:
                return node
    return graph.node(name)


def _cell(
    bridge: TransformerBridge, graph: ComputationalGraph, sender: Sender, group: tuple[Node, ...]
) -> tuple[Intervention, ...]:
    """Returns what is done for one path: the inputs that come after the sender read what it carries."""
    place, last = graph.senders.index(sender.node), graph.n_layers - 1
    reached = [node for node in group if place < graph.n_senders_before(node)]
    if not reached:
        return (Intervention("resid_post", Scale(1.0), layer=last, positions=-1),)
    return tuple(Intervention(input_of(bridge, node), Patch(sender.name), heads=node.place) for node in reached)
