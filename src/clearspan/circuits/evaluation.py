"""Circuits evaluated exactly: how faithful each is, and what is left without it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clearspan._cache.writes import Mix, by_head
from clearspan._forward.readout import exact
from clearspan.bridge import TransformerBridge
from clearspan.cache import ActivationCache
from clearspan.checks import check_counts
from clearspan.circuits.circuit import Circuit
from clearspan.circuits.edge_scores import EdgeScores, checked_scores
from clearspan.circuits.edges import Sender, Writes
from clearspan.circuits.graph import ComputationalGraph, places_of
from clearspan.circuits.runs import PairRun, PairRuns, copies_at_a_time, listed
from clearspan.components import GeneralAttentionBridge, Sublayer, projection_input
from clearspan.components.factors import scaled
from clearspan.effects import Draws, Label
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Input
from clearspan.modes import no_grad
from clearspan.plots import Chart, LineChart
from clearspan.points import HookFunction, HookPoint
from clearspan.progress import Progress, shown, silent, told
from clearspan.results import counted, number
from clearspan.sweep import Effects, Metric
from clearspan.sweep.readings import measured

Masks = Bool[Tensor, "circuit sender receiver"]
Stream = Float[Tensor, "row pos d_model"]
Changes = Float[Tensor, "*circuit sender row*pos*d_model"]


def evaluate_circuits(
    bridge: TransformerBridge,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    circuits: Circuit | Mapping[str, Circuit],
    *,
    attention_mask: Int[Tensor, "row pos"] | None = None,
    memory: int | None = None,
    progress: bool | Progress = True,
) -> "CircuitEvaluation":
    r"""Returns how faithful circuits are, and what all other edges do without them, exactly.

    In a circuit's run, each input of a head or MLP, and the last residual stream, reads what would be on the stream if
    the senders of its edges in the circuit wrote what they write in this run, and all others what they write in the
    corrupted run. `embed` writes the clean input's embeddings. So the run of all edges is the clean run, and the run of
    none is the corrupted run. Where the model norms attention's output, the norm is computed for each reader on the mix
    of heads that it reads. With `m` the mean of the metric over rows,

    `faithfulness = (m(circuit) - m(corrupted)) / (m(clean) - m(corrupted))`

    and completeness is the same of all other edges.

    Args:
        bridge: The model, in evaluation mode.
        clean: Any input.
        corrupted: Another, with as many rows, and as many real tokens in each.
        metric: What is measured, of logits or as `clearspan.sweep` has it. The tokens it may need are the clean ones.
        circuits: A circuit, or several by name.
        attention_mask: 1 for real tokens, of an input that is bare token ids with padding.
        memory: Bytes that a batch of runs may take.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, total)`.

    Returns:
        Metrics by run (of the circuit, or of the rest), circuit and row; `faithfulness` and `completeness` of them.

    Raises:
        InvalidArgumentError: As for `edge_attribution`; a circuit of another graph; or a metric that is the same in
            both runs.

    Example:
        >>> import clearspan
        >>> from clearspan.sweep import LogitDifference
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> metric = LogitDifference.between(bridge, " os", " re")
        >>> nothing = Circuit.of(bridge, [])
        >>> circuits = {"all": nothing.complement(), "nothing": nothing}
        >>> found = evaluate_circuits(bridge, "import os\nimport", "import re\nimport", metric, circuits)
        >>> [abs(round(share, 3)) for share in found.faithfulness.tolist()]
        [1.0, 0.0]

    References:
        Conmy et al. (2023), "Towards Automated Circuit Discovery", arXiv:2304.14997, for runs of subgraphs. Hanna et
        al. (2024), "Have Faith in Faithfulness", arXiv:2403.17806, for this normalisation. Marks et al. (2024), "Sparse
        Feature Circuits", arXiv:2403.19647, for completeness; Wang et al. (2022), arXiv:2211.00593, take parts of the
        circuit out as well.
    """
    named = {"circuit": circuits} if isinstance(circuits, Circuit) else circuits
    if not isinstance(named, Mapping) or not all(isinstance(one, Circuit) for one in named.values()):
        raise InvalidArgumentError("circuits= is a Circuit, or several by name", got=repr(circuits)[:80])
    if not named:
        raise InvalidArgumentError("there is no circuit to evaluate", expected="one or more")
    runs = CircuitRuns.of(bridge, clean, corrupted, metric, attention_mask, memory)
    masks = runs.masks(list(named.values()))
    with shown(progress) as tell:
        values = runs.metrics_of(torch.cat([masks, runs.graph.mask & ~masks]), tell)
    axes = {"run": ("circuit", "the rest"), "circuit": tuple(named)}
    return runs.as_effects(values.unflatten(0, (2, -1)), axes, "runs of circuits")


def faithfulness_curve(
    scores: EdgeScores,
    sizes: Sequence[int] | None = None,
    *,
    draws: int = 3,
    seed: int = 0,
    memory: int | None = None,
    progress: bool | Progress = True,
) -> "CircuitEvaluation":
    r"""Returns how faithful circuits of the best-scored edges are by size, what is left without each, and a control.

    The inputs and the metric are those of the scores. The control is as many edges drawn from all, most of which lie on
    no path from `embed` to `logits`: it says that size alone is not enough, and no more.

    Args:
        scores: What `edge_attribution` found.
        sizes: Numbers of edges; by default twelve from 1 to all, in equal ratios.
        draws: How many random circuits there are of each size.
        seed: Of the first; the next ones have the next seeds.
        memory: Bytes that a batch of runs may take.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, total)`.

    Raises:
        InvalidArgumentError: No sizes, or one that is not from 0 to the number of edges.

    Example:
        >>> import clearspan
        >>> from clearspan.analysis import edge_attribution
        >>> from clearspan.sweep import LogitDifference
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> metric = LogitDifference.between(bridge, " os", " re")
        >>> scores = edge_attribution(bridge, "import os\nimport", "import re\nimport", metric, steps=5)
        >>> found = faithfulness_curve(scores, [0, 1131], draws=1)
        >>> [[abs(round(share, 3)) for share in shares.tolist()] for shares in (found.faithfulness, found.completeness)]
        [[0.0, 1.0], [1.0, 0.0]]
    """
    graph, pair = checked_scores(scores).graph, scores.pair
    chosen = _spread(graph.n_edges) if sizes is None else tuple(listed("sizes", sizes, int))
    check_counts(0, draws=draws, seed=seed)
    circuits = [Circuit.of_scores(scores, n_edges=size) for size in chosen]
    runs = CircuitRuns.of(pair.bridge, pair.clean, pair.corrupted, pair.metric, memory=memory)
    random = [Circuit.random(graph, size, seed + draw) for draw in range(draws) for size in chosen]
    masks, controls = runs.masks(circuits), runs.masks(random)
    with shown(progress) as tell:
        values = runs.metrics_of(torch.cat([masks, graph.mask & ~masks, controls]), tell)
    axes = {"run": ("circuit", "the rest", *(f"random {draw}" for draw in range(draws))), "edges": chosen}
    return runs.as_effects(values.unflatten(0, (-1, len(chosen))), axes, f"circuits by {scores.method}")


def _spread(n_edges: int, count: int = 12) -> tuple[int, ...]:
    """Returns sizes from 1 to all in equal ratios.

    Example:
        >>> _spread(100, 3)
        (1, 10, 100)
    """
    return tuple(sorted({round(n_edges ** (step / (count - 1))) for step in range(count)}))


# --- runs ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class CircuitRuns:
    """Runs circuits on one pair of inputs, many as the rows of one batch, and counts the runs.

    Attributes:
        pair: The inputs. The clean run is its base.
        graph: The edges.
        clean: The clean run.
        corrupted: The corrupted run, whose values are on all edges outside a circuit.
        mixes: What each attention adds for changed heads, by layer and name, where any is normed; empty where none is.
        writes: What senders add to the residual stream in the corrupted run, in float32 at least. With mixes, heads:
            what they add to what enters the norm.
        memory: Bytes that a batch may take, or None.
        n_circuits: How many circuits were run.
        n_forwards: In how many batches.
    """

    pair: PairRuns
    graph: ComputationalGraph
    clean: PairRun
    corrupted: PairRun
    mixes: Mapping[tuple[int, str], Mix]
    writes: Changes
    memory: int | None
    n_circuits: int = 0
    n_forwards: int = 0

    @classmethod
    @no_grad
    def of(
        cls,
        bridge: TransformerBridge,
        clean: Input,
        corrupted: Input,
        metric: Metric,
        attention_mask: Int[Tensor, "row pos"] | None = None,
        memory: int | None = None,
    ) -> Self:
        """Returns it, after both runs.

        Raises:
            InvalidArgumentError: The model has no computational graph, the inputs do not lie position on position, or
                the metric is the same in both runs.
        """
        graph = ComputationalGraph.of(bridge)
        pair = PairRuns.of(bridge, clean, corrupted, metric, "noising", attention_mask)
        written = Writes.points_of(bridge, [Sender(node) for node in graph.senders])
        streams = map(graph.stream_of, graph.receivers)
        other = pair.source_run(list(dict.fromkeys([*written, *streams])))
        own = replace(pair, direction="denoising").source_run(["blocks.0.hook_resid_pre"])
        attentions = [one for block in bridge.blocks for one in block.of_kind("attn")]
        mixes = {(one.layer, one.name): Mix.of(other.cache, one) for one in attentions}
        if all(mix.norm is None for mix in mixes.values()):
            mixes = {}
        runs = cls(pair, graph, own, other, mixes, torch.empty(0), memory)
        runs.writes = runs._written(other.cache)
        runs.clean, runs.corrupted = (replace(run, measured=runs._measured(run.output)) for run in (own, other))
        ends = [run.value.mean() for run in (runs.clean, runs.corrupted)]
        if not (ends[0] - ends[1]).abs() > 0:
            raise InvalidArgumentError(
                "the metric is the same in the clean and the corrupted run",
                expected="two inputs on which it differs",
                got=f"{ends[0]:.4g} in both",
            )
        return runs

    def _written(self, cache: ActivationCache) -> Changes:
        parts = [exact(cache["resid_pre", 0])[None]]
        for block in self.pair.bridge.blocks:
            for own in block.in_order_of_adding:
                has_heads = own.kind == "attn"
                shown = cache[f"{own.part.path}.hook_z" if has_heads else own.hook_out]
                parts.append(self.heads(own, shown) if has_heads else exact(shown)[None])
        return torch.cat(parts).flatten(1)

    def heads(self, own: Sublayer, z: Float[Tensor, "row pos head d_head"]) -> Float[Tensor, "head row pos d_model"]:
        """Returns what heads of an attention with some `z` write, as `writes` has it."""
        assert isinstance(own.part, GeneralAttentionBridge), "it has heads"
        results = by_head(exact(z), own.part.W_O.detach())
        return results if self.mixes else scaled(results, own.multiplier)

    def masks(self, circuits: Sequence[Circuit]) -> Masks:
        """Returns circuits as masks.

        Raises:
            InvalidArgumentError: A circuit of another graph.
        """
        for circuit in circuits:
            if circuit.graph != self.graph:
                raise InvalidArgumentError(
                    "the circuit is of another graph", expected=str(self.graph), got=str(circuit.graph)
                )
        return torch.stack([circuit.mask for circuit in circuits]) if circuits else self.graph.mask[None][:0]

    def metrics(self, *circuits: Circuit) -> Float[Tensor, "circuit row"]:
        """Returns the metric of each circuit's run, on the CPU."""
        return self.metrics_of(self.masks(circuits))

    @no_grad
    def metrics_of(self, masks: Masks, tell: Progress = silent) -> Float[Tensor, "circuit row"]:
        """Returns the metric of each circuit's run, for circuits as masks.

        Batches are made in the order given; layers in which all of a batch read the same are run once.
        """
        embedded, found, cfg = self.clean.cache["resid_pre", 0], [], self.pair.bridge.cfg
        streams = 2 * len(self.writes) + (12 if self.mixes else 8) * cfg.n_heads + 3 * cfg.d_mlp // cfg.d_model
        for batch in told(tell, "circuits", masks.split(copies_at_a_time(self.pair, self.memory, streams))):
            self.n_circuits, self.n_forwards = self.n_circuits + len(batch), self.n_forwards + 1
            last = CircuitBatch.entering(self, batch.to(embedded.device), embedded).last_streams()
            for stream in last.to(embedded):
                output = stream if self.pair.reads_some_logits else self.pair.bridge.read_out(stream)
                found.append(self._measured(output))
        return torch.stack(found)

    def shares(self, values: Float[Tensor, "*circuit row"]) -> Float[Tensor, "*circuit"]:
        """Returns where metrics are on the way from the corrupted run (0) to the clean run (1), of means over rows."""
        return shares(values, self.clean.value, self.corrupted.value)

    def as_effects(
        self, values: Float[Tensor, "run circuit row"], axes: Mapping[str, tuple[Any, ...]], what: str
    ) -> "CircuitEvaluation":
        """Returns metrics of circuits as a finding."""
        name = self.pair.metric_name
        sources = {"clean": {name: self.clean.value}}
        return CircuitEvaluation(
            values={name: values}, axes=axes, base={name: self.corrupted.value}, sources=sources, what=what
        )

    def _measured(self, output: Tensor) -> Float[Tensor, "row"]:
        return measured(lambda _: self.pair.of_output(output, self.corrupted, self.clean), output)


