"""Execution: one batch of a plan. Cells join it layer by layer, and leave it as what the metrics read."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan._forward.readout import read_out
from clearspan._run.continuation import BaseRun, positionwise_mlp
from clearspan._run.hooks import Hooks, Placed, hooks_of
from clearspan._run.sources import Sources
from clearspan.interventions import Written
from clearspan.modes import no_grad
from clearspan.points import Address
from clearspan.sweep.plan import Tile
from clearspan.sweep.readings import Readings

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
    """

    base: BaseRun
    sources: Sources
    readings: Readings
    background: tuple[Written, ...] = ()

    @no_grad
    def run(self, tile: Tile) -> dict[str, Float[Tensor, "cell row"]]:
        """Returns each metric of a batch's cells, in the batch's order, on the CPU."""
        return self.readings.measured(self._logits(tile))

    def _last_residual(self, tile: Tile) -> Rows:
        """Returns the residual stream after the last block, for all cells."""
        n_layers, keep = self._n_layers, self._positions_read(tile)
        starts = sorted({max(cell.start, 0) for cell in tile.cells})
        rows: Rows | None = None
        for start, stop in zip(starts, [*starts[1:], n_layers], strict=True):
            before = 0 if rows is None else len(rows)
            joining = self._joining(tile, start)
            rows = joining if rows is None else torch.cat([rows.to(joining.device), joining])
            if start < n_layers:
                hooks = self._hooks(tile, start, stop, before, len(rows))
                rows = self.base.continued(rows, start, stop, tile.first, hooks, keep)
        assert rows is not None, "a tile has cells"
        return rows

    @property
    def _n_layers(self) -> int:
        return len(self.base.model.blocks)

    def _joining(self, tile: Tile, start: int) -> Rows:
        """Returns what enters a layer for the cells that start there, with their changes of the stream made."""
        embedded = [cell for cell in tile.cells if cell.start < 0 == start]
        own = [cell for cell in tile.cells if cell.start == start]
        parts = []
        if embedded:
            placed = self._placed(Tile(tile.first, tuple(embedded)), range(-1, 0))
            parts.append(self.base.embedded(tile.first, len(embedded), hooks_of(placed, self.sources)))
        if own:
            entering = self.base.entering(start, tile.first, len(own))
            for number, cell in enumerate(own):
                for site in cell.sites:
                    if stream_depth(site.site.name) == start:
                        site.write(entering, self.sources.of(site), self._rows_of(number))
            parts.append(entering)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _hooks(self, tile: Tile, start: int, stop: int, before: int, rows: int) -> Hooks:
        """Returns hooks for layers `start` to `stop`; the first `before` rows were running already."""
        running = Tile(tile.first, tile.cells[: rows // self.base.rows])
        embedded = self.base.rows * sum(cell.start < 0 for cell in running.cells)
        placed = []
        for site, at in self._placed(running, range(start, stop)):
            if at == slice(None) and stream_depth(site.site.name) == start:
                at = slice(0, max(before, embedded))  # the rows that join from the base run have it
            placed += [(site, at)] if at != slice(0, 0) else []
        return hooks_of(placed, self.sources)

    def _placed(self, tile: Tile, layers: range) -> Iterator[Placed]:
        """Yields the sites in some layers, each with its rows; the background's are in all rows.

        What a cell changes of the stream that it joins with was changed then.
        """
        layer_of = self.base.model.index.layer_of
        yield from ((site, slice(None)) for site in self.background if layer_of(site.site.name) in layers)
        for number, cell in enumerate(tile.cells):
            for site in cell.sites:
                if layer_of(site.site.name) in layers and stream_depth(site.site.name) != cell.start:
                    yield site, self._rows_of(number)

    def _rows_of(self, number: int) -> slice:
        return slice(number * self.base.rows, (number + 1) * self.base.rows)

    def _positions_read(self, tile: Tile) -> list[int] | None:
        """Returns the positions whose last residual stream is read, counted in the batch; None for all."""
        mlp, layer_of = positionwise_mlp(self.base.model), self.base.model.index.layer_of
        names = {site.site.name for cell in tile.cells for site in cell.sites} | {
            site.site.name for site in self.background
        }
        in_mlp = () if mlp is None else (f"{mlp.path}.",)
        if any(name.startswith(in_mlp) or layer_of(name) == self._n_layers for name in names):
            return None
        return [position - tile.first for position in self.readings.positions if position >= tile.first]

    def _logits(self, tile: Tile) -> Float[Tensor, "cell row position token"]:
        """Returns the logits that are read; those of positions before the batch's are the base run's."""
        base, tokens, cells = self.base, self.readings.tokens, len(tile.cells)
        columns = slice(None) if tokens is None else list(tokens)
        before = [position for position in self.readings.positions if position < tile.first]
        after = [position - tile.first for position in self.readings.positions if position >= tile.first]
        known = base.logits[:, before][..., columns]
        known = known.expand(cells, *known.shape)
        if not after:
            return known
        residual = self._last_residual(tile)
        placed = list(self._placed(tile, range(self._n_layers, self._n_layers + 1)))
        if placed:
            new = base.read_out(residual, tile.first, hooks_of(placed, self.sources))[:, after][..., columns]
        else:
            new = read_out(base.model, residual[:, after], tokens)
        new = new.unflatten(0, (cells, base.rows))
        return torch.cat([known.to(new.device), new], dim=-2) if before else new


def stream_depth(name: str) -> int | None:
    """Returns the layer whose input is the value of a hook point; see `Address.depth`."""
    return Address.parse(name).depth
