import pytest
import torch
from tests.conftest import tiny_model
from tests.unit.analysis.abstraction.interchange_pairs import random_pairs, rows_alone

import clearspan
from clearspan.analysis import CausalModel, InterchangeExamples, draw_interchanges
from clearspan.errors import InvalidArgumentError, NoTokenizerError

COPY = CausalModel({"answer": lambda x, y: 10 * x + y}, output="answer")
GRID = [{"x": x, "y": y} for x in range(3) for y in range(4)]


def pair(**changes):
    fields = {
        "base": torch.tensor([[5, 6, 7], [5, 8, 0]]),
        "source": torch.tensor([[1, 2], [3, 4]]),
        "labels": torch.tensor([7, 9]),
        "base_positions": torch.tensor([[-1], [0]]),
        "source_positions": torch.tensor([[0], [-1]]),
    }
    return InterchangeExamples(**{**fields, **changes})


def test_positions_are_counted_among_real_tokens():
    examples = random_pairs(padded=True)
    for row, (base, base_at, source, source_at) in enumerate(rows_alone(examples)):
        assert torch.equal(examples.base[row, examples.base_columns[row]], base[0, base_at])
        assert torch.equal(examples.source[row, examples.source_columns[row]], source[0, source_at])
        assert examples.base[row, examples.last_columns[row]] == base[0, -1]
    masked = pair(base_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert masked.last_columns.tolist() == [2, 1]


def test_targets_are_places_among_the_answers_in_order():
    assert pair().targets().tolist() == [7, 9]
    among = pair(answers=(9, 3, 7, 9))
    assert among.answers == (3, 7, 9)
    assert among.targets().tolist() == [1, 2]


def test_parts_keep_all_that_belongs_to_a_pair():
    examples = random_pairs(padded=True, answers=(3, 11))
    parts = list(examples.split(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    for name in ("base", "source", "labels", "base_positions", "source_positions", "base_mask", "source_mask"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(examples, name))
    chosen = examples.select(torch.tensor([3, 1]))
    assert torch.equal(chosen.base, examples.base[[3, 1]])
    assert torch.equal(chosen.base_columns, examples.base_columns[[3, 1]])
    assert chosen.answers == (3, 11)
    assert examples.relabelled(torch.full((5,), 3)).labels.tolist() == [3] * 5


def test_they_are_made_of_text(bridge):
    examples = InterchangeExamples.of(
        bridge,
        ["import re", "import os, re"],
        ["import sys", "import re"],
        [" sys", " re"],
        position=[2, -1],
        source_position=-1,
        answers=[" sys", " re", " os"],
    )
    assert torch.equal(examples.base[1], bridge.to_tokens("import os, re")[0])
    assert examples.base_mask.sum(1).tolist() == [3, 5]
    assert examples.source_mask is None or bool(examples.source_mask.all())
    assert examples.labels.tolist() == [bridge.to_single_token(word) for word in (" sys", " re")]
    at = examples.base.gather(1, examples.base_columns)[:, 0].tolist()
    assert bridge.to_str_tokens(torch.tensor(at)) == [" re", " re"]
    assert repr(examples) == "InterchangeExamples(2 pairs of 5 and 3 tokens, values exchanged at 1 place, 3 answers)"
    several = InterchangeExamples.of(
        bridge, examples.base, examples.source, examples.labels, position=torch.tensor([[1, 2], [0, 2]])
    )
    assert several.source_columns.tolist() == [[1, 2], [0, 2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"source": torch.tensor([[1, 2]])},
            "source of the examples does not fit\n"
            "  expected: whole numbers [example, pos] = [2, 2], for as many pairs as labels\n  got: torch.int64 [1, 2]",
        ),
        (
            {"base_positions": torch.tensor([[0, 1], [0, 1]])},
            "source_positions of the examples does not fit\n"
            "  expected: whole numbers [example, place] = [2, 2], for as many pairs as labels\n"
            "  got: torch.int64 [2, 1]",
        ),
        ({"base_positions": torch.tensor([0, 1])}, "base_positions of the examples does not fit"),
        ({"base_mask": torch.ones(2, 2, dtype=torch.long)}, "base_mask of the examples does not fit"),
        ({"labels": torch.tensor([0.5, 1.0])}, "labels of the examples does not fit"),
        (
            {"base_positions": torch.tensor([[3], [0]])},
            "the base of pair 0 has no position 3\n  expected: -3 to 2\n  got: 3 tokens",
        ),
        (
            {"source_positions": torch.tensor([[0], [-3]])},
            "the source of pair 1 has no position -3\n  expected: -2 to 1\n  got: 2 tokens",
        ),
        (
            {"source_mask": torch.tensor([[1, 1], [0, 0]])},
            "the source of pair 1 has no position -1\n  expected: a token\n  got: 0 tokens",
        ),
        (
            {"base_positions": torch.tensor([[0, -3], [0, 1]]), "source_positions": torch.tensor([[0, 1], [0, 1]])},
            "a position of a base is written twice\n  got: [[0, -3], [0, 1]]",
        ),
        ({"answers": (7, 8)}, "the label 9 of pair 1 is no answer\n  expected: 7, 8"),
    ],
)
def test_what_does_not_fit_raises(changes, message):
    with pytest.raises(InvalidArgumentError) as raised:
        pair(**changes)
    assert str(raised.value).startswith(message)


def test_no_pair_raises():
    none = torch.zeros(0, 1, dtype=torch.long)
    with pytest.raises(InvalidArgumentError, match="of the examples does not fit"):
        InterchangeExamples(none, none, none[:, 0], none, none)


def drawn(bridge, variables="x", **changes):
    given = {"prompt": lambda one: [1] * (1 + one["x"]) + [10 + one["x"], 20 + one["y"]], "count": 40, **changes}
    return draw_interchanges(bridge, COPY, GRID, variables, **given)


def settings_of(tokens, mask):
    for row, real in zip(tokens, mask.bool(), strict=True):
        x, y = row[real][-2:].tolist()
        yield x - 10, y - 20


def test_drawn_pairs_have_the_causal_models_answers(bridge):
    examples = drawn(bridge, position=lambda one: 1 + one["x"])
    bases, sources = (list(settings_of(*each)) for each in (
        (examples.base, examples.base_mask), (examples.source, examples.source_mask)
    ))  # fmt: skip
    assert len(set(zip(bases, sources, strict=True))) == 40
    assert all(base != source for base, source in zip(bases, sources, strict=True))
    assert examples.labels.tolist() == [10 * x + y for (_, y), (x, _) in zip(bases, sources, strict=True)]
    assert examples.base.gather(1, examples.base_columns)[:, 0].tolist() == [10 + x for x, _ in bases]
    assert examples.source.gather(1, examples.source_columns)[:, 0].tolist() == [10 + x for x, _ in sources]
    whole = drawn(bridge, ["x", "y"])
    sources = list(settings_of(whole.source, whole.source_mask))
    assert whole.labels.tolist() == [10 * x + y for x, y in sources]


def test_pairs_are_the_seeds_and_leave_torchs_own_alone(bridge):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (drawn(bridge, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.base, again.base)
    assert not torch.equal(first.base, other.base)


def test_every_pair_is_drawn_once_and_too_many_raise(bridge):
    every = drawn(bridge, count=12 * 11)
    pairs = torch.cat([every.base, every.source], dim=1)
    assert len(pairs.unique(dim=0)) == 12 * 11
    with pytest.raises(InvalidArgumentError) as raised:
        drawn(bridge, count=12 * 11 + 1)
    assert str(raised.value).splitlines() == [
        "there are too few pairs of 12 inputs",
        "  expected: count=133",
        "  got: 132",
    ]
    with pytest.raises(InvalidArgumentError, match="too few pairs of 1 inputs"):
        draw_interchanges(bridge, COPY, GRID[:1], "x", prompt=lambda one: [1], count=1)


def test_changing_pairs_and_pairs_without_an_answer(bridge):
    changing = drawn(bridge, changing=True)
    bases = list(settings_of(changing.base, changing.base_mask))
    assert all(label != 10 * x + y for label, (x, y) in zip(changing.labels.tolist(), bases, strict=True))
    some = CausalModel({"answer": lambda x, y: None if x == 0 else y}, output="answer")
    found = draw_interchanges(bridge, some, GRID, "x", prompt=lambda one: [10 + one["x"], 20 + one["y"]], count=40)
    assert (found.source[:, 0] > 10).all()


def test_outputs_become_tokens(bridge):
    named = CausalModel({"answer": lambda x: (" os", " re", " sys")[x]}, output="answer")
    inputs = [{"x": x} for x in range(3)]
    found = draw_interchanges(bridge, named, inputs, "x", prompt=lambda one: f"import {one['x']}", count=6)
    assert set(found.labels.tolist()) == {bridge.to_single_token(word) for word in (" os", " re", " sys")}
    numbers = draw_interchanges(
        bridge, named, inputs, "x", prompt=lambda one: [one["x"]], token=lambda word: len(word), count=6
    )
    assert set(numbers.labels.tolist()) == {3, 4}
    truth = CausalModel({"answer": lambda x: x > 1}, output="answer")
    with pytest.raises(InvalidArgumentError) as raised:
        draw_interchanges(bridge, truth, inputs, "x", prompt=lambda one: [one["x"]], count=6)
    first, *rest = str(raised.value).splitlines()
    assert first in ("the output True is no token", "the output False is no token")
    assert rest == [
        "  expected: text of one token, or an id",
        "  fix: token=, which gives one",
    ]


def test_text_takes_a_tokenizer():
    with pytest.raises(NoTokenizerError):
        draw_interchanges(clearspan.boot(tiny_model()), COPY, GRID, "x", prompt=lambda one: "text", count=2)