def shares(
    values: Float[Tensor, "*circuit row"], clean: Float[Tensor, "row"], corrupted: Float[Tensor, "row"]
) -> Float[Tensor, "*circuit"]:
    """Returns `(mean(values) - mean(corrupted)) / (mean(clean) - mean(corrupted))`, means over rows."""
    return (values.mean(-1) - corrupted.mean()) / (clean.mean() - corrupted.mean())


@dataclass(eq=False)
class CircuitBatch:
    """Circuits that run together, each in rows of its own.

    The model's own residual stream does not matter: everything that reads it is given what it reads.

    Attributes:
        runs: The runs that it is one of.
        masks: The circuits.
        changes: By how much more each sender writes than in the corrupted run, as far as it is known.
    """

    runs: CircuitRuns
    masks: Masks
    changes: Changes

    @classmethod
    def entering(cls, runs: CircuitRuns, masks: Masks, embedded: Stream) -> Self:
        """Returns a batch that knows what the clean run's embeddings add, and nothing else."""
        changes = torch.zeros_like(runs.writes)
        changes[0] = exact(embedded).flatten() - runs.writes[0]
        return cls(runs, masks, changes.expand(len(masks), -1, -1))

    def last_streams(self) -> Float[Tensor, "circuit row pos d_model"]:
        """Returns the last residual stream of each circuit. Layers in which all agree are run once for all."""
        graph = self.runs.graph
        agreed = self._agreed()
        shared = CircuitBatch(self.runs, self.masks[:1], self.changes[:1].clone())
        shared._run(0, agreed)
        own = CircuitBatch(self.runs, self.masks, shared.changes.repeat(len(self.masks), 1, 1))
        own._run(agreed, graph.n_layers)
        return own._read(len(graph.receivers) - 1, 1)[:, 0]

    def _agreed(self) -> int:
        """Returns how many layers read the same in all circuits."""
        graph = self.runs.graph
        differs = (self.masks != self.masks[:1]).any(0).any(0).tolist()
        layers = [node.layer for node, is_other in zip(graph.receivers, differs, strict=True) if is_other]
        return min((graph.n_layers if layer is None else layer for layer in layers), default=graph.n_layers)

    def _run(self, start: int, stop: int) -> None:
        """Runs layers, after which the changes of their heads and MLPs are known."""
        if start == stop:
            return
        pair, residual = self.runs.pair, self.runs.corrupted.cache["resid_pre", start]
        pair.bridge.run_with_hooks(
            pair.base.entering(residual.repeat(len(self.masks), 1, 1)),
            fwd_hooks=[hook for layer in range(start, stop) for hook in self._hooks(layer)],
            start_at_layer=start,
            stop_at_layer=stop,
        )

    def _hooks(self, layer: int) -> Iterator[tuple[str, HookFunction]]:
        """Yields what is read and written in a layer."""
        for own in self.runs.pair.bridge.blocks[layer].sublayers:
            yield from self._of_heads(own) if own.kind == "attn" else self._of_whole(own)

    def _of_heads(self, own: Sublayer) -> Iterator[tuple[str, HookFunction]]:
        """Yields what an attention's heads read and write."""
        runs, graph = self.runs, self.runs.graph
        first, place = (
            places_of(graph.receivers, own.layer, own.name).start,
            places_of(graph.senders, own.layer, own.name).start,
        )
        for projection, count in (("q", graph.n_heads), ("k", graph.n_kv_heads), ("v", graph.n_kv_heads)):
            yield f"{own.block}.{projection_input(own.name, projection)}", self._given(first, count)
            first += count

        def keep(value: Tensor, hook: HookPoint) -> None:  # noqa: ARG001
            self._note(place, runs.heads(own, value))

        yield f"{own.part.path}.hook_z", keep

    def _of_whole(self, own: Sublayer) -> Iterator[tuple[str, HookFunction]]:
        """Yields what an MLP or a mixer reads and writes."""
        graph = self.runs.graph
        first, place = (
            places_of(graph.receivers, own.layer, own.name).start,
            places_of(graph.senders, own.layer, own.name).start,
        )

        def keep(value: Tensor, hook: HookPoint) -> None:  # noqa: ARG001
            self._note(place, exact(value)[None])

        yield own.hook_in, self._given(first)
        yield own.hook_out, keep

    def _note(self, first: int, writes: Float[Tensor, "sender circuit*row pos d_model"]) -> None:
        """Notes the changes of senders, from what they write."""
        own = writes.unflatten(1, (len(self.masks), -1)).flatten(2).transpose(0, 1)
        places = slice(first, first + len(writes))
        torch.sub(own, self.runs.writes[places], out=self.changes[:, places])

    def _given(self, first: int, count: int | None = None) -> HookFunction:
        """Returns what writes the inputs of receivers: of one, or of as many as a point shows by head."""

        def write(value: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
            streams = self._read(first, count or 1)
            by_row = streams[:, 0] if count is None else streams.movedim(1, 3)
            return by_row.flatten(0, 1).to(value)

        return write

    def _read(self, first: int, count: int) -> Float[Tensor, "circuit receiver row pos d_model"]:
        """Returns what neighbouring receivers read, all of one hook point."""
        runs, graph = self.runs, self.runs.graph
        before = graph.n_senders_before(graph.receivers[first])
        stream = exact(runs.corrupted.cache[graph.stream_of(graph.receivers[first])])
        chosen = self.masks[:, :before, first : first + count].transpose(1, 2).to(self.changes)
        if not runs.mixes:
            return stream + (chosen @ self.changes[:, :before]).unflatten(-1, stream.shape)
        alone = [place for place in range(before) if graph.senders[place].kind != "head"]
        found = stream + (chosen[..., alone] @ self.changes[:, :before][:, alone]).unflatten(-1, stream.shape)
        for (layer, name), mix in runs.mixes.items():
            heads = places_of(graph.senders, layer, name)
            if heads.stop <= before:
                changed = (chosen[..., heads] @ self.changes[:, heads]).unflatten(-1, stream.shape)
                found += mix.change_(changed)
        return found


# --- the result ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CircuitEvaluation(Effects):
    """Metrics of the runs of circuits, and of all edges that they leave out. The base is the corrupted run.

    The first axis, `run`, has `circuit`, `the rest`, and the draws of a control: `random 0`, `random 1`, ...
    """

    draws: ClassVar[Draws] = "share"

    @property
    def faithfulness(self) -> Float[Tensor, "circuit"]:
        """How far each circuit comes from the corrupted run (0) to the clean run (1); it may be beyond both."""
        return self.select(run="circuit").normalised()

    @property
    def completeness(self) -> Float[Tensor, "circuit"]:
        """How far all other edges come without the circuit: near 0 where the circuit has all that matters."""
        return self.select(run="the rest").normalised()

    @property
    def random(self) -> Float[Tensor, "draw circuit"]:
        """How far as many edges come that are drawn from all."""
        return self.select(run=[one for one in self.axes["run"] if str(one).startswith("random")]).normalised()

    @property
    def title(self) -> str:
        """What was measured, and what both runs give."""
        (name,), rows = self.values, counted(self.of().shape[-1], self.row)
        clean, corrupted = (number(float(one[name].mean())) for one in (self.sources["clean"], self.base))
        return (
            f"{self._what}: {name} ({clean} in the clean run, {corrupted} in the corrupted run; mean over {rows}), "
            "as a share of the way from the corrupted run to the clean run"
        )

    def chart(self, metric: str | None = None, *, draws: Draws | None = None, **at: Label | Sequence[Label]) -> Chart:
        """Returns the picture as data; see `Effects.chart`. Numbers of edges are on a logarithmic axis."""
        chart = super().chart(metric, draws=draws, **at)
        return replace(chart, is_log=True) if isinstance(chart, LineChart) else chart
