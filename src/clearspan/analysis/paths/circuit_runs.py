"""Runs of circuits on a pair of inputs, and what a metric says of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.places import Input
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.sweep import Metric
from clearspan.sweep.plan import half_of_free
from clearspan.sweep.readings import measured

from .circuit import Circuit
from .circuit_batch import CircuitBatch, CorruptedRun, Masks, streams_of
from .graph import ComputationalGraph
from .patching_pair import PatchingPair, PatchingRun
from .sender_changes import written

MOST = 2**28
"""Bytes that a batch takes by default at the most; larger ones were no faster."""


@dataclass(eq=False)
class CircuitRuns:
    """What runs circuits on one pair of inputs, many as the rows of one batch, and counts the runs.

    A receiver of a circuit's run reads the corrupted run's residual stream, plus, for each of its edges in the circuit,
    what the sender adds in this run less what it adds in the corrupted run. `embed` adds what it does in the clean run.
    So the run of all edges is the clean run, and that of none the corrupted run.

    Attributes:
        pair: The inputs. The clean run is its base.
        graph: The edges.
        clean: The clean run.
        corrupted: The corrupted run.
        outside: What the corrupted run gives to circuits.
        memory: Bytes that a batch may take.
        n_circuits: How many circuits were run.
        n_forwards: In how many batches.
    """

    pair: PatchingPair
    graph: ComputationalGraph
    clean: PatchingRun
    corrupted: PatchingRun
    outside: CorruptedRun
    memory: int
    n_circuits: int = 0
    n_forwards: int = 0

    @classmethod
    @torch.no_grad()
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
        pair = PatchingPair.of(bridge, clean, corrupted, metric, "noising", attention_mask)
        other = pair.source_run(list(dict.fromkeys([*written(bridge), *streams_of(graph)])))
        own = replace(pair, direction="denoising").source_run(["blocks.0.hook_resid_pre"])
        limit = min(MOST, half_of_free(bridge.device)) if memory is None else memory
        runs = cls(pair, graph, own, other, CorruptedRun.of(graph, other.cache, pair.mask), limit)
        ends = [runs._measured(run.output) for run in (own, other)]
        runs.clean, runs.corrupted = (replace(run, value=end) for run, end in zip((own, other), ends, strict=True))
        if not (ends[0].mean() - ends[1].mean()).abs() > 0:
            raise InvalidArgumentError(
                "the metric is the same in the clean and the corrupted run",
                expected="two inputs on which it differs",
                got=f"{ends[0].mean():.4g} in both",
            )
        return runs

    def metrics(self, circuits: Sequence[Circuit]) -> Float[Tensor, "circuit row"]:
        """Returns the metric of each circuit's run, on the CPU.

        Raises:
            InvalidArgumentError: A circuit of another graph.
        """
        for circuit in circuits:
            if circuit.graph != self.graph:
                raise InvalidArgumentError(
                    "the circuit is of another graph", expected=str(self.graph), got=str(circuit.graph)
                )
        return self.metrics_of(torch.stack([circuit.mask for circuit in circuits]))

    @torch.no_grad()
    def metrics_of(self, masks: Masks) -> Float[Tensor, "circuit row"]:
        """Returns the metric of each circuit's run, for circuits as masks.

        Batches are made in the order given; layers in which all of a batch read the same are run once.
        """
        embedded, found = self.clean.cache["resid_pre", 0], []
        for batch in masks.split(self._at_a_time):
            self.n_circuits, self.n_forwards = self.n_circuits + len(batch), self.n_forwards + 1
            streams = CircuitBatch.entering(self.outside, batch.to(embedded.device), embedded).last_streams()
            found += [self._measured(self._output(stream.to(embedded))) for stream in streams]
        return torch.stack(found)

    def shares(self, values: Float[Tensor, "*circuit row"]) -> Float[Tensor, "*circuit"]:
        """Returns where metrics are on the way from the corrupted run (0) to the clean run (1), of means over rows."""
        return shares(values, self.clean.value, self.corrupted.value)

    @property
    def _at_a_time(self) -> int:
        """How many circuits run together: their changes, and what a layer makes of inputs by head."""
        writes, cfg = self.outside.writes, self.pair.bridge.cfg
        streams = 2 * len(writes) + 8 * cfg.n_heads + 3 * cfg.d_mlp // cfg.d_model
        return max(1, self.memory // (streams * writes[0].nbytes))

    def _output(self, stream: Float[Tensor, "row pos d_model"]) -> Tensor:
        """Returns what the metric takes of a last residual stream."""
        return stream if self.pair.is_declared else self.pair.bridge.read_out(stream)

    def _measured(self, output: Tensor) -> Float[Tensor, "row"]:
        return measured(lambda _: self.pair.on_graph(output, self.corrupted, self.clean), output)


def shares(
    values: Float[Tensor, "*circuit row"], clean: Float[Tensor, "row"], corrupted: Float[Tensor, "row"]
) -> Float[Tensor, "*circuit"]:
    """Returns `(mean(values) - mean(corrupted)) / (mean(clean) - mean(corrupted))`, means over rows."""
    return (values.mean(-1) - corrupted.mean()) / (clean.mean() - corrupted.mean())
