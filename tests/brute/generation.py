"""Greedy generation by brute force: the whole sequence runs again for each token, without a KV cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .changes import Change, Source, positions_of
from .reference import Reference, Run
from .rows import Rows

END = 0
"""The token after which a row is finished; it is also what finished rows are filled with."""


@dataclass(frozen=True, eq=False)
class Generated:
    """What greedy generation gave.

    Attributes:
        ids: The whole sequences.
        margin: The least difference between the two largest logits, over the largest logit, in all steps.
        last: The forward over all tokens but the last one.
        rows: Its input.
    """

    ids: Tensor
    margin: float
    last: Run
    rows: Rows


def greedy(
    reference: Reference,
    prompt: Rows,
    changes: Sequence[Change],
    sources: Mapping[str, Source],
    steps: int,
    every_step: Sequence[bool],
    keep: Sequence[str] = (),
) -> Generated:
    """Returns a prompt with the likeliest token of each step.

    Args:
        reference: The model.
        prompt: Rows without padding on the right.
        changes: What is changed: positions of the whole sequence, negative ones from the prompt's last token.
        sources: Runs that values are taken from.
        steps: How many tokens are made.
        every_step: For each change, whether it is made at each new token too.
        keep: Points whose values are kept.
    """
    rows, margin = prompt, float("inf")
    is_done = torch.zeros(len(prompt.ids), dtype=torch.bool)
    for _ in range(steps):
        edits = [
            grown(change, also_new, prompt, rows).edit(rows, reference.n_layers, sources)
            for change, also_new in zip(changes, every_step, strict=True)
        ]
        run = reference.run(rows, edits, keep)
        best = run.logits[:, -1].topk(2)
        gaps = (best.values[:, 0] - best.values[:, 1])[~is_done]
        margin = min(margin, float(gaps.min() / run.logits.abs().max().clamp(min=1e-9)))
        nexts = best.indices[:, 0].masked_fill(is_done, END)
        is_done |= nexts == END
        last, before = run, rows
        ones = torch.ones_like(nexts)
        rows = Rows(torch.cat([rows.ids, nexts[:, None]], 1), torch.cat([rows.mask, ones[:, None]], 1))
        if is_done.all():
            break
    return Generated(rows.ids, margin, last, before)


def grown(change: Change, also_new: bool, prompt: Rows, rows: Rows) -> Change:
    """Returns a change with its positions as they are in a sequence that has grown: those that are there, by row."""
    return replace(
        change,
        positions=_there(change.positions, also_new, prompt, rows),
        key_positions=_there(change.key_positions, False, prompt, rows),
    )


def _there(positions, also_new: bool, prompt: Rows, rows: Rows):
    if positions is None:
        return None
    found = []
    if isinstance(positions, slice):  # bounds count in the prompt; without an end it goes on
        for known, length in zip(prompt.lengths, rows.lengths, strict=True):
            first, end, step = positions.indices(known)
            chosen = range(first, length if positions.stop is None else end, step)
            found.append(tuple(dict.fromkeys([*chosen, *(range(known, length) if also_new else ())])))
        return tuple(found)
    for row, (known, length) in enumerate(zip(prompt.lengths, rows.lengths, strict=True)):
        own = [place + known if place < 0 else place for place in positions_of(positions, row, known)]
        new = range(known, length) if also_new else ()
        found.append(tuple(dict.fromkeys([*(place for place in own if place < length), *new])))
    return tuple(found)
