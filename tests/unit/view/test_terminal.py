import io

import pytest
import torch
from rich.console import Console

from clearspan.effects import Effects
from clearspan.errors import InvalidArgumentError
from clearspan.view import show, show_edges, show_effects, show_generations, show_head_scores
from clearspan.view.cells import BLUE, RED, probability, signed, token

WIDTHS = [80, 100, 200]


def written(shown, *given, width=120, **options):
    """Returns what a function prints on a console of a width."""
    out = io.StringIO()
    shown(*given, Console(file=out, width=width), **options)
    return out.getvalue()


# --- reports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_every_part_is_printed(report, full):
    text = written(show, report, full=full)
    for title in ("Logit lens", "All heads" if full else "Strongest heads", "Causal effect"):
        assert title in text
    assert "tiny/<model>" in text
    assert "1,234,567 parameters" in text


@pytest.mark.parametrize("full", [False, True])
def test_tokens_are_text_and_not_markup(report, full):
    text = written(show, report, full=full, top=9)
    assert "[red]x" in text
    assert "</script>" in text
    assert "⏎····" in text


def test_the_least_expected_tokens_come_first(report):
    probs = report.predictions.token_probs
    least = int(probs.nan_to_num(2.0).argmin())
    rows = written(show, report, parts=["predictions"]).split("expected  ", 1)[1].splitlines()
    assert rows[1].split()[0] == str(least)
    assert f"{probs[least]:.2f}" in rows[1]


