"""Generation with interventions: against greedy choices of forwards over the whole sequence, without a KV cache."""

import pytest
import torch

from clearspan.errors import InvalidArgumentError

from . import generation, ours
from .changes import Mean, sources_of
from .draws import NORMS, SQUARES, Draw
from .test_interventions import compare_cached, is_excluded

CASES, REFUSED = 24, 8
CLEAR = 1e-3
"""A choice is compared where the best logit is ahead of the next one by more than this share of the largest."""


def drawn(draw, subject, rows, steps):
    """Draws changes with positions in the whole sequence, and whether each is made at every new token."""
    longest = min(rows.lengths) + steps - 1
    points = [point for point in draw.points(subject) if point not in (*NORMS, "pos_embed", "logits")]
    windowed = getattr(subject.model.config, "sliding_window", None) is not None
    own = [point for point in points if not (windowed and point in SQUARES)]
    changes, every_step = [], []
    count = draw.random.randint(1, 3)
    while len(changes) < count:
        change = draw.change(subject, rows, ["clean"], points=own, may_be_columns=False)
        takes = getattr(change.action, "source", None)
        if takes is not None and change.point == "attn_scores":  # there are no scores for new keys
            continue
        is_constant = isinstance(change.action, Mean) and not change.action.by_position and change.point not in SQUARES
        may_be_new = takes is None or is_constant
        is_open = change.positions is None or getattr(change.positions, "stop", 0) is None
        if takes is not None and is_open and not is_constant:
            change = ours.replaced(change, positions=draw.random.randrange(-min(rows.lengths), min(rows.lengths)))
        elif may_be_new and isinstance(change.positions, int) and draw.chance(0.4):
            change = ours.replaced(change, positions=draw.random.randrange(min(rows.lengths), longest))
        changes.append(change)
        every_step.append(may_be_new and change.key_positions is None and draw.chance(0.3))
    draw.note("changes", changes)
    return changes, draw.note("every step", every_step)


@pytest.mark.parametrize("number", range(CASES))
def test_generation_chooses_what_whole_forwards_choose(number):
    draw = Draw("generation", number)
    padding = draw.one("padding", ("none", "none", "left"))
    subject = draw.subject(is_padded=padding != "none")
    rows = draw.rows(padding, longest=6)
    bridge, reference, n_layers = ours.bridge_to(subject), subject.reference, subject.reference.n_layers
    steps = draw.one("new tokens", (2, 3, 4))
    inputs = {"clean": draw.other_rows(rows)}
    while True:
        changes, every_step = drawn(draw, subject, rows, steps)
        if not is_excluded(changes, n_layers):
            break
    sources = sources_of(reference, changes, inputs)
    shown = sorted({change.name(n_layers) for change in changes} - {"hook_logits"})
    expected = generation.greedy(reference, rows, changes, sources, steps, every_step, shown)
    value, keywords = ours.given(bridge, rows, draw.one("form", ours.FORMS))
    keywords |= {
        "interventions": [
            ours.replaced(ours.intervention_of(change, n_layers), every_step=also_new)
            for change, also_new in zip(changes, every_step, strict=True)
        ],
        "sources": ours.sources_of(draw, bridge, changes, inputs, None),
        "max_new_tokens": steps,
        "do_sample": False,
    }
    if not expected.margin > CLEAR:
        return
    match draw.one("way", ("generate", "generate", "with a cache", "as a stream")):
        case "generate":
            assert_same(draw, bridge.generate(value, **keywords), expected.ids)
        case "as a stream":
            pieces = list(bridge.generate_stream(value, **keywords))
            assert_same(draw, torch.cat(pieces, 1), expected.ids[:, rows.size[1] :])
        case _:
            ids, cache = bridge.generate(value, **keywords, return_cache=True, names_filter=shown or None)
            assert_same(draw, ids, expected.ids)
            for name in shown:
                compare_cached(draw, expected.rows, name, cache[name], expected.last.values[name])


@pytest.mark.parametrize("number", range(REFUSED))
def test_a_source_without_the_new_tokens_is_refused(number):
    draw = Draw("refused generation", number)
    padding = draw.one("padding", ("none", "left"))
    subject = draw.subject(is_padded=padding != "none")
    rows = draw.rows(padding, longest=6)
    bridge, n_layers = ours.bridge_to(subject), subject.reference.n_layers
    points = [point for point in draw.points(subject) if point not in (*NORMS, "pos_embed", "logits")]
    change = draw.change(subject, rows, ["clean"], points=points, kinds=["Patch"], may_be_columns=False)
    if change.action.position is not None:
        change = ours.replaced(change, action=ours.replaced(change.action, position=None))
    end = draw.one("end", ("all", "open", "every step", "beyond the source"))
    positions = {"all": None, "open": slice(1, None), "every step": -1}.get(end, rows.size[1] + 1)
    keys = None if end == "every step" else change.key_positions
    change = draw.note("change", ours.replaced(change, positions=positions, key_positions=keys))
    given = ours.replaced(ours.intervention_of(change, n_layers), every_step=end == "every step")
    value, keywords = ours.given(bridge, rows, draw.one("form", ours.FORMS))
    sources = ours.sources_of(draw, bridge, [change], {"clean": draw.other_rows(rows)}, None)
    with pytest.raises(InvalidArgumentError, match=r"takes values for new tokens|does not fit the run"):
        bridge.generate(value, interventions=[given], sources=sources, max_new_tokens=3, **keywords)


def assert_same(draw, ours, theirs):
    """Fails unless the same tokens were chosen."""
    assert torch.equal(ours, theirs), f"{ours.tolist()}, and not {theirs.tolist()}\n{draw}"
