import io

import pytest
from rich.console import Console

from clearspan import zoo
from clearspan.errors import InvalidArgumentError
from clearspan.verification import Check
from clearspan.view import show_zoo
from clearspan.zoo import Pin, Row, Zoo
from clearspan.zoo.pins import padded_on_the_left, padded_on_the_right


def pin(group, what):
    return Pin(("gpt2",), group, what, "it is told so", padded_on_the_left)


def two_maps(model):
    """Has attention give something else than what its output projection's weights compute."""
    projection = model.transformer.h[1].attn.c_proj
    projection.forward = lambda value: value @ projection.weight + projection.bias + 1
    return model


def test_a_type_that_passes():
    row = zoo.check("qwen3_moe", "quick")
    assert (row.outcome, row.adapted, row.failures, row.pinned, row.reason) == ("passes", "by hand", {}, {}, "")
    assert row.checks > 400
    assert row.parts == {
        "positions": "rotary",
        "norms": "ln1, ln2",
        "attn": "Attention, grouped, query and key norms",
        "mlp": "GatedMLP / MoE",
    }
    assert row.is_right


def test_a_type_that_is_not_built():
    row = zoo.check("gemma4_assistant")
    assert row.outcome == "not built"
    assert row.reason == "its forward takes the states, the keys and the values of another model, and no token ids"
    assert row.is_right


def test_a_type_whose_recipe_does_not_fit(monkeypatch):
    monkeypatch.setattr("clearspan.zoo.models.MOST_PARAMETERS", 1000)
    row = zoo.check("gpt2", "quick")
    assert row.outcome == "not built"
    assert not row.is_right


def test_a_type_that_fails(monkeypatch):
    monkeypatch.setattr("clearspan.zoo.census.build", lambda name: two_maps(zoo.build(name)))
    row = zoo.check("gpt2", "quick")
    assert row.outcome == "fails"
    assert not row.is_right
    assert any(what.startswith("blocks.1.attn") for what in row.failures["identities"])


def test_failures_that_are_pinned(monkeypatch):
    monkeypatch.setattr("clearspan.zoo.census.build", lambda name: two_maps(zoo.build(name)))
    failing = zoo.check("gpt2", "quick").failures
    monkeypatch.setattr("clearspan.zoo.pins.PINS", tuple(pin(group, "*") for group in failing))
    row = zoo.check("gpt2", "quick")
    assert (row.outcome, row.failures) == ("pinned", {})
    assert len(row.pinned) == sum(map(len, failing.values()))
    assert set(row.pinned.values()) == {"it is told so"}
    assert row.is_right


def test_a_pin_that_holds_nothing(monkeypatch):
    monkeypatch.setattr("clearspan.zoo.pins.PINS", (pin("padding", "row of * padded on the left to *"),))
    row = zoo.check("gpt2", "quick")
    assert row.outcome == "fails"
    assert row.reason == (
        "the pin of 'row of * padded on the left to *' holds nothing: take it out of clearspan/zoo/pins.py"
    )


def test_a_pin_covers_checks_of_its_group_and_pattern():
    one = pin("padding", "row of * tokens padded on the left to *")
    assert one.covers(Check("padding", "row of 9 tokens padded on the left to 12", False))
    assert not one.covers(Check("padding", "row of 9 tokens padded on the right to 12", False))
    assert not one.covers(Check("reads", "row of 9 tokens padded on the left to 12", False))


def test_the_bare_model_shows_what_is_pinned():
    assert padded_on_the_left(zoo.build("bart")) > 0.05
    assert padded_on_the_right(zoo.build("bart")) < 1e-5
    assert padded_on_the_left(zoo.build("gpt2")) < 1e-5
    assert padded_on_the_left(zoo.build("roberta")) < 1e-5


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_types_are_checked_side_by_side(processes):
    told = []
    model_types = ["gemma4_unified_assistant", "gemma4_assistant", "gemma4_assistant"]
    found = zoo.check_all(model_types, processes=processes, progress=lambda *step: told.append(step))
    assert [row.model_type for row in found.rows] == ["gemma4_unified_assistant", "gemma4_assistant"]
    assert {step[0] for step in told} == {"gemma4_unified_assistant", "gemma4_assistant"}
    assert [step[1:] for step in told] == [(1, 2), (2, 2)]
    assert found.passed
    assert found.count("not built") == 2
    assert found.to_dict()["rows"][0]["outcome"] == "not built"


def test_wrong_arguments():
    with pytest.raises(InvalidArgumentError, match=r"^unknown level 'deep'\n  expected: 'quick' or 'full'$"):
        zoo.check_all(["gpt2"], "deep")
    with pytest.raises(InvalidArgumentError, match=r"^processes=0 do nothing\n  expected: at least 1, or None$"):
        zoo.check_all(["gpt2"], processes=0)
    with pytest.raises(InvalidArgumentError, match=r"^unknown model type 'gpt3'\n"):
        zoo.check_all(["gpt2", "gpt3"])


def test_the_table():
    rows = (
        Row("gpt2", "GPT2LMHeadModel", "passes", "by hand", 447),
        Row("bart", "BartForCausalLM", "pinned", "by structure", 400, pinned={"row (error 1e-1)": "[positions] wrong"}),
        Row("llama", "LlamaForCausalLM", "fails", "by hand", 500, failures={"writes": ("one", "two", "three")}),
        Row("rwkv", "RwkvForCausalLM", "unsupported", reason="no adapter\n  fix: write one"),
    )
    printed = io.StringIO()
    show_zoo(Zoo("5.23.0", "full", rows, 61.2), Console(width=80, file=printed))
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    assert lines == [
        "type   outcome      adapted       checks  why",
        "gpt2   passes       by hand          447",
        "bart   pinned       by structure     400  [positions] wrong",
        "llama  fails        by hand          500  writes: one and 2 more",
        "rwkv   unsupported                        no adapter",
        "2 of 4 model types of transformers 5.23.0 pass, 1 of them but for what is pinned",
        "(full, 61 s)",
    ]
