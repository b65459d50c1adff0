"""Edge attribution patching: what each part of a model tells each later part, by gradients, for all edges at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Self, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._cache.writes import Mix, by_head
from clearspan._forward.readout import FrozenNorm, NormSlope, exact
from clearspan._run.hooks import Hooks
from clearspan.bridge import TransformerBridge
from clearspan.cache import ActivationCache
from clearspan.checks import check_counts
from clearspan.circuits.attribution import Agreement, compared, sampled
from clearspan.circuits.edges import Sender, Writes, patched_edges
from clearspan.circuits.graph import ComputationalGraph, Edge
from clearspan.circuits.runs import MOST, PairRun, PairRuns, copies_with_graph
from clearspan.components import GeneralAttentionBridge, HeadAttentionBridge, NormalizationBridge, Sublayer, stream_at
from clearspan.components.factors import scale_
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Input
from clearspan.model import Model
from clearspan.modes import no_grad
from clearspan.progress import Progress, shown, told
from clearspan.results import counted, size
from clearspan.sweep import Direction, Effects, Metric

Scheme = Literal["midpoint", "paper"]
"""Where on each step of EAP-IG the gradient is taken: at its middle, or at its end as in the paper."""
TOGETHER = 64
"""Receivers in a product, or some more. It is of all senders before the last of them: more would waste work."""


@no_grad
def edge_attribution(
    bridge: TransformerBridge,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    *,
    steps: int | None = None,
    scheme: Scheme = "midpoint",
    direction: Direction = "denoising",
    attention_mask: Int[Tensor, "row pos"] | None = None,
    progress: bool | Progress = True,
) -> "EdgeScores":
    r"""Returns the approximate effect of patching each edge of the computational graph (EAP, and EAP-IG).

    An edge is patched when its receiver reads what its sender writes in the source run, and all else as it is in the
    base run (`patch_edges`). To the first order that changes the metric by

    `sum over positions of (sender(source) - sender(base)) . d metric(base) / d receiver's input`

    Senders are all that enters the first block (`embed`), heads and MLPs, as they add to the residual stream, residual
    multiplier included. Where the model norms attention's output, the change of a head goes through the derivative of
    that norm at the base run. Receivers are the inputs of each head's query, of each key and value (one for the heads
    that share them), of MLPs, and the last residual stream (`logits`), each before the norm through which it is read.

    It takes two forwards, one backward and a product: no run and no tensor for each pair.

    EAP-IG takes the mean of the gradient over runs whose input to the first block goes from the base's to the source's
    in `steps` equal steps. `"midpoint"` takes it at the middle of each step, `"paper"` at the end of each, as Hanna et
    al. do: at `k/steps` for `k = 1 ... steps`, the source itself among them. With few steps the two rank edges
    differently, so that circuits of the best-scored edges differ too; the midpoints come closer to the integral.

    Args:
        bridge: The model, in evaluation mode.
        clean: Any input.
        corrupted: Another, with as many rows, and as many real tokens in each.
        metric: As for `attribution_patch`.
        steps: Steps of EAP-IG; None for EAP, the gradient at the base.
        scheme: Where on each step the gradient is taken.
        direction: `"denoising"`: the corrupted run is the base, and gets clean values. `"noising"`: the reverse.
        attention_mask: 1 for real tokens, of an input that is bare token ids with padding.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, total)`.

    Returns:
        Effects by sender, receiver and row, NaN where there is no edge; on the CPU.

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
        >>> found.mean().shape, len(found.best(3))
        (torch.Size([46, 56]), 3)
        >>> found.compared_with_exact(edges=24).agreement.pearson > 0.9
        True

    References:
        Syed et al. (2023), "Attribution Patching Outperforms Automated Circuit Discovery", arXiv:2310.10348. Hanna et
        al. (2024), "Have Faith in Faithfulness", arXiv:2403.17806, for the integrated gradients.
    """
    if steps is not None:
        check_counts(steps=steps)
    if scheme not in get_args(Scheme):
        raise InvalidArgumentError(f"unknown scheme={scheme!r}", expected="'midpoint' or 'paper'")
    graph = ComputationalGraph.of(bridge)
    pair = PairRuns.of(bridge, clean, corrupted, metric, direction, attention_mask)
    if steps is None:
        pair.check_slope()
    written = Writes.points_of(bridge, one_of_each_sublayer(graph))
    if steps is None:
        source, base = pair.runs(written, [*written, *streams_of_heads(bridge)], graded_points(bridge))
        slopes = [base.cache]
    else:
        source, base = pair.runs(written, written)
        shares = [(step + (0.5 if scheme == "midpoint" else 1.0)) / steps for step in range(steps)]
        with shown(progress) as tell:
            slopes = _runs_between(pair, base, source, shares, tell)
    per_row = _contracted(graph, slopes, base.cache, source.cache)
    if len(base.value) < len(per_row):  # the metric is one number for all rows
        per_row = per_row.sum(0, keepdim=True)
    return EdgeScores(
        values={"score": per_row.movedim(0, -1)},
        axes=graph.axes,
        units=pair.units,
        graph=graph,
        pair=pair.of_result(),
        before=base.value,
        after=source.value,
        steps=steps,
        scheme=scheme,
    )


def _runs_between(
    pair: PairRuns, base: PairRun, source: PairRun, shares: Sequence[float], tell: Progress
) -> list[ActivationCache]:
    """Returns runs at shares of the way from the base's embeddings to the source's, with gradients.

    Each run has as many shares as there is room for, as copies of the rows.
    """
    bridge, name = pair.bridge, "blocks.0.hook_resid_pre"
    start, way = base.cache[name], source.cache[name] - base.cache[name]
    found, size = [], copies_with_graph(pair)
    for some in told(tell, "steps", (shares[first : first + size] for first in range(0, len(shares), size))):
        entering = torch.cat([start + way * share for share in some])
        hooks: Hooks = [(name, lambda value, hook, entering=entering: entering)]
        names, graded = streams_of_heads(bridge), graded_points(bridge)
        run = pair.graded_run(names, source, base, hooks, graded=graded, copies=len(some))
        found.append(run.cache)
    return found


def _contracted(
    graph: ComputationalGraph, slopes: Sequence[ActivationCache], base: ActivationCache, source: ActivationCache
) -> Float[Tensor, "row sender receiver"]:
    """Returns each edge's effect, on the CPU: the receivers of some sublayers together, and the rows there is room for.

    Args:
        graph: The edges.
        slopes: Runs with gradients, whose mean over all copies of a row is taken.
        base: The run that is patched.
        source: The run that gives values.
    """
    every, rows = [], base.n_rows
    copies = max(run.n_rows // rows for run in slopes)
    groups = groups_of(graph, base.model, TOGETHER // copies)
    streams = len(graph.senders) + copies * max(sum(count for _, count in group) for group in groups)
    size = max(1, MOST // (4 * streams * base.n_positions * base.model.adapter.cfg.d_model))
    for start in range(0, rows, size):
        some = range(start, min(start + size, rows))
        ours, theirs = (_rows_of(cache, some, rows) for cache in (base, source))
        changes = sender_changes(graph, ours, theirs).flatten(2).transpose(0, 1)
        found, at = changes.new_empty(len(some), len(graph.receivers), len(graph.senders)), 0
        gradients = [ReceiverGradients(_rows_of(run, some, rows)) for run in slopes]
        for group in groups:
            end = at + sum(count for _, count in group)
            before = max(graph.counts[at:end])
            mean = _mean_of_copies([each.of(group) for each in gradients], len(some)).to(changes)
            found[:, at:end, :before] = mean.flatten(2).transpose(0, 1) @ changes[:, :before].mT
            at = end
        every.append(found)
    return torch.cat(every).mT.cpu().masked_fill(~graph.mask, torch.nan)


def _rows_of(cache: ActivationCache, some: range, rows: int) -> ActivationCache:
    """Returns a cache of some of the rows, of each of the copies that it has of them."""
    if len(some) == rows:
        return cache
    chosen = [copy + row for copy in range(0, cache.n_rows, rows) for row in some]
    return cache.apply_slice_to_batch_dim(slice(some.start, some.stop) if len(chosen) == len(some) else chosen)


def _mean_of_copies(
    gradients: Sequence[Float[Tensor, "receiver copies*row pos d_model"]], rows: int
) -> Float[Tensor, "receiver row pos d_model"]:
    """Returns the mean over the copies of rows in several runs."""
    copies = [one.unflatten(1, (-1, rows)) for one in gradients]
    total = sum(one.shape[1] for one in copies)
    if total == 1:
        return gradients[0]
    sums = [one.sum(1) for one in copies]
    return torch.stack(sums).sum(0) / total if len(sums) > 1 else sums[0] / total


def sender_changes(
    graph: ComputationalGraph, base: ActivationCache, source: ActivationCache
) -> Float[Tensor, "sender row pos d_model"]:
    """Returns by how much more each sender adds in the source run, to the first order at the base run.

    Senders are in the graph's order: `embed`, then each layer's heads, mixers and MLPs as they are added.

    Args:
        graph: The edges.
        base: A run with the points of all senders.
        source: Another one.
    """
    entering = _change(base, source, "blocks.0.hook_resid_pre")
    every = [sublayer for block in base.model.blocks for sublayer in block.in_order_of_adding]
    sizes = [graph.n_heads if isinstance(own.part, GeneralAttentionBridge) else 1 for own in every]
    found = entering.new_empty(1 + sum(sizes), *entering.shape)
    found[0] = entering
    for own, part in zip(every, found[1:].split(sizes), strict=True):
        if isinstance(own.part, GeneralAttentionBridge):
            z, weight = _change(base, source, f"{own.part.path}.hook_z"), own.part.W_O.detach()
            Mix.of(base, own).first_order_(by_head(z, weight, out=part))
        else:
            part[0].copy_(source[own.hook_out]).sub_(base[own.hook_out].to(part))
    return found


def _change(base: ActivationCache, source: ActivationCache, name: str) -> Tensor:
    return exact(source[name]) - exact(base[name])


def one_of_each_sublayer(graph: ComputationalGraph) -> list[Sender]:
    """Returns a sender of each sublayer, and the embeddings: heads of one are known from the same points."""
    return [Sender(node) for node in {(node.layer, node.sublayer): node for node in graph.senders}.values()]


def streams_of_heads(bridge: TransformerBridge) -> list[str]:
    """Returns the points of the streams that heads read, at which the norms before them are taken."""
    attentions = (one for block in bridge.blocks for one in block.sublayers if one.kind == "attn")
    return list(dict.fromkeys(f"{own.block}.{stream_at(own.stage)}" for own in attentions))


def graded_points(bridge: TransformerBridge) -> list[str]:
    """Returns the points from whose gradients those at receivers' inputs are known."""
    names = []
    for own in (one for block in bridge.blocks for one in block.sublayers):
        names += [f"{own.part.path}.hook_{name}" for name in "qkv"] if own.kind == "attn" else [own.hook_in]
    return [*names, f"{bridge.blocks[-1].path}.hook_resid_post"]


Group = Sequence[tuple[Sublayer | None, int]]
"""Sublayers whose receivers are taken together, each with how many it has; None for the last stream."""


def groups_of(graph: ComputationalGraph, model: Model, size: int) -> Sequence[Group]:
    """Returns all sublayers that read, in groups of so many receivers or a sublayer's more."""
    heads = graph.n_heads + 2 * graph.n_kv_heads
    every: list[tuple[Sublayer | None, int]] = []
    for own in (one for block in model.blocks for one in block.sublayers):
        every.append((own, heads if isinstance(own.part, HeadAttentionBridge) else 1))
    groups, total = list[list[tuple[Sublayer | None, int]]](), size
    for one in [*every, (None, 1)]:
        if total >= size:
            groups.append([])
            total = 0
        groups[-1].append(one)
        total += one[1]
    return groups


class ReceiverGradients:
    """The gradients at receivers' inputs in one run.

    They are what `run_with_cache(..., incl_bwd=...)` keeps of `hook_q_input`, `hook_k_input`, `hook_v_input` and
    `hook_mlp_in`, but those of heads are computed from the gradients at the projections, for all of a layer at once.

    Args:
        graded: A run with `streams_of_heads`, and the gradients at `graded_points`.
    """

    def __init__(self, graded: ActivationCache) -> None:
        self._graded = graded
        self._last = f"{graded.model.blocks[-1].path}.hook_resid_post_grad"
        self._slopes = dict(_slopes_of_norms(graded))

    def of(self, group: Group) -> Float[Tensor, "receiver row pos d_model"]:
        """Returns those of some sublayers' queries, keys and values, or one; or of the last stream."""
        last = exact(self._graded[self._last])
        counts = [count for _, count in group]
        found = last.new_empty(sum(counts), *last.shape)
        for (own, _), part in zip(group, found.split(counts), strict=True):
            if own is None:
                part[0] = last
            elif isinstance(own.part, HeadAttentionBridge):
                self._of_heads(own, own.part, part)
            else:
                part[0] = self._graded[f"{own.hook_in}_grad"]
        return found

    def _of_heads(self, own: Sublayer, attention: HeadAttentionBridge, out: Tensor) -> None:
        weights = {"q": attention.W_Q, "k": attention.W_K, "v": attention.W_V}
        sizes = [len(weight) for weight in weights.values()]
        for (name, weight), part in zip(weights.items(), out.split(sizes), strict=True):
            by_head(self._graded[f"{attention.path}.hook_{name}_grad"], weight.detach().transpose(1, 2), out=part)
        scale_(out, own.input_factor)
        if own.norm is not None:
            self._slopes[attention.path].apply_(out)


def _slopes_of_norms(graded: ActivationCache) -> Iterator[tuple[str, NormSlope]]:
    """Yields the derivatives of the norms through which heads read, by attention; of norms alike at once."""
    alike: dict[object, list[tuple[str, NormalizationBridge, Tensor]]] = {}
    for own in (one for block in graded.model.blocks for one in block.sublayers):
        norm = own.norm
        if norm is not None and isinstance(own.part, HeadAttentionBridge):
            stream = exact(graded[f"{own.block}.{stream_at(own.stage)}"])
            kind = norm.uses_rms_norm, norm.eps, norm.has("weight"), stream.device
            is_plain = type(norm) is NormalizationBridge
            alike.setdefault(kind if is_plain else norm.path, []).append((own.part.path, norm, stream))
    for those in alike.values():
        (_, first, _), streams = those[0], torch.stack([stream for _, _, stream in those])
        whole = FrozenNorm.of(first, first.scale(streams))
        if whole.weight is not None:
            weights = torch.stack([norm.w.detach() for _, norm, _ in those])
            whole = replace(whole, weight=weights[:, None, None])
        slopes = whole.slope(streams, of_gradients=True)
        yield from ((path, slopes[number]) for number, (path, _, _) in enumerate(those))


# --- the result ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class EdgeScores(Effects):
    """Approximate changes of a metric when one edge is patched at a time; NaN where there is no edge.

    Attributes:
        graph: The senders and receivers, in order.
        pair: The runs.
        before: The metric of the run that is patched, for each row.
        after: The metric of the run that gives values.
        steps: Runs over which gradients were averaged (EAP-IG), or None for those at the base run (EAP).
        scheme: Where on each step they were taken.
        agreement: How some edges compare with exact patching, once `compared_with_exact` has run it.
    """

    graph: ComputationalGraph
    pair: PairRuns
    before: Float[Tensor, "row"]
    after: Float[Tensor, "row"]
    steps: int | None
    scheme: Scheme = "midpoint"
    agreement: Agreement | None = None

    @cached_property
    def _means(self) -> Float[Tensor, "sender receiver"]:
        found = self.mean()
        if found.shape != self.graph.mask.shape:
            raise InvalidArgumentError(
                "these are the scores of some edges", fix="what edge_attribution returned, before select or top"
            )
        return found

    def score(self, edge: Edge | str) -> float:
        """Returns the score of an edge, or of its name such as `L0H1->L2H3.q`; mean over rows.

        Raises:
            InvalidArgumentError: There is no such edge.
        """
        (found,) = self.graph.parsed([edge])
        return float(self._means[self.graph.index_of(found)])

    def best(self, k: int = 10) -> list[Edge]:
        """Returns the `k` edges with the largest scores of either sign, largest first."""
        check_counts(0, k=k)
        return self._ranked[:k]

    @cached_property
    def _ranked(self) -> list[Edge]:
        edges = list(self.graph.edges())
        return sorted(edges, key=lambda edge: -size(float(self._means[self.graph.index_of(edge)])))

    def compared_with_exact(self, edges: int | Sequence[Edge | str] | None = 64, seed: int = 0) -> Self:
        """Returns the same result with its agreement with exact patching, which is run.

        Args:
            edges: How many edges are run, chosen at random; which, by themselves or by name; or None for all.
            seed: Of the choice.
        """
        if isinstance(edges, int | None):
            every = sorted(self.graph.edges(), key=self.graph.index_of)
            chosen = [every[number] for number in sampled(len(every), edges, seed)]
        else:
            chosen = self.graph.parsed(edges)
        patched = patched_edges(self.pair, self.graph, {edge.name: [edge] for edge in chosen})
        scores, names = torch.tensor([self.score(edge) for edge in chosen]), [edge.name for edge in chosen]
        return replace(self, agreement=Agreement(scores, patched.change().mean(-1), names, self.graph.n_edges))

    @property
    def method(self) -> str:
        """What was computed, in words."""
        if self.steps is None:
            return "EAP"
        where = "" if self.scheme == "midpoint" else ", gradients at their ends"
        return f"EAP-IG of {counted(self.steps, 'step')}{where}"

    @property
    def title(self) -> str:
        """What was approximated, and how it agrees with what it approximates."""
        pair = self.pair
        return (
            f"{self.method}: approximate change of {pair.metric_name} with one of {self.graph.n_edges} edges from the "
            f"{pair.source_name} run; {pair.described(self.before, self.after)}; "
            f"mean over {counted(self.of().shape[-1], 'row')}; {compared(self.agreement)}"
        )


def checked_scores(scores: object) -> EdgeScores:
    """Returns scores of edges.

    Raises:
        InvalidArgumentError: It is something else.
    """
    if not isinstance(scores, EdgeScores):
        raise InvalidArgumentError("scores= is what edge_attribution returns", got=repr(scores)[:80])
    return scores
