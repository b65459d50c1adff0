"""Sweeps by brute force: each cell is a forward of its own."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .changes import Change, Source
from .metrics import Metric
from .reference import Reference
from .rows import Rows

Cell = tuple[Change, ...]


def measured(
    reference: Reference,
    rows: Rows,
    cells: Sequence[Cell],
    metrics: Mapping[str, Metric],
    sources: Mapping[str, Source],
    runs: Mapping[str, Tensor],
    background: Sequence[Change] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns each metric of every cell `[cell, row]`, and of the run that is changed `[row]`.

    Rows that lack a position of their cell are NaN there.

    Args:
        reference: The model.
        rows: The run that is changed.
        cells: The changes of each cell.
        metrics: What is measured, by name.
        sources: Runs that values are taken from.
        runs: Logits of other runs that metrics compare with, in the columns of `rows`.
        background: Changes made in every cell and in the run that is changed.
    """
    n_layers = reference.n_layers
    base_edits = [change.edit(rows, n_layers, sources) for change in background]
    base = reference.run(rows, base_edits).logits
    runs = {**runs, "base": base}
    found: dict[str, list[Tensor]] = {name: [] for name in metrics}
    for cell in cells:
        edits = [*base_edits, *(change.edit(rows, n_layers, sources) for change in cell)]
        logits = reference.run(rows, edits).logits
        lacking = torch.tensor([any(each.is_lacking(rows, row) for each in cell) for row in range(rows.size[0])])
        for name, metric in metrics.items():
            found[name].append(metric.of(logits, rows, runs).masked_fill(lacking, torch.nan))
    values = {name: torch.stack(each) for name, each in found.items()}
    return values, {name: metric.of(base, rows, runs) for name, metric in metrics.items()}
