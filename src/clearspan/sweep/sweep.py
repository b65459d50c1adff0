"""Sweeps: many interventions on one input, planned into few batches, run, kept and resumed."""

import functools
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan._forward.given import prepare
from clearspan._run.continuation import BaseRun, Beside, base_run, check_undisturbed
from clearspan._run.hooks import hooks_of, sites_of
from clearspan._run.sources import Source, batch_of_source, checked_sources, gathered, points_read
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, check_kind, path_of
from clearspan.effects import Effects
from clearspan.errors import InvalidArgumentError, argument
from clearspan.files import read_tensors, write_tensors
from clearspan.hf.growing import Extent, Given
from clearspan.inputs import Batch, Input
from clearspan.interventions import Intervention
from clearspan.interventions.intervention import interventions_of
from clearspan.interventions.site import all_written
from clearspan.model import check_bridge
from clearspan.modes import eager, no_grad
from clearspan.points import HookPoint
from clearspan.progress import Progress, shown
from clearspan.results import Shown, Summary, counted
from clearspan.sweep.costs import Costs
from clearspan.sweep.execution import Arriving, Execution, stream_depth
from clearspan.sweep.experiment import Experiment, Inputs, ModelIdentity, fingerprint, versions
from clearspan.sweep.findings import Findings
from clearspan.sweep.grid import Grid
from clearspan.sweep.labels import position_texts
from clearspan.sweep.metrics import Context, LogitMetric, Metric, Reference, check_vocabulary
from clearspan.sweep.plan import (
    Cell,
    Sizes,
    SweepPlan,
    Tile,
    bytes_of_base,
    bytes_per_row,
    bytes_per_token,
    half_of_free,
    tiles_of,
    watches_attention,
)
from clearspan.sweep.readings import Readings
from clearspan.sweep.ways import Way, way_of

FORMAT = "clearspan sweep 1"


