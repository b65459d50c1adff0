"""Edges patched exactly: receivers' inputs with what senders write in another run."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._run.sources import Source
from clearspan.analysis.metric import Metric
from clearspan.analysis.places import Input
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Intervention, Patch
from clearspan.sweep import Grid, SweepResult

from .graph import ComputationalGraph, Edge, Node
from .patching_pair import PatchingDirection, PatchingPair
from .sender_changes import sender_changes, written


def patch_edges(
    bridge: TransformerBridge,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    edges: Sequence[Edge | str] | Mapping[str, Sequence[Edge | str]],
    *,
    direction: PatchingDirection = "denoising",
    attention_mask: Int[Tensor, "row pos"] | None = None,
) -> SweepResult:
    r"""Returns the exact effect of patching edges, one cell for each edge, or for each set of edges.

    A receiver of a cell's edges reads the residual stream of the base run, plus what the senders of these edges add to
    it more in the source run than in the base run. All else is computed from there on (direct path patching).

    Args:
        bridge: The model, in evaluation mode.
        clean: A text, texts, or token ids.
        corrupted: The other input, position on position with the clean one.
        metric: What is measured of the logits.
        edges: Edges of `ComputationalGraph.of(bridge)`, or their names; or sets of them by label.
        direction: `"denoising"`: the corrupted run is the base, and gets clean values. `"noising"`: the reverse.
        attention_mask: 1 for real tokens, where token ids have padding.

    Returns:
        The metric of each cell; `change()` is the effect.

    Raises:
        InvalidArgumentError: There is no such edge, or as for `edge_attribution`.

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
    pair = PatchingPair.of(bridge, clean, corrupted, metric, direction, attention_mask)
    sets = edges if isinstance(edges, Mapping) else {str(edge): [edge] for edge in edges}
    return swept_edges(pair, graph, {label: graph.parsed(chosen) for label, chosen in sets.items()})


@torch.no_grad()
def swept_edges(pair: PatchingPair, graph: ComputationalGraph, cells: Mapping[str, Sequence[Edge]]) -> SweepResult:
    """Returns the metric with each cell's edges patched. Arguments are those of `patch_edges`, parsed."""
    if not cells:
        raise InvalidArgumentError("there is no edge to patch", expected="one or more")
    edges = [edge for chosen in cells.values() for edge in chosen]
    streams = {stream_of(pair.bridge, edge.receiver) for edge in edges}
    source = pair.source_run(written(pair.bridge)).cache
    base = pair.base_run([*written(pair.bridge), *streams])
    changes = sender_changes(base, source)
    sources: dict[str, Source] = {}
    interventions: dict[str, list[Intervention]] = {}
    for label, chosen in cells.items():
        interventions[label] = []
        for receiver in dict.fromkeys(edge.receiver for edge in chosen):
            senders = [graph.index_of(edge)[0] for edge in dict.fromkeys(chosen) if edge.receiver == receiver]
            name, point = f"{label}: {receiver}", input_of(pair.bridge, receiver)
            stream = base[stream_of(pair.bridge, receiver)]
            value = (stream + changes[senders].sum(0).to(stream)).to(stream)
            sources[name] = {point: _by_head(value, pair.bridge, point)}
            interventions[label].append(Intervention(point, Patch(name), heads=receiver.place))
    return pair.swept(Grid.of(interventions, "edge"), sources)


def input_of(bridge: TransformerBridge, receiver: Node) -> str:
    """Returns the hook point at which a receiver reads the residual stream."""
    match receiver.kind:
        case "logits":
            return f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post"
        case "mlp":
            return f"blocks.{receiver.layer}.hook_mlp_in"
        case "q" | "k" | "v":
            return f"blocks.{receiver.layer}.hook_{receiver.kind}_input"
    raise InvalidArgumentError(f"{receiver} reads nothing by itself", expected="a receiver", got=receiver.kind)


def stream_of(bridge: TransformerBridge, receiver: Node) -> str:
    """Returns the hook point of the residual stream that a receiver reads."""
    if receiver.kind in ("q", "k", "v"):
        return f"blocks.{receiver.layer}.hook_resid_pre"
    return input_of(bridge, receiver)


def _by_head(value: Float[Tensor, "row pos d_model"], bridge: TransformerBridge, point: str) -> Tensor:
    """Returns a stream as each head's own input, where a point has an axis of heads: a view, expanded."""
    heads = [size for axis, size in bridge.hook_dict[point].sizes.items() if axis in ("head", "kv_head")]
    return value.unsqueeze(2).expand(-1, -1, heads[0], -1) if heads else value
