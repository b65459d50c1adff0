"""The two runs of a pair: what is kept of them, what the metric says of them, and its gradients."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan._run.caching import ScalarOfSome
from clearspan._run.hooks import Hooks
from clearspan._run.sources import Source
from clearspan.bridge import TransformerBridge
from clearspan.cache import ActivationCache
from clearspan.checks import check_counts
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Batch, Input
from clearspan.modes import no_grad, with_gradients
from clearspan.progress import Progress
from clearspan.results import number
from clearspan.sweep import Direction, Effects, Grid, LogitMetric, Metric, Pair, Sweep
from clearspan.sweep.metrics import Context, Reference, at_places
from clearspan.sweep.plan import half_of_free
from clearspan.sweep.readings import by_row, exact

MOST = 2**28
"""Bytes that a batch takes by default at the most; larger ones were no faster."""
FEW, FEW_ELSEWHERE = {"cpu": 16}, 512
"""Tokens that cost less than the start of a block, by kind of device: on a CPU as measured with blocks of width 768."""


@dataclass(frozen=True, eq=False)
class PairRun:
    """One run of a pair.

    Attributes:
        cache: What was kept.
        output: What the model returned: logits, or the last residual stream where only some logits are read out.
        measured: The metric of each row, where the model runs; one row where it is one number for all.
    """

    cache: ActivationCache
    output: Tensor
    measured: Float[Tensor, "row"]

    @cached_property
    def value(self) -> Float[Tensor, "row"]:
        """The metric on the CPU. It waits for the run, so that it is asked for last."""
        return exact(self.measured)


class PairRuns(Pair[Metric]):
    """A pair that is run and measured by one metric."""

    @classmethod
    def of(
        cls,
        bridge: TransformerBridge,
        clean: Input,
        corrupted: Input,
        metric: Metric,
        direction: Direction = "denoising",
        attention_mask: Tensor | None = None,
    ) -> Self:
        """Returns the pair, checked; see `Pair.of`.

        Raises:
            InvalidArgumentError: As `Pair.of`; or the metric is no function.
        """
        if not callable(metric):
            raise InvalidArgumentError(
                "the metric is a function of logits",
                expected="such as clearspan.sweep.LogitDifference(...), one and not several",
                got=repr(metric)[:80],
            )
        return super().of(bridge, clean, corrupted, metric, direction, attention_mask)

    def described(self, base: Float[Tensor, "row"], source: Float[Tensor, "row"]) -> str:
        """Returns the metric of both runs, in words."""
        ends = ((self.base_name, base), (self.source_name, source))
        return ", ".join(f"{name} run {number(float(values.mean()))}" for name, values in ends)

    @property
    def units(self) -> dict[str, str]:
        """The unit of the metric as that of an effect and a score, where it is known."""
        unit = self.metric.unit if isinstance(self.metric, LogitMetric) else ""
        return {"effect": unit, "score": unit} if unit else {}

    @property
    def reads_some_logits(self) -> bool:
        """Whether the metric says which logits it reads, and compares with no other run: then no others are made."""
        return isinstance(self.metric, LogitMetric) and self.metric.reference is None

    @property
    def stop(self) -> int | None:
        """Where runs stop: after the last block where only some logits are read out, else at the logits (None)."""
        return len(self.bridge.blocks) if self.reads_some_logits else None

    @property
    def run_together(self) -> bool:
        """Whether both runs are rows of one batch, since starting a block costs more than the tokens of another run.

        With gradients, the source's rows go through the backward too: then they cost as much again as by themselves.
        """
        alike = (self.base.embeds is None) == (self.source.embeds is None)
        return alike and self.base.rows * self.base.width <= FEW.get(self.bridge.device.type, FEW_ELSEWHERE)

    def runs(
        self, written: Sequence[str], names: Sequence[str], graded: Collection[str] = ()
    ) -> tuple[PairRun, PairRun]:
        """Returns the run that gives values and the one that is changed.

        Args:
            written: The points that are kept of the first.
            names: The points that are kept of the second.
            graded: The points at which the gradients of the metric are kept.
        """
        if not self.run_together:
            source = self.source_run(written)
            return source, self.graded_run(names, source, graded=graded) if graded else self.base_run(names, source)
        rows, found = self.base.rows, dict[str, Tensor]()

        def total(output: Tensor) -> Tensor:
            own, other = output[:rows].detach(), output[rows:].detach()
            found["base"], found["source"] = self._each(output, (self.base, self.source), (own, other), other)
            return found["base"].sum()

        batch, both = self.base.joined(self.source), list(dict.fromkeys([*written, *names]))
        output, cache = self._run(batch, both, total, graded)
        if not graded:
            total(output)
        parts = {"base": slice(None, rows), "source": slice(rows, None)}
        source, base = (
            PairRun(cache.apply_slice_to_batch_dim(parts[name]), output[parts[name]], found[name].detach())
            for name in ("source", "base")
        )
        return source, base

    def _run(
        self,
        batch: Batch,
        names: Sequence[str],
        total: Callable[[Tensor], Tensor] | None = None,
        graded: Collection[str] = (),
        fwd_hooks: Hooks = (),
    ) -> tuple[Tensor, ActivationCache]:
        """Returns what a run returned and kept, with gradients of a function of the former at some points."""

        def run() -> tuple[Tensor, ActivationCache]:
            incl_bwd = ScalarOfSome(total, tuple(graded)) if total is not None and graded else False
            return self.bridge.run_with_cache(
                batch, list(names), incl_bwd=incl_bwd, stop_at_layer=self.stop, fwd_hooks=fwd_hooks
            )

        return with_gradients(bool(graded), run)

    @no_grad
    def source_run(self, names: Sequence[str]) -> PairRun:
        """Returns the run that gives values, with some points kept."""
        output, cache = self._run(self.source, names)
        return PairRun(cache, output, by_row(self._measure(output, self.source, output, output), output))

    @no_grad
    def base_run(self, names: Sequence[str], source: PairRun) -> PairRun:
        """Returns the run that is changed, with some points kept."""
        output, cache = self._run(self.base, names)
        return PairRun(cache, output, by_row(self.of_output(output, source), output))

    def graded_run(
        self,
        names: Sequence[str],
        source: PairRun,
        base: PairRun | None = None,
        fwd_hooks: Hooks = (),
        *,
        graded: Collection[str] | None = None,
        copies: int = 1,
    ) -> PairRun:
        """Returns the run that is changed, with some points kept and the gradients of the metric there.

        Args:
            names: The points.
            source: The other run.
            base: The run that is changed, where hooks make this one another.
            fwd_hooks: Hooks on the run.
            graded: The points that have gradients; all of these by default.
            copies: How often the rows are in the run, copy after copy; the metric is that of the last one.
        """
        values: list[Tensor] = []

        def total(output: Tensor) -> Tensor:
            references = [copy.detach() if base is None else base.output for copy in output.split(self.base.rows)]
            every = self._each(output, [self.base] * copies, references, source.output)
            values.append(every[-1].detach())
            return torch.cat(every).sum()

        batch = self.base.repeated(copies)
        output, cache = self._run(batch, names, total, names if graded is None else graded, fwd_hooks)
        return PairRun(cache, output, values[0])

    def of_output(self, output: Tensor, source: PairRun, base: PairRun | None = None) -> Float[Tensor, "*row"]:
        """Returns the metric of what a run of the base returned, on its graph. Arguments are those of `graded_run`."""
        return self._measure(output, self.base, output.detach() if base is None else base.output, source.output)

    def check_slope(self) -> None:
        """Raises if the metric's gradient at the base is zero whatever the model: its distance from the base itself."""
        if isinstance(self.metric, LogitMetric) and self.metric.reference in ("base", self.base_name):
            raise InvalidArgumentError(
                f"the gradient of {self.metric_name} from the base run is zero at the base run",
                got=f"against={self.metric.reference!r}",
                reason="there it is least, so that a first-order approximation of every effect is zero",
                fix=f"against={self.source_name!r}, or edge_attribution(..., steps=5)",
            )

    def _each(
        self, output: Tensor, batches: Sequence[Batch], bases: Sequence[Tensor], source: Tensor
    ) -> list[Float[Tensor, "*row"]]:
        """Returns the metric of each of several inputs that were run together, in order.

        Args:
            output: What the run returned.
            batches: The inputs.
            bases: For each, what the run that is changed returned.
            source: What the other run returned.
        """
        copies = output.split(self.base.rows)
        if isinstance(self.metric, LogitMetric) and self.reads_some_logits:
            metric, places = self.metric, [self.metric.places(batch) for batch in batches]
            there = [one for one in places if one is not None]
            logits = self.bridge.read_out(at_places(output, torch.cat(there) if there else None), metric.tokens)
            parts = zip(logits.split(self.base.rows), batches, strict=True)
            every = [metric.of(own, Context(batch)) for own, batch in parts]
        else:
            every = [self._measure(*one, source) for one in zip(copies, batches, bases, strict=True)]
        return [by_row(found, copy) for found, copy in zip(every, copies, strict=True)]

    def _measure(self, output: Tensor, batch: Batch, base: Tensor, source: Tensor) -> Float[Tensor, "*row"]:
        """Returns the metric of what a run returned.

        Args:
            output: What it returned.
            batch: Its input.
            base: What the run that is changed returned.
            source: What the other run returned.
        """
        if not isinstance(self.metric, LogitMetric):
            return self.metric(output)
        if self.reads_some_logits:
            logits = self.bridge.read_out(at_places(output, self.metric.places(batch)), self.metric.tokens)
            return self.metric.of(logits, Context(batch))
        own, other = Reference(base, self.base), Reference(source, self.source)
        return self.metric.measure(output, Context(batch, {"base": own, self.base_name: own, self.source_name: other}))


