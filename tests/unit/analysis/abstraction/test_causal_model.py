import pytest
import torch
from tests.conftest import tiny_model

import clearspan
from clearspan.analysis import CausalModel, draw_interchanges
from clearspan.errors import ClearspanError, InvalidArgumentError, NoTokenizerError


@pytest.fixture
def agree():
    """Hierarchical equality, its variables given effects first."""
    return CausalModel(
        {
            "answer": lambda left, right: left == right,
            "right": lambda c, d: c == d,
            "left": lambda a, b: a == b,
        },
        output="answer",
    )


def test_causes_come_before_effects(agree):
    assert agree.inputs == ("c", "d", "a", "b")
    assert list(agree.parents)[-1] == "answer"
    assert agree.run({"a": 1, "b": 1, "c": 2, "d": 3, "note": "kept out"}) == {
        "a": 1, "b": 1, "c": 2, "d": 3, "left": True, "right": False, "answer": False,
    }  # fmt: skip


def test_an_interchange_is_the_base_with_the_sources_variable(agree):
    base, source = {"a": 1, "b": 1, "c": 2, "d": 2}, {"a": 4, "b": 5, "c": 6, "d": 7}
    assert agree.interchange(base, source, ["left"]) is False
    assert agree.interchange(base, source, ["left", "right"]) is True
    assert agree.interchange(base, source, ["a"]) is False
    assert agree.interchange(base, source, ["answer"]) is True
    assert agree.interchange(base, source, []) is True


def test_what_is_fixed_needs_no_causes(agree):
    assert agree.run({"a": 1, "b": 1}, fixed={"c": 1, "d": 2})["answer"] is False
    assert agree.run({"a": 1, "b": 1, "c": 1, "d": 2}, fixed={"right": True})["answer"] is True


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (
            lambda model: model.run({"a": 1, "b": 2, "c": 3}),
            "the input 'd' has no value\n  expected: c, d, a, b\n  got: a, b, c",
        ),
        (
            lambda model: model.interchange({}, {}, ["lefd"]),
            "'lefd' is neither an input nor a variable\n  expected: c, d, a, b, answer, right, left\n  nearest: left",
        ),
        (
            lambda model: CausalModel(model.variables, output="answr"),
            "the output 'answr' is no variable\n  expected: answer, right, left\n  nearest: answer",
        ),
        (
            lambda _: CausalModel({"x": lambda y: y, "y": lambda x: x}, output="x"),
            "variables depend on each other in a circle\n  got: ",
        ),
        (
            lambda _: CausalModel({"x": lambda *given: given}, output="x"),
            "the function of 'x' does not say what it depends on\n"
            "  expected: parameters that are names of inputs and variables, without defaults\n  got: *given",
        ),
        (
            lambda _: CausalModel({"x": lambda a=1: a}, output="x"),
            "the function of 'x' does not say what it depends on",
        ),
    ],
)
def test_what_is_no_model_raises(agree, attempt, message):
    with pytest.raises(InvalidArgumentError) as raised:
        attempt(agree)
    assert str(raised.value).startswith(message)


# --- examples --------------------------------------------------------------------------------------------------------

COPY = CausalModel({"answer": lambda x, y: 10 * x + y}, output="answer")
GRID = [{"x": x, "y": y} for x in range(3) for y in range(4)]


def drawn(bridge, variables="x", **changes):
    given = {"prompt": lambda one: [1] * (1 + one["x"]) + [10 + one["x"], 20 + one["y"]], "count": 40, **changes}
    return draw_interchanges(bridge, COPY, GRID, variables, **given)


def settings_of(batch):
    for row, real in zip(batch.ids, batch.real_columns, strict=True):
        x, y = row[list(real)][-2:].tolist()
        yield x - 10, y - 20


def test_drawn_pairs_have_the_causal_models_answers(bridge):
    examples = drawn(bridge, position=lambda one: 1 + one["x"])
    bases, sources = (list(settings_of(each)) for each in (examples.base, examples.source))
    assert len(set(zip(bases, sources, strict=True))) == 40
    assert all(base != source for base, source in zip(bases, sources, strict=True))
    assert examples.labels.tolist() == [10 * x + y for (_, y), (x, _) in zip(bases, sources, strict=True)]
    for batch, places, settings in (
        (examples.base, examples.written, bases),
        (examples.source, examples.read, sources),
    ):
        at = [batch.column_of(row, place) for row, (place,) in enumerate(places)]
        assert batch.ids[torch.arange(40), at].tolist() == [10 + x for x, _ in settings]
    whole = drawn(bridge, ["x", "y"])
    sources = list(settings_of(whole.source))
    assert whole.labels.tolist() == [10 * x + y for x, y in sources]


def test_pairs_are_the_seeds_and_leave_torchs_own_alone(bridge):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (drawn(bridge, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.base.ids, again.base.ids)
    assert not torch.equal(first.labels, other.labels)


def test_every_pair_is_drawn_once_and_too_many_raise(bridge):
    every = drawn(bridge, count=12 * 11)
    assert len(set(zip(settings_of(every.base), settings_of(every.source), strict=True))) == 12 * 11
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
    bases = list(settings_of(changing.base))
    assert all(label != 10 * x + y for label, (x, y) in zip(changing.labels.tolist(), bases, strict=True))
    some = CausalModel({"answer": lambda x, y: None if x == 0 else y}, output="answer")
    found = draw_interchanges(bridge, some, GRID, "x", prompt=lambda one: [10 + one["x"], 20 + one["y"]], count=40)
    assert (found.source.ids[:, 0] > 10).all()


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count=0\n  expected: a whole number, count >= 1"),
        ({"count": "a"}, "count='a'\n  expected: a whole number, count >= 1"),
        ({"seed": -1}, "seed=-1\n  expected: a whole number, seed >= 0"),
        ({"variables": "z"}, "'z' is neither an input nor a variable\n  expected: x, y, answer"),
        ({"variables": []}, "variables=[]\n  expected: a variable's name, or several"),
        ({"variables": 3}, "variables=3\n  expected: a variable's name, or several"),
        ({"position": 9}, "row 0 has no base position 9"),
        ({"position": "a"}, "'a' is no position\n  expected: a whole number, or several"),
        ({"answers": [5]}, "the label "),
        ({"prompt": lambda one: 3}, "the prompt 3 cannot be read\n  expected: text, or token ids"),
        ({"model": 3}, "this is no CausalModel\n  got: 3"),
        ({"inputs": []}, "there are too few pairs of 0 inputs"),
    ],
)
def test_what_cannot_be_drawn_raises(bridge, changes, message):
    given = {"model": COPY, "inputs": GRID, "variables": "x", "prompt": lambda one: [10 + one["x"], 20 + one["y"]]}
    with pytest.raises(ClearspanError) as raised:
        draw_interchanges(bridge, **{**given, "count": 4, **changes})
    assert str(raised.value).startswith(message)
