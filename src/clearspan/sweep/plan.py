"""Plans: which cells run together, from which layer and position on, chosen by a cost model. Data: nothing is run."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from jaxtyping import Float, Int

from clearspan._cache.memory import bytes_as_text, free_bytes
from clearspan.config import TransformerBridgeConfig
from clearspan.interventions import Written
from clearspan.results import Shown, Summary
from clearspan.sweep.costs import Costs
from clearspan.sweep.readings import Readings
from clearspan.sweep.ways import Way


@dataclass(frozen=True)
class Cell:
    """One experiment, laid on a model and a run.

    Attributes:
        number: Its place in the grid.
        sites: What is done, in the order of the forward.
        start: The first layer that changes: -1 for the embeddings, `n_layers` for what comes after the blocks.
        first: The first column that changes.
        lacking: The rows that lack a position which the cell changes.
    """

    number: int
    sites: tuple[Written, ...]
    start: int
    first: int
    lacking: tuple[bool, ...] = ()


_IN_ORDER = attrgetter("start", "number")
"""The order of a batch's cells: those that start earlier first."""


@dataclass(frozen=True)
class Tile:
    """Cells that run as the rows of one batch. Each joins it at the layer where it starts.

    Attributes:
        first: The position at which the batch's sequences start.
        cells: The cells, those that start earlier first.
    """

    first: int
    cells: tuple[Cell, ...]

    def halves(self) -> "tuple[Tile, Tile]":
        """Returns the tile in two."""
        middle = len(self.cells) // 2
        return Tile(self.first, self.cells[:middle]), Tile(self.first, self.cells[middle:])


@dataclass(frozen=True)
class Sizes:
    """What a plan depends on besides its cells.

    Attributes:
        rows: Rows of the input, which each cell has.
        length: Its positions.
        n_layers: Blocks.
        bytes_per_token: Of a batch, at the most.
        bytes_per_row: Of a batch's logits.
        memory: Bytes that a batch may take.
    """

    rows: int
    length: int
    n_layers: int
    bytes_per_token: int
    bytes_per_row: int
    memory: int


@dataclass(frozen=True, repr=False)
class SweepPlan(Shown):
    """The batches of a sweep.

    Attributes:
        tiles: The batches, in the order in which they run.
        sizes: Of the run.
        costs: What blocks cost.
        way: How a batch runs.
        base_bytes: What the base run keeps: residual streams, keys and values, logits.
        whole: Why sequences are run whole, or None where they start at the first position that changes.
        reads: What of the logits is computed.
        together: The sources that run in one forward with the base run, as further rows.
    """

    tiles: tuple[Tile, ...]
    sizes: Sizes
    costs: Costs
    way: Way
    base_bytes: int
    whole: str | None
    reads: str
    together: tuple[str, ...] = ()

    @property
    def cells(self) -> int:
        """How many cells."""
        return sum(len(tile.cells) for tile in self.tiles)

    @property
    def forwards(self) -> float:
        """The work of the blocks, in whole forwards of the input."""
        return sum(map(self._work, self.tiles))

    @property
    def seconds(self) -> float:
        """How long the batches take, as predicted from what was measured of the model; without the base run."""
        return sum(map(self._seconds, self.tiles))

    @property
    def nbytes(self) -> int:
        """Bytes that the run takes at its most, as predicted: the base run, and the largest batch."""
        return self.base_bytes + max((self._bytes(tile) for tile in self.tiles), default=0)

    def _work(self, tile: Tile) -> float:
        layers = sum(self.sizes.n_layers - max(cell.start, 0) for cell in tile.cells)
        return layers * (self.sizes.length - tile.first) / (self.sizes.n_layers * self.sizes.length)

    def _seconds(self, tile: Tile) -> float:
        running = _running(tile.cells, self.sizes.n_layers)
        costs = self.costs if self.way.in_one else self.costs.apart()
        return float(_cost(running[None], np.array([tile.first]), self.sizes, costs)[0])

    def _bytes(self, tile: Tile) -> int:
        return len(tile.cells) * bytes_of_cell(self.sizes, tile.first)

    def _summary(self) -> Summary:
        sizes = self.sizes
        rows = [
            [
                f"{tile.first}-{sizes.length - 1}",
                f"{max(tile.cells[0].start, 0)}-{sizes.n_layers - 1}",
                len(tile.cells),
                len(tile.cells) * sizes.rows * (sizes.length - tile.first),
                round(self._work(tile), 1),
                bytes_as_text(self._bytes(tile)),
            ]
            for tile in self.tiles
        ]
        batches = "1 batch" if len(rows) == 1 else f"{len(rows)} batches"
        return Summary(
            f"{self.cells} cells in {batches}: the work of {self.forwards:z.1f} forwards and a "
            f"base run instead of {self.cells}; about {self.seconds:.2g} s, at most {bytes_as_text(self.nbytes)}",
            ["positions", "layers", "cells", "tokens", "forwards", "bytes"],
            rows if len(rows) <= 24 else [*rows[:20], ["…"] * 6, *rows[-3:]],
            about=[
                f"input: {sizes.rows} row{'s' * (sizes.rows > 1)} of {sizes.length} positions; logits: {self.reads}",
                "positions: "
                + (
                    f"whole sequences, since {self.whole}"
                    if self.whole
                    else "from the first that changes, on the base run's keys and values"
                ),
                f"way: {self.way}",
            ],
        )


def bytes_of_cell(sizes: Sizes, first: int) -> int:
    """Returns the bytes that one cell takes in a batch that starts at a position."""
    return sizes.rows * ((sizes.length - first) * sizes.bytes_per_token + sizes.bytes_per_row)


