"""Execution: one batch of a plan. Cells join it layer by layer, and leave it as what the metrics read."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan._forward.readout import read_out
from clearspan._run.continuation import BaseRun, positionwise_mlp
from clearspan._run.hooks import Hooks, hooks_of
from clearspan._run.sources import Sources
from clearspan.hf.growing import UnfitForGrowth
from clearspan.interventions import Written
from clearspan.interventions.joint import Placed, write_all
from clearspan.modes import no_grad
from clearspan.points import Address
from clearspan.sweep.plan import Cell, Tile
from clearspan.sweep.readings import Readings
from clearspan.sweep.ways import Way
from clearspan.transfers import Outbound, numbers_on

Rows = Float[Tensor, "cell*row pos d_model"]
"""The residual stream of a batch: a cell's rows next to each other, cells in the batch's order."""


@dataclass(frozen=True)
class Execution:
    """What the batches of a sweep have in common.

    Attributes:
        base: The run from which they go on.
        sources: Where sites take values from.
        readings: What is read of their logits.
        background: Sites that are written in every cell, and were in the base run.
        way: How a batch runs.
    """

    base: BaseRun
    sources: Sources
    readings: Readings
    background: tuple[Written, ...]
    way: Way

    @no_grad
    def run(self, tile: Tile) -> "Arriving":
        """Returns each metric of a batch's cells, in the batch's order, on its way to the CPU."""
        return Arriving(tile, self.readings.measures(self._logits(tile)))

    def _last_residual(self, tile: Tile) -> Rows:
        """Returns the residual stream after the last block, for all cells."""
        n_layers, keep = self._n_layers, self._positions_read(tile)
        starting = {start: list(cells) for start, cells in itertools.groupby(tile.cells, attrgetter("start"))}
        embedded, depths = starting.pop(-1, []), sorted({max(cell.start, 0) for cell in tile.cells})
        joining = {
            depth: self._joining(tile.first, depth, starting.get(depth, []), [] if depth else embedded)
            for depth in depths
        }
        after = joining.pop(n_layers, None)
        if not joining:
            assert after is not None, "a tile has cells"
            return after
        hooks = self._hooks(tile, joining)
        try:
            found = self.base.grown(joining, tile.first, hooks, keep, in_one=self.way.in_one)
        except UnfitForGrowth:  # at this position the model gives its blocks something that it did not in the trial
            found = self.base.grown(joining, tile.first, hooks, keep, in_one=False)
        return found if after is None else torch.cat([found, after.to(found.device)])

    @functools.cached_property
    def _layer_of(self) -> Callable[[str], int]:
        """The layer that a hook point is in, by its name, which is asked for each cell."""
        return functools.cache(self.base.model.index.layer_of)

    @property
    def _n_layers(self) -> int:
        return len(self.base.model.blocks)

    def _joining(self, first: int, start: int, own: Sequence[Cell], embedded: Sequence[Cell]) -> Rows:
        """Returns what enters a layer for the cells that start there, with their changes of the stream made.

        Args:
            first: The position at which the batch starts.
            start: The layer.
            own: The cells that start at the layer.
            embedded: The cells that start at the embeddings, in front of layer 0.
        """
        parts = []
        if embedded:
            placed = self._placed(Tile(first, tuple(embedded)), range(-1, 0))
            parts.append(self.base.embedded(first, len(embedded), hooks_of(placed, self.sources)))
        if own:
            entering = self.base.entering(start, first, len(own))
            placed = [
                (site, self._rows_of(number))
                for number, cell in enumerate(own)
                for site in cell.sites
                if stream_depth(site.site.point.name) == start
            ]
            write_all(entering, placed, self.sources.of)
            parts.append(entering)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _hooks(self, tile: Tile, joining: Mapping[int, Rows]) -> Hooks:
        """Returns hooks for the layers from the first one at which rows join."""
        before = dict(zip(joining, itertools.accumulate(map(len, joining.values()), initial=0), strict=False))
        embedded = self.base.rows * sum(cell.start < 0 for cell in tile.cells)
        placed = []
        for site, at in self._placed(tile, range(min(joining), self._n_layers)):
            depth = stream_depth(site.site.name)
            if at == slice(None) and depth in before:
                at = slice(0, max(before[depth], embedded))  # the rows that join from the base run have it
            placed += [(site, at)] if at != slice(0, 0) else []
        return hooks_of(placed, self.sources)

    def _placed(self, tile: Tile, layers: range) -> Iterator[Placed]:
        """Yields the sites in some layers, each with its rows; the background's are in all rows.

        What a cell changes of the stream that it joins with was changed then.
        """
        yield from ((site, slice(None)) for site in self.background if self._layer_of(site.site.name) in layers)
        for number, cell in enumerate(tile.cells):
            for site in cell.sites:
                name = site.site.point.name
                is_made = stream_depth(name) == cell.start and not self.way.is_whole
                if not is_made and self._layer_of(name) in layers:
                    yield site, self._rows_of(number)

    def _rows_of(self, number: int) -> slice:
        return slice(number * self.base.rows, (number + 1) * self.base.rows)

    def _positions_read(self, tile: Tile) -> list[int] | None:
        """Returns the positions whose last residual stream is read, counted in the batch; None for all."""
        mlp = positionwise_mlp(self.base.model)
        names = {site.site.point.name for cell in tile.cells for site in (*cell.sites, *self.background)}
        in_mlp = () if mlp is None else (f"{mlp.path}.",)
        if any(name.startswith(in_mlp) or self._layer_of(name) == self._n_layers for name in names):
            return None
        return [position - tile.first for position in self.readings.positions if position >= tile.first]

    def _logits(self, tile: Tile) -> Float[Tensor, "cell row position token"]:
        """Returns the logits that are read; those of positions before the batch's are the base run's."""
        base, readings, cells = self.base, self.readings, len(tile.cells)
        if self.way.is_whole:
            hooks = hooks_of(self._placed(tile, range(-1, self._n_layers + 1)), self.sources)
            return readings.taken(base.whole(cells, hooks)).unflatten(0, (cells, base.rows))
        before = [position for position in readings.positions if position < tile.first]
        after = [position - tile.first for position in readings.positions if position >= tile.first]
        known = [readings.taken(base.logits, before)] if before else []
        known = [one.expand(cells, *one.shape) for one in known]
        if not after:
            return known[0]
        residual = self._last_residual(tile)
        placed = list(self._placed(tile, range(self._n_layers, self._n_layers + 1)))
        if placed:
            new = readings.taken(base.read_out(residual, tile.first, hooks_of(placed, self.sources)), after)
        else:
            new = read_out(base.model, residual.index_select(1, numbers_on(residual.device, after)), readings.tokens)
        new = new.unflatten(0, (cells, base.rows))
        return torch.cat([*(one.to(new.device) for one in known), new], dim=-2) if known else new


class Arriving:
    """A batch's metrics on their way to the CPU, while the device may work on the next batch.

    Args:
        tile: The batch.
        values: Its metrics.
    """

    def __init__(self, tile: Tile, values: Mapping[str, Float[Tensor, "cell row"]]) -> None:
        self.tile = tile
        self._open = contextlib.ExitStack()
        outbound = self._open.enter_context(Outbound())
        self._values = {name: outbound.copy(one) for name, one in values.items()}

    def values(self) -> Mapping[str, Float[Tensor, "cell row"]]:
        """Returns the metrics when they are there."""
        self._open.close()
        return self._values


@functools.cache
def stream_depth(name: str) -> int | None:
    """Returns the layer whose input is the value of a hook point; see `Address.depth`."""
    return Address.parse(name).depth