def swept(
    pair: Pair[Any],
    grid: Grid,
    sources: Mapping[str, Source] | None = None,
    memory: int | None = None,
    *,
    progress: bool | Progress = False,
) -> Effects:
    """Returns the metric of a pair's base run with each cell's interventions, computed exactly.

    Args:
        pair: The pair. The run that gives values is a source; so is the base where a metric compares with it.
        grid: The cells.
        sources: Further sources.
        memory: Bytes that a batch may take.
        progress: As for `Sweep.run`.
    """
    _check_memory(memory)
    every: dict[str, Source] = {pair.source_name: pair.source, **(sources or {})}
    metrics = pair.metric.values() if isinstance(pair.metric, Mapping) else [pair.metric]
    if any(isinstance(one, LogitMetric) and one.reference == pair.base_name for one in metrics):
        every[pair.base_name] = pair.base
    return Sweep(pair.bridge, pair.base, grid, pair.metric, sources=every).run(memory, progress=progress)


def copies_at_a_time(pair: Pair[Any], memory: int | None, streams: int) -> int:
    """Returns how many copies of a pair's rows run in one batch.

    Args:
        pair: The pair.
        memory: Bytes that a batch may take; None for a default.
        streams: How many tensors `[row, pos, d_model]` in float32 a copy takes.
    """
    _check_memory(memory)
    limit = min(MOST, half_of_free(pair.bridge.device)) if memory is None else memory
    one = 4 * pair.base.rows * pair.base.width * pair.bridge.cfg.d_model
    return max(1, limit // (streams * one))


def copies_with_graph(pair: PairRuns) -> int:
    """Returns how many copies of a pair's rows run in one batch with a graph, which keeps what each layer computed."""
    cfg, device = pair.bridge.cfg, pair.bridge.device
    logits = 0 if pair.reads_some_logits else 3 * cfg.d_vocab
    layer = 3 * cfg.d_mlp + 2 * cfg.n_heads * pair.base.width
    streams = 12 * cfg.n_layers + (cfg.n_layers * layer + logits) // cfg.d_model
    return copies_at_a_time(pair, None if device.type == "cpu" else half_of_free(device), streams)


def _check_memory(memory: int | None) -> None:
    if memory is not None:
        check_counts(memory=memory)


def listed(name: str, given: Any, *one: type) -> list[Any]:
    """Returns an argument that is one thing of some types, or several, as a list.

    Raises:
        InvalidArgumentError: It is neither, or empty.
    """
    if isinstance(given, one):
        return [given]
    is_several = isinstance(given, Iterable) and not (isinstance(given, Tensor) and not given.ndim)
    found = list(given) if is_several else []
    if not found:
        raise InvalidArgumentError(f"{name}={given!r}"[:100], expected="a list, not empty")
    return found


def shuffled(count: int, seed: int) -> list[int]:
    """Returns the numbers below a count in random order. Torch's own seed is neither read nor changed."""
    check_counts(0, seed=seed)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