def test_the_layers_at_which_positions_settle_are_counted(make_report):
    report = make_report([0, 1, 2, 3])
    report.lens.final_ranks[:] = torch.tensor([[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    assert report.lens.settled.tolist() == [0, 2, 3, 3]
    rows = written(show, report, parts=["lens"]).split("depth  ", 1)[1].splitlines()[1:5]
    counts = [next(word for word in row.split()[1 + ("layer" in row) :]) for row in rows]
    assert counts == ["1", "·", "1", "2"]


def test_a_deep_lens_is_folded_and_no_position_is_lost(make_report):
    report = make_report(list(range(8)), layers=40)
    text = written(show, report, parts=["lens"])
    rows = text.split("depth  ", 1)[1].splitlines()[1:]
    rows = rows[: next(number for number, row in enumerate(rows) if not row.strip())]
    assert len(rows) <= 12
    assert "layer 36 to 39" in rows[-1]
    counts = torch.bincount(report.lens.settled, minlength=41).tolist()
    assert f" {sum(counts[-4:])} " in rows[-1]


def test_the_strongest_head_comes_first(report):
    best = int(report.heads.induction.argmax())
    rows = written(show, report).split("induction", 1)[1].splitlines()
    assert rows[1].split()[0] == f"L{best // 4}H{best % 4}"


def test_the_strongest_cause_comes_first_and_has_its_layer(report):
    drop = report.effect.drop
    layer, position = divmod(int(drop.abs().argmax()), drop.shape[1])
    row = written(show, report, parts=["effect"], top=1).split("nats  ", 2)[-1].splitlines()[1]
    assert row.split()[0] == str(position)
    assert f"layer {layer}" in row
    assert f"{drop[layer, position]:+.2f}" in row


def test_all_effects_have_a_sign_and_two_decimals(report):
    assert f"{float(report.effect.drop[0, 0]):+.2f}" in written(show, report, full=True)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("full", [False, True])
def test_no_line_is_wider_than_the_console(make_report, width, full):
    text = written(show, make_report(list(range(8)), layers=40, heads=32), width=width, full=full)
    assert max(map(len, text.splitlines())) <= width
    if full:
        assert "layer 0" in text
        assert "layer 39" in text


def test_a_long_text_takes_one_screen_and_all_of_it_on_request(make_report):
    report = make_report([0] + [4] * 99)
    assert len(written(show, report, width=100).splitlines()) <= 50
    rows = [
        line.split()[0] for line in written(show, report, full=True, parts=["effect"]).splitlines() if "[red]x" in line
    ]
    assert rows[-99:] == [str(position) for position in range(1, 100)]


def test_pieces_of_characters_have_their_ids(make_report):
    report = make_report([0, 1, 2, 3])
    report.words[3] = "�"
    assert "�#3" in written(show, report)


def test_no_other_parts(report):
    with pytest.raises(InvalidArgumentError, match="predictions"):
        written(show, report, parts=["heads", "neck"])
    with pytest.raises(InvalidArgumentError, match="top=0"):
        written(show, report, top=0)


# --- effects, heads, circuits, texts ---------------------------------------------------------------------------------


@pytest.fixture
def effects():
    """Changes of 0, but of a 1 at layer 2 and position 30."""
    values = torch.zeros(3, 40, 1)
    values[2, 30] = 1.0
    places = tuple(f"{position} [b]東" for position in range(40))
    axes = {"layer": tuple(range(3)), "position": tuple(range(40))}
    return Effects({"score": values}, axes, base={"score": torch.zeros(1)}, texts={"position": places})


def test_positions_run_down_and_rows_of_nothing_are_folded(effects):
    text = written(show_effects, effects)
    assert "position down, layer across; 39 of 40 rows, all near 0, left out" in text
    assert "30 [b]東  " in text
    assert text.splitlines()[-1].split()[2:] == ["·", "·", "+1.00"]
    assert len(written(show_effects, effects, full=True).splitlines()) == 3 + 40


@pytest.mark.parametrize("width", WIDTHS)
def test_heat_tables_keep_to_the_width(effects, width):
    wide = Effects({"score": torch.ones(2, 64, 1)}, {"layer": (0, 1), "head": tuple(range(64))})
    for found in (effects, wide):
        assert max(map(len, written(show_effects, found, width=width, draws="value").splitlines())) <= width
    assert "head 63" in written(show_effects, wide, width=width, draws="value")


def test_heads_without_attention_have_no_score():
    scores = torch.tensor([[0.9, 0.1], [torch.nan, torch.nan]])[..., None]
    found = Effects({"induction": scores}, {"layer": (0, 1), "head": (0, 1)}, span=(0, 1))
    assert "L1" not in written(show_head_scores, found)
    assert written(show_head_scores, found, full=True).splitlines()[-1].split() == ["L1"]


def test_edges_are_ranked_by_the_size_of_the_last_number():
    edges = {
        "sender": ["a", "b", "c"],
        "receiver": ["x", "y", "z"],
        "score": [9.0, 1.0, 0.0],
        "effect": [0.1, -0.5, 0.2],
    }
    text = written(show_edges, "three", {"faithfulness": 0.9}, edges, top=2)
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["b", "c"]
    assert "1 more: --full" in text
    assert len(written(show_edges, "three", {}, edges, full=True).splitlines()) == len(text.splitlines())


def test_what_a_model_writes_does_not_steer_the_terminal():
    text = written(show_generations, "a\tb", {"plain": "\x1b[31m[bold]\n\x07", "steered": "c"})
    assert text.splitlines() == ["plain", "a       b\\x1b[31m[bold]", "\\x07", "", "steered", "a       bc"]


def test_small_probabilities_are_not_zero():
    assert [probability(p) for p in (0.0, 4e-5, 4e-4, 0.0099, 0.01, 0.999)] == [
        "0.00", "<0.0001", "0.0004", "0.0099", "0.01", "1.00"
    ]  # fmt: skip


def test_a_cell_without_a_value_is_empty_and_one_near_zero_a_dot():
    assert [signed(value, 1.0, BLUE, RED).plain.strip() for value in (float("nan"), 0.001, -0.5)] == ["", "·", "-0.50"]


def test_wide_characters_count_as_two_cells():
    assert token("東京都", 5).cell_len <= 5
