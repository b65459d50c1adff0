import pytest

from clearspan.analysis import CausalModel
from clearspan.errors import InvalidArgumentError


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
