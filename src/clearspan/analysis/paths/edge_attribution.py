"""Edge attribution patching: what each part of a model tells each later part, by gradients, for all edges at once."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._cache.readings import norm_at
from clearspan._run.hooks import Hooks
from clearspan.analysis.attribution.readout import exact, weighted
from clearspan.analysis.metric import Metric
from clearspan.analysis.places import Input
from clearspan.bridge import TransformerBridge
from clearspan.cache import ActivationCache
from clearspan.components import NormalizationBridge
from clearspan.errors import InvalidArgumentError

from .edge_scores import EdgeScores
from .graph import ComputationalGraph
from .patching_pair import PatchingDirection, PatchingPair, PatchingRun
from .sender_changes import project_heads, sender_changes, written


@torch.no_grad()
def edge_attribution(
    bridge: TransformerBridge,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    *,
    steps: int | None = None,
    direction: PatchingDirection = "denoising",
    attention_mask: Int[Tensor, "row pos"] | None = None,
) -> EdgeScores:
    r"""Returns the approximate effect of patching each edge of the computational graph (EAP, and EAP-IG).

    An edge is patched when its receiver reads what its sender writes in the source run, and all else as it is in the
    base run. To the first order in the receiver's input, that changes the metric by

    `sum over positions of (sender(source) - sender(base)) . d metric(base) / d receiver's input`

    Senders are all that enters the first block (`embed`), heads and MLPs, as they add to the residual stream: after a
    norm on a sublayer's output, with its scale in each run, and a residual multiplier. Receivers are the inputs of each
    head's query, of each key and value (one for the heads that share them), of MLPs, and the last residual stream
    (`logits`), each before the norm through which it is read. What output biases add is in no edge.

    It takes two forwards, one backward and a product: no run and no tensor for each pair.

    Args:
        bridge: The model, in evaluation mode.
        clean: A text, texts, or token ids.
        corrupted: The other input, position on position with the clean one.
        metric: As for `attribution_patch`.
        steps: For EAP-IG: the gradient is the mean over this many runs, whose input to the first block goes from the
            base's to the source's in equal steps (at the middle of each). None for the gradient at the base.
        direction: `"denoising"`: the corrupted run is the base, and gets clean values. `"noising"`: the reverse.
        attention_mask: 1 for real tokens, where token ids have padding.

    Returns:
        Effects by row, sender and receiver, NaN where there is no edge; on the CPU.

    Raises:
        InvalidArgumentError: A model whose residual stream is no sum of what its parts add, or whose keys and values
            have no inputs of their own; inputs that do not lie position on position; a metric without a gradient, or
            whose gradient at the base run is zero.

    Example:
        >>> import clearspan
        >>> from clearspan.sweep import LogitDifference
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> metric = LogitDifference.between(bridge, " os", " re")
        >>> found = edge_attribution(bridge, "import os\nimport", "import re\nimport", metric, steps=5)
        >>> found.scores.shape, len(found.top(3))
        (torch.Size([46, 56]), 3)
        >>> found.compared_with_exact(edges=24).agreement.pearson > 0.9
        True

    References:
        Syed et al. (2023), "Attribution Patching Outperforms Automated Circuit Discovery", arXiv:2310.10348. Hanna et
        al. (2024), "Have Faith in Faithfulness", arXiv:2403.17806, for the integrated gradients; there they are taken
        at the end of each step.
    """
    if steps is not None and steps < 1:
        raise InvalidArgumentError(f"steps={steps}", expected="steps > 0, or None for the gradient at the base run")
    graph = ComputationalGraph.of(bridge)
    pair = PatchingPair.of(bridge, clean, corrupted, metric, direction, attention_mask)
    if steps is None:
        pair.check_slope()
    source = pair.source_run(written(bridge))
    base = pair.graded_run([*written(bridge), *read(bridge)], source)
    per_row = (
        _contracted(graph, base.cache, base.cache, source.cache)
        if steps is None
        else _integrated(graph, pair, base, source, steps)
    )
    if len(base.value) < len(per_row):  # the metric is one number for all rows
        per_row = per_row.sum(0, keepdim=True)
    return EdgeScores(per_row, graph, base.value, source.value, pair, steps)


def _integrated(
    graph: ComputationalGraph, pair: PatchingPair, base: PatchingRun, source: PatchingRun, steps: int
) -> Float[Tensor, "row sender receiver"]:
    """Returns effects with gradients averaged on the way from the base's input of the first block to the source's."""
    name = "blocks.0.hook_resid_pre"
    start, way = base.cache[name], source.cache[name] - base.cache[name]
    total: Tensor | float = 0.0
    for step in range(steps):
        entering = start + way * ((step + 0.5) / steps)
        hooks: Hooks = [(name, lambda value, hook, entering=entering: entering)]
        graded = pair.graded_run(read(pair.bridge), source, base, hooks)
        total = total + _contracted(graph, graded.cache, base.cache, source.cache) / steps
    assert isinstance(total, Tensor), "there is a step"
    return total


def read(bridge: TransformerBridge) -> list[str]:
    """Returns the points from which gradients at receivers' inputs are known."""
    layers = range(bridge.cfg.n_layers)
    names = ("hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v", "hook_mlp_in")
    return [*(f"blocks.{layer}.{name}" for layer in layers for name in names), f"blocks.{layers[-1]}.hook_resid_post"]