def tiles_of(cells: Sequence[Cell], sizes: Sizes, costs: Costs) -> tuple[Tile, ...]:
    """Returns batches of cells that cost the least by the model, each within the memory given.

    Cells are ordered by the first position that they change, and this order is cut where the sum of costs is least: a
    batch of many positions starts at the first of them, which the later ones need not; a batch of few leaves the
    device idle. Layers need no such choice, since a cell joins its batch at its own layer.
    """
    by_first: dict[int, list[Cell]] = {}
    for cell in cells:
        by_first.setdefault(cell.first, []).append(cell)
    firsts = sorted(by_first)
    tiles: list[Tile] = []
    for begin, end in _cuts(firsts, [by_first[first] for first in firsts], sizes, costs):
        chosen = [cell for first in firsts[begin:end] for cell in by_first[first]]
        tiles += _parts(sorted(chosen, key=_IN_ORDER), firsts[begin], sizes, costs)
    return tuple(tiles)


def _parts(cells: Sequence[Cell], first: int, sizes: Sizes, costs: Costs) -> list[Tile]:
    """Returns cells as batches of about one size, none larger than memory allows and speed asks for."""
    by_speed = costs.most // (sizes.rows * (sizes.length - first))
    most = max(1, min(by_speed, sizes.memory // bytes_of_cell(sizes, first)))
    count = -(-len(cells) // most)
    bounds = [round(part * len(cells) / count) for part in range(count + 1)]
    return [Tile(first, tuple(cells[begin:end])) for begin, end in itertools.pairwise(bounds)]


def _cuts(firsts: Sequence[int], groups: Iterable[Sequence[Cell]], sizes: Sizes, costs: Costs) -> list[tuple[int, int]]:
    """Returns which groups of cells go together, as ranges of them, so that the sum of costs is least."""
    running = np.stack([_running(group, sizes.n_layers) for group in groups])
    before = np.concatenate([np.zeros((1, sizes.n_layers)), running.cumsum(0)])
    starts = np.array(firsts)
    best, begins = np.zeros(len(firsts) + 1), [0]
    for end in range(1, len(firsts) + 1):
        sums = best[:end] + _cost(before[end] - before[:end], starts[:end], sizes, costs)
        begins.append(int(sums.argmin()))
        best[end] = sums[begins[end]]
    ranges, end = [], len(firsts)
    while end > 0:
        ranges.append((begins[end], end))
        end = begins[end]
    return ranges[::-1]


def _cost(
    cells: Float[np.ndarray, "tile layer"], starts: Int[np.ndarray, "tile"], sizes: Sizes, costs: Costs
) -> Float[np.ndarray, "tile"]:
    """Returns the seconds that tiles take, of cells that run in each layer, from the positions where they start."""
    tokens = cells * (sizes.rows * (sizes.length - starts))[:, None]
    batches = np.ceil(np.maximum(tokens.max(-1) / costs.most, 1))
    joins = (cells[:, 1:] > cells[:, :-1]).sum(-1) + 1
    once = costs.floor * (cells > 0).sum(-1) + costs.join * joins + costs.start
    return costs.token * tokens.sum(-1) + once * batches


def _running(cells: Sequence[Cell], n_layers: int) -> Float[np.ndarray, "layer"]:
    """Returns how many of the cells run in each layer."""
    starting = np.bincount([max(cell.start, 0) for cell in cells], minlength=n_layers)
    return starting[:n_layers].cumsum().astype(float)


# --- memory ----------------------------------------------------------------------------------------------------------

UNKNOWN = 2**32
"""Bytes that a batch may take where the device does not say what is free."""


def half_of_free(device: torch.device) -> int:
    """Returns half of the bytes that are free on a device."""
    free = free_bytes(device)
    return UNKNOWN if free is None else free // 2


def bytes_per_token(cfg: TransformerBridgeConfig, length: int, names: Iterable[str]) -> int:
    """Returns what one token of a batch takes while a block runs, at the most.

    Args:
        cfg: The model's sizes.
        length: Positions of the whole sequence.
        names: Hook points that are written: scores and patterns are there as a whole only where one of them is.
    """
    stream, hidden = 8 * cfg.d_model, 3 * cfg.d_mlp
    heads = 2 * cfg.n_heads * cfg.d_head + 2 * _kv_width(cfg)
    return _item(cfg) * (stream + hidden + heads + watches_attention(names) * 3 * cfg.n_heads * length)


def watches_attention(names: Iterable[str]) -> bool:
    """Whether scores or patterns are among hook points: then their layers run the model's own eager attention."""
    return any(name.endswith(("hook_pattern", "hook_attn_scores")) for name in names)


def bytes_per_row(cfg: TransformerBridgeConfig, length: int, readings: Readings, *, has_prefix: bool) -> int:
    """Returns what a row of a batch takes besides its tokens: logits, and a layer's copy of earlier keys and values."""
    columns = cfg.d_vocab if readings.tokens is None else len(readings.tokens)
    logits = len(readings.positions) * columns * (2 * _item(cfg) + 4)
    return logits + has_prefix * _item(cfg) * length * _kv_width(cfg)


def bytes_of_base(cfg: TransformerBridgeConfig, rows: int, length: int, depths: int, *, has_prefix: bool) -> int:
    """Returns the bytes of the base run: streams at some depths, keys and values, logits."""
    prefix = has_prefix * cfg.n_layers * _kv_width(cfg)
    return rows * length * _item(cfg) * (depths * cfg.d_model + prefix + cfg.d_vocab)


def _kv_width(cfg: TransformerBridgeConfig) -> int:
    return 2 * (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head


def _item(cfg: TransformerBridgeConfig) -> int:
    return torch.finfo(cfg.dtype).bits // 8