class Sweep(Shown):
    r"""Metrics of one input under many interventions, each cell of a grid on its own.

    Cells run as rows of few batches. A batch starts at the first position that any of its cells changes, on the base
    run's keys and values of the positions before, and a cell joins it at the first layer that it changes, with the base
    run's residual stream. What is computed is what one forward per cell computes.

    Args:
        bridge: The model, in evaluation mode, with no other hooks on it.
        input: The run that is changed. Each cell has all its rows. A row that lacks a position that its cell changes is
            NaN there.
        grid: The cells; or interventions by label.
        metric: What is measured of the logits, or several by name. A `LogitMetric` (`LogitDifference`, `Probability`,
            `KLDivergence`, `NextTokenLoss`) says which logits it reads, and no others are computed; any other function
            is given those of each cell `[row, pos, d_vocab]`.
        sources: The runs from which values are taken, by name: any input, a cache, or tensors by point's full name.
        background: Interventions that are made in every cell, and in the run that is changed.
        attention_mask: Of an input of token ids with padding.

    Attributes:
        batch: The input.
        findings: What was found so far.

    Example:
        >>> import clearspan
        >>> from clearspan.interventions import Patch
        >>> from clearspan.sweep import LogitDifference, Sweep, grid
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> metric = LogitDifference.between(bridge, " os", " re")
        >>> cells = grid("resid_pre", Patch(), layer=range(5), position=range(5))
        >>> sweep = Sweep(bridge, "import re\nimport", cells, metric, sources={"clean": "import os\nimport"})
        >>> sweep.run().mean().shape
        torch.Size([5, 5])
    """

    def __init__(
        self,
        bridge: TransformerBridge,
        input: Input,
        grid: Grid | Mapping[str, Intervention | Sequence[Intervention]],
        metric: Metric | Mapping[str, Metric],
        *,
        sources: Mapping[str, Source] | None = None,
        background: Sequence[Intervention] = (),
        attention_mask: Int[Tensor, "row pos"] | None = None,
    ) -> None:
        check_bridge(bridge)
        self.bridge = bridge
        self.grid = grid if isinstance(grid, Grid) else Grid.of(grid)
        self.metrics = _named(metric)
        for one in self.metrics.values():
            if isinstance(one, LogitMetric):
                check_vocabulary(one.tokens or (), bridge.cfg.d_vocab)
        self.sources = dict(checked_sources(sources))
        self.background = interventions_of(background)
        self.batch = bridge.to_batch(input, attention_mask)
        _ = self.batch.ids  # a sweep runs on tokens
        self._background = tuple(site.on(self.batch) for site in sites_of(bridge, background))
        self._cells = self._laid()
        self.findings = Findings.none(len(self._cells))
        self._weights: str | None = None  # the fingerprint of an unfinished sweep's model

    def _laid(self) -> tuple[Cell, ...]:
        is_whole, layer_of, cells = bool(self.whole), self.bridge.index.layer_of, list[Cell]()
        sites = sites_of(self.bridge, itertools.chain.from_iterable(self.grid.cells))
        start_of, laid = functools.cache(self._start_of), all_written(sites, self.batch)
        for number, interventions in enumerate(self.grid.cells):
            own = list(itertools.islice(laid, len(interventions)))
            if not own:
                raise InvalidArgumentError(f"cell {number} changes nothing", expected="an intervention or more")
            if len(own) > 1:
                # In the order of the forward: what leaves a block comes before what enters the next one.
                own.sort(key=lambda one: layer_of(one.site.name))
            lacking = tuple(map(any, zip(*[one.lacking for one in own], strict=True)))
            if all(lacking):
                for one in own:
                    one.site.on(self.batch)  # raises, naming the row
            start = min([start_of(one.site.point) for one in own])
            first = 0 if is_whole else min([one.first for one in own])
            cells.append(Cell(number, tuple(own), start, first, lacking))
        return tuple(cells)

    def _start_of(self, point: HookPoint) -> int:
        """Returns the layer from which a run starts that writes at a point: -1 for the embeddings."""
        depth = stream_depth(point.name)
        layer = self.bridge.index.layer_of(point.name) if depth is None else depth
        return self.bridge.firsts[layer] if layer >= 0 else layer

    @property
    def _way(self) -> Way:
        """How batches run."""
        if any(cell.start < 0 for cell in self._cells) and self.bridge.reads_tokens:
            return Way(is_whole=True, reason="blocks have inputs of their own that the model makes of the embeddings")
        return way_of(self.bridge, prepare(self.bridge, self.batch), with_prefix=self.whole is None)

    @functools.cached_property
    def whole(self) -> str | None:
        """Why sequences are run whole, or None where they start at the first position that changes."""
        if self.batch.attention is not None:
            return "the attention mask is not one of padding"
        return self.bridge.whole_sequences

    def _summary(self) -> Summary:
        done, count = int(self.findings.done.sum()), len(self._cells)
        rows = [[axis, len(places), str(places[0]), str(places[-1])] for axis, places in self.grid.axes]
        metrics = f"{', '.join(self.metrics)} on {counted(self.batch.rows, 'row')} of {self.batch.width} positions"
        left = [f"{count - done} to run: .plan() says how, .run() runs them"] if done < count else []
        name = self.bridge.cfg.model_name or self.bridge.cfg.architecture
        return Summary(
            f"Sweep of {counted(count, 'cell')} in {name}, {done} run",
            ["axis", "places", "first", "last"],
            rows,
            [f"metric: {metrics}"],
            left,
        )

    # --- plan --------------------------------------------------------------------------------------------------------

    @eager
    def plan(self, memory: int | None = None, costs: Costs | None = None) -> SweepPlan:
        """Returns the batches in which the cells run, with their work, bytes and time; no cell is run.

        The first plan for a model runs a few short forwards: to measure what blocks cost on its device, and to find out
        whether a batch can grow inside one forward of it.

        Args:
            memory: Bytes that a batch may take; by default half of what is free.
            costs: What blocks cost, from which batches are chosen; by default what was measured.

        Raises:
            InvalidArgumentError: The model is in training mode, or other hooks are on it.
        """
        check_undisturbed(self.bridge)
        if memory is not None:
            check_counts(memory=memory)
        check_kind(Costs, type(None), costs=costs)
        cells = [cell for cell, done in zip(self._cells, self.findings.done.tolist(), strict=True) if not done]
        rows, length = self.batch.rows, self.batch.width
        cfg, readings, way, whole = self.bridge.cfg, self._readings(Context(self.batch)), self._way, self.whole
        if way.is_whole or not way.after_prefix:
            whole = whole or way.reason
            cells = [replace(cell, first=0, start=0 if way.is_whole else cell.start) for cell in cells]
        names = {written.site.point.name for cell in cells for written in (*cell.sites, *self._background)}
        sizes = Sizes(
            rows,
            length,
            cfg.n_layers,
            bytes_per_token(cfg, length, names),
            bytes_per_row(cfg, length, readings, has_prefix=whole is None),
            half_of_free(self.bridge.device) if memory is None else memory,
        )
        costs = Costs.of(self.bridge) if costs is None else costs
        tiles = tiles_of(cells, sizes, costs if way.in_one else costs.apart()) if cells else ()
        together = () if watches_attention(names) else tuple(self._beside(costs))
        depths, base_rows = len({max(cell.start, 0) for cell in cells}), rows * (1 + len(together))
        base = bytes_of_base(cfg, base_rows, length, depths, has_prefix=whole is None)
        return SweepPlan(tiles, sizes, costs, way, base, whole, readings.describe(cfg.d_vocab), together)

    def _beside(self, costs: Costs) -> dict[str, Batch]:
        """Returns the sources that can be further rows of the base run's forward, by name.

        There are none where the base run has interventions of its own, or where so many tokens are no faster together.
        """
        own = self.batch
        if self._background or own.attention is not None:
            return {}
        found = {
            name: batch
            for name, batch in self._source_inputs().items()
            if batch.tokens is not None and batch.attention is None and batch.is_laid_out_as(own)
        }
        return found if (1 + len(found)) * own.rows * own.width <= costs.most else {}

    def _readings(self, context: Context) -> Readings:
        return Readings.of(self.metrics, context)

    # --- run ---------------------------------------------------------------------------------------------------------

    @no_grad
    @eager
    def run(
        self, memory: int | None = None, costs: Costs | None = None, *, progress: bool | Progress = True
    ) -> Effects:
        """Runs the cells that were not run yet, and returns the metrics of all.

        Interrupting (Ctrl-C) keeps the finished cells; `run` resumes, also after `save` and `load`.

        Args:
            memory: Bytes that a batch may take; by default half of what is free. A batch for which memory does not
                suffice all the same is run in halves.
            costs: What blocks cost; see `plan`.
            progress: Whether a bar is shown, where standard error is a terminal; or a function that is told instead.

        Raises:
            InvalidArgumentError: The model is in training mode, other hooks are on it, a source does not fit, a metric
                gives no number for each row, or the weights are not those of the cells that were run already.
        """
        plan = self.plan(memory, costs)
        if plan.tiles:
            self._check_weights()
            try:
                self._run(plan, progress)
            finally:
                if not self.findings.done.all():
                    self._weights = fingerprint(self.bridge.hf_model)
        return self.result()

    def _check_weights(self) -> None:
        """Raises if cells were run with other weights."""
        is_known = self._weights is not None and bool(self.findings.done.any())
        if is_known and fingerprint(self.bridge.hf_model) != self._weights:
            raise InvalidArgumentError(
                "the weights are not those of the cells that were run already",
                got=f"{int(self.findings.done.sum())} of {len(self._cells)} cells, run before the weights changed",
                fix="a new Sweep, which runs them all",
            )

    def _run(self, plan: SweepPlan, progress: bool | Progress) -> None:
        execution, left = self._execution(plan), list(reversed(plan.tiles))
        on_their_way: deque[Arriving] = deque()
        with shown(progress) as tell:
            try:
                while left:
                    tile = left.pop()
                    found = _unless_memory_is_short(execution, tile)
                    if found is None:
                        left += reversed(tile.halves())
                        continue
                    on_their_way.append(found)
                    if len(on_their_way) > 1:  # a device is given the next batch before the numbers of one are awaited
                        self._keep(on_their_way.popleft(), plan, tell)
            finally:
                while on_their_way:
                    self._keep(on_their_way.popleft(), plan, tell)

    def _keep(self, found: Arriving, plan: SweepPlan, tell: Progress) -> None:
        cells = found.tile.cells
        self.findings.keep([cell.number for cell in cells], _where_there_is(found.tile, found.values()))
        left = len(self._cells) - int(self.findings.done.sum())
        tell("sweep", plan.cells - left, plan.cells)

    def result(self) -> Effects:
        """Returns the metrics of the cells that were run; NaN for the others."""
        found = self.findings
        if not found.values:
            raise InvalidArgumentError("no cell was run", fix="sweep.run()")
        shaped = {name: values.unflatten(0, self.grid.shape) for name, values in found.values.items()}
        axes = dict(self.grid.axes)
        texts = position_texts(self.bridge, self.batch, axes)
        units = {name: one.unit for name, one in self.metrics.items() if isinstance(one, LogitMetric) and one.unit}
        return Effects(shaped, axes, found.base, found.sources, texts, units=units)

    @eager
    @no_grad
    def check(self, cells: int = 8, seed: int = 0) -> float:
        """Returns the largest difference of some cells from one whole forward for each, over the largest value.

        Args:
            cells: How many cells are run again, one by one.
            seed: Of their choice.
        """
        check_counts(cells=cells)
        check_counts(0, seed=seed)
        found = self.result()
        order = torch.randperm(len(self._cells), generator=torch.Generator().manual_seed(seed))[:cells].tolist()
        chosen = [number for number in order if not any(self._cells[number].lacking)]
        written = [one.site for number in chosen for one in self._cells[number].sites]
        background = [one.site for one in self._background]
        sources = gathered(self.bridge, [*written, *background], self.sources, self.batch).runs
        base = self._base_run([self.bridge.cfg.n_layers], with_prefix=False)
        readings = self._readings(self._context(base, self._source_inputs(), {}))
        worst = 0.0
        for number in chosen:
            interventions = [*self.background, *self.grid.cells[number]]
            logits = self.bridge(self.batch, interventions=interventions, sources=sources)
            for name, value in readings.of_run(logits).items():
                own = found.of(name).flatten(0, -2)
                worst = max(worst, float((own[number] - value).abs().max() / own[~own.isnan()].abs().max()))
        return worst

    def _execution(self, plan: SweepPlan) -> Execution:
        starts = {max(cell.start, 0) for tile in plan.tiles for cell in tile.cells}
        with_prefix = any(tile.first for tile in plan.tiles)
        sites = [written.site for cell in self._cells for written in cell.sites]
        read, inputs = points_read(self.bridge, sites), self._source_inputs()
        beside = {name: Beside(inputs[name], read.get(name, ())) for name in plan.together}
        base = self._base_run(sorted(starts), plan.way.given, beside, with_prefix=with_prefix)
        everywhere = [written.site for written in self._background]
        sources = gathered(self.bridge, [*sites, *everywhere], {**self.sources, **base.beside}, self.batch)
        runs = {**base.beside, **sources.runs}
        known = {name: run.logits for name, run in runs.items() if run.logits is not None}
        readings = self._readings(self._context(base, inputs, known))
        background = tuple(replace(one, was_before=not plan.way.is_whole) for one in self._background)
        return Execution(base, sources, readings, background, plan.way)

    def _base_run(
        self,
        layers: Sequence[int],
        known: dict[Extent, Given] | None = None,
        beside: Mapping[str, Beside] = {},
        *,
        with_prefix: bool,
    ) -> BaseRun:
        given = prepare(self.bridge, self.batch)
        sources = gathered(self.bridge, [written.site for written in self._background], self.sources, self.batch)
        hooks = hooks_of([(written, slice(None)) for written in self._background], sources)
        return base_run(self.bridge, given, layers, hooks, with_prefix=with_prefix, known=known, beside=beside)

    def _context(self, base: BaseRun, inputs: Mapping[str, Batch], known: Mapping[str, Tensor]) -> Context:
        """Returns what metrics need besides logits, and measures the base run and the sources.

        Args:
            base: The base run.
            inputs: The sources that were given as inputs.
            known: Logits of sources that were run already.
        """
        wanted = {metric.reference for metric in self.metrics.values() if isinstance(metric, LogitMetric)}
        references = {"base": Reference(base.logits, self.batch)}
        context = Context(self.batch, references)
        sources: dict[str, Reference] = {}
        for name, batch in inputs.items():
            is_alike = torch.equal(batch.lengths, self.batch.lengths)
            if is_alike and (name in wanted or name not in self.findings.sources):
                logits = known[name] if name in known else self.bridge(batch)
                sources[name] = Reference(logits, batch)
                if name in wanted:
                    references[name] = sources[name]
        self.findings.base = self._all_measured(base.logits, context)
        for name, run in sources.items():
            self.findings.sources[name] = self._all_measured(run.logits, Context(run.batch, references))
        return context

    def _all_measured(self, logits: Tensor, context: Context) -> dict[str, Tensor]:
        return self._readings(context).of_run(logits)

    def _source_inputs(self) -> dict[str, Batch]:
        """Returns the sources that were given as inputs."""
        found: dict[str, Batch | None] = {}
        for name, source in self.sources.items():
            with argument(f"sources, {name!r}"):
                found[name] = batch_of_source(self.bridge, source, self.batch)
        return {name: given for name, given in found.items() if given is not None}

    # --- files -------------------------------------------------------------------------------------------------------

    def experiment(self) -> Experiment:
        """Returns the sweep as data, which can be stored and run again.

        Raises:
            InvalidArgumentError: A metric is a plain function, or a source a cache: these cannot be stored.
        """
        metrics = {name: metric for name, metric in self.metrics.items() if isinstance(metric, LogitMetric)}
        inputs = self._source_inputs()
        lost = [*(self.metrics.keys() - metrics.keys()), *(self.sources.keys() - inputs.keys())]
        if lost:
            raise InvalidArgumentError(
                f"{', '.join(map(repr, lost))} cannot be stored",
                reason="a plain function or a cache is no data",
                fix="a metric of clearspan.sweep, and sources as text or token ids",
            )
        return Experiment(
            ModelIdentity.of(self.bridge),
            Inputs.of(self.batch),
            {name: Inputs.of(source) for name, source in inputs.items()},
            self.grid,
            self.background,
            metrics,
            versions(),
        )

    def save(self, path: str | Path) -> None:
        """Writes the experiment and what was found so far to one safetensors file."""
        write_tensors(path, FORMAT, self.findings.tensors(), {"experiment": self.experiment().to_json()})

    @classmethod
    def of(cls, experiment: Experiment, bridge: TransformerBridge) -> Self:
        """Returns the sweep of a stored experiment.

        Raises:
            InvalidArgumentError: It was made for another model.
        """
        check_kind(Experiment, experiment=experiment)
        experiment.check_model(bridge)
        sources = {name: source.batch() for name, source in experiment.sources.items()}
        return cls(
            bridge,
            experiment.input.batch(),
            experiment.grid,
            experiment.metrics,
            sources=sources,
            background=experiment.background,
        )

    @classmethod
    def load(cls, path: str | Path, bridge: TransformerBridge) -> Self:
        """Returns the sweep of a file that `save` wrote, with what was found; `run` resumes.

        Raises:
            InvalidArgumentError: The file is no sweep, is damaged, or was made for another model.
        """
        tensors, metadata = read_tensors(path, FORMAT, what="sweep", written_by="Sweep.save")
        try:
            experiment = Experiment.from_json(metadata.get("experiment", ""))
            findings = Findings.of_tensors(tensors, len(experiment.grid.cells), experiment.metrics)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{path_of(path).name} is damaged", reason=error.message) from error
        sweep = cls.of(experiment, bridge)
        sweep.findings, sweep._weights = findings, experiment.model.fingerprint
        return sweep