# --- effects ---------------------------------------------------------------------------------------------------------


def _contracted(
    graph: ComputationalGraph, graded: ActivationCache, base: ActivationCache, source: ActivationCache
) -> Float[Tensor, "row sender receiver"]:
    """Returns each edge's effect: rows one by one, and the receivers of a layer together.

    Args:
        graph: The edges.
        graded: The run with gradients.
        base: The run that is patched.
        source: The run that gives values.
    """
    every = []
    for row in range(base.n_rows):
        ours, theirs, slopes = (cache.apply_slice_to_batch_dim(slice(row, row + 1)) for cache in (base, source, graded))
        changes = sender_changes(ours, theirs).flatten(1)
        found, at = changes.new_full((len(graph.senders), len(graph.receivers)), torch.nan), 0
        for gradients in receiver_gradients(slopes):
            end = at + len(gradients)
            count = graph.n_senders_before(graph.receivers[end - 1])  # an MLP comes after its layer's inputs
            found[:count, at:end] = (gradients.flatten(1).to(changes) @ changes[:count].T).T
            at = end
        every.append(found.cpu())
    return torch.stack(every).masked_fill_(~graph.mask, torch.nan)


def receiver_gradients(graded: ActivationCache) -> Iterator[Float[Tensor, "receiver row pos d_model"]]:
    """Yields the gradients at the inputs of each layer's queries, keys, values and MLP, then at the last stream.

    They are what `run_with_cache(..., incl_bwd=...)` keeps of `hook_q_input`, `hook_k_input`, `hook_v_input` and
    `hook_mlp_in`, but those of heads are computed from the gradients at the projections, for all of a layer at once.

    Args:
        graded: A run with the points of `read`, and their gradients.
    """
    n_layers = graded.bridge.cfg.n_layers
    for layer in range(n_layers):
        attention, stream = graded.bridge.blocks[layer].attn, exact(graded["resid_pre", layer])
        weights = {"q": attention.W_Q, "k": attention.W_K, "v": attention.W_V}
        sizes = [len(weight) for weight in weights.values()]
        found = stream.new_empty(sum(sizes) + 1, *stream.shape)
        for (name, weight), part in zip(weights.items(), found[:-1].split(sizes), strict=True):
            project_heads(graded[f"{name}_grad", layer], weight.transpose(1, 2), part)
        norm = norm_at(graded.bridge, layer, mlp_input=False)
        if norm is not None:
            _pull_back(norm, stream, found[:-1])
        found[-1] = graded["mlp_in_grad", layer]
        yield found
    yield exact(graded["resid_post_grad", n_layers - 1])[None]


def _pull_back(
    norm: NormalizationBridge,
    stream: Float[Tensor, "row pos d_model"],
    gradients: Float[Tensor, "receiver row pos d_model"],
) -> None:
    """Makes gradients at a norm's output into those at its input, in place: `(g - n * mean(g * n)) / scale`.

    `g` is the gradient at the normalised value `n`, centred where the norm centres; the second term is that of the
    scale.
    """
    scale, normalized = norm.scale(stream), norm.normalize(stream)
    gradients *= weighted(norm, torch.ones_like(stream[0, 0])).detach()
    if not norm.uses_rms_norm:
        gradients -= gradients.mean(-1, keepdim=True)
    along = (gradients * normalized).mean(-1, keepdim=True)
    gradients.addcmul_(normalized, along, value=-1).div_(scale)