def _named(metric: Metric | Mapping[str, Metric]) -> dict[str, Metric]:
    found: dict[str, Metric]
    match metric:
        case Mapping():
            found = dict(metric)
        case LogitMetric():
            found = {metric.kind: metric}
        case _:
            name = getattr(metric, "__name__", "metric")
            found = {"metric" if name == "<lambda>" else str(name): metric}
    if not found or not all(callable(one) for one in found.values()):
        raise InvalidArgumentError(
            "a sweep measures a metric",
            expected="a function of logits, a LogitMetric, or several by name",
            got=repr(metric)[:80],
        )
    return found


def _where_there_is(tile: Tile, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a batch's metrics, NaN in the rows that lack a position that their cell changes."""
    lacking = torch.tensor([cell.lacking for cell in tile.cells])
    found = {}
    for name, one in values.items():
        hidden = lacking if one.shape == lacking.shape else lacking.any(-1, keepdim=True)
        found[name] = one.masked_fill(hidden, torch.nan)
    return found


def _unless_memory_is_short(execution: Execution, tile: Tile) -> Arriving | None:
    """Returns a batch's metrics on their way, or None where memory did not suffice and the batch can be halved."""
    try:
        return execution.run(tile)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_short = type(error) is not RuntimeError or "can't allocate memory" in str(error)
        if not is_short or len(tile.cells) == 1:
            raise
    if execution.base.model.device.type == "cuda":
        torch.cuda.empty_cache()
    return None
