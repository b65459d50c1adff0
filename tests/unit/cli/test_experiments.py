"""`clearspan heads`, `patch`, `circuit` and `generate`: what they print is what the library finds."""

import json

import pytest
import torch
from tests.unit.cli.running import ANSWERS, CLEAN, CORRUPTED, as_json, printed, refused
from tests.zoo import build

import clearspan
from clearspan.analysis import SteeringVector, detect_heads, fit_steering_vector, head_scores
from clearspan.circuits import Circuit, discover_circuit, edge_attribution, evaluate_circuits
from clearspan.effects import Effects
from clearspan.patching import activation_patching
from clearspan.sweep import LogitDifference

MODEL = "tiny-bigcode"
CLOSE = {"atol": 1e-3, "rtol": 1e-4}
PAIR = (MODEL, CLEAN, CORRUPTED, *ANSWERS)


@pytest.fixture(scope="module")
def bridge():
    return clearspan.boot(MODEL)


@pytest.fixture(scope="module")
def metric(bridge):
    return LogitDifference.between(bridge, " os", " re")


def row_of(text, start):
    """Returns the words of the line that starts with a text."""
    return next(line.split() for line in text.splitlines() if line.strip().startswith(start))


# --- heads -----------------------------------------------------------------------------------------------------------


def test_heads_on_random_tokens(bridge):
    scores = head_scores(bridge)
    found = Effects.from_json(as_json(printed("heads", MODEL, "--json")))
    torch.testing.assert_close(found.mean("induction"), scores.induction)
    layer, head = divmod(int(scores.induction.argmax()), bridge.cfg.n_heads)
    row = row_of(printed("heads", MODEL, "--top", "1"), "L")
    assert row[0] == f"L{layer}H{head}"
    assert row[2] == f"{scores.induction.max():.3f}"


def test_heads_on_a_text(bridge):
    text = "import os\nimport os"
    found = Effects.from_json(as_json(printed("heads", MODEL, "--json", input=text)))
    for pattern in ("previous_token", "duplicate_token", "induction"):
        torch.testing.assert_close(found.mean(pattern), detect_heads(bridge, text, pattern).scores)
    refused(2, "row 0 is too short to be scored", "heads", MODEL, "--tokens", "5")


def test_all_heads(bridge):
    scores = head_scores(bridge).mean("previous_token")
    text = printed("heads", MODEL, "--full").split("previous token", 1)[1]
    assert row_of(text, "L3")[1:] == [f"{score:.2f}" for score in scores[3].tolist()]


def test_scores_are_written(tmp_path):
    csv, page = tmp_path / "heads.csv", tmp_path / "heads.html"
    printed("heads", MODEL, "--out", str(csv))
    printed("heads", MODEL, "--out", str(page))
    assert len(csv.read_text(encoding="utf-8").splitlines()) == 1 + 5 * 8
    assert page.read_text(encoding="utf-8").count("<table") == 2


# --- patch -----------------------------------------------------------------------------------------------------------


def test_patching_is_the_library_s(bridge, metric):
    expected = activation_patching(bridge, CLEAN, CORRUPTED, metric, "attn_out", progress=False)
    found = Effects.from_json(as_json(printed("patch", *PAIR, "--points", "attn_out", "--json")))
    torch.testing.assert_close(found.of(), expected.of(), **CLOSE)
    row = row_of(printed("patch", *PAIR, "--points", "attn_out"), "4 import")
    shares = [f"{share:+z.2f}" if abs(share) >= 0.005 else "·" for share in expected.normalised()[:, 4].tolist()]
    assert row[2:] == shares


def test_patching_by_head_at_some_layers(bridge, metric):
    expected = activation_patching(
        bridge, CLEAN, CORRUPTED, metric, "z", ("layer", "head"), layer=[3, 4], head=[0, 3], progress=False
    )
    places = ("--points", "z", "--by", "layer,head", "--layers", "3-4", "--heads", "0,3")
    found = Effects.from_json(as_json(printed("patch", *PAIR, *places, "--json")))
    assert found.axes == expected.axes
    torch.testing.assert_close(found.of(), expected.of(), **CLOSE)


def test_several_points_each_have_a_table(tmp_path, bridge, metric):
    out = tmp_path / "patching.csv"
    text = printed("patch", *PAIR, "--points", "resid_pre,mlp_out", "--out", str(out), "--full")
    assert text.count("position down, layer across") == 2
    expected = activation_patching(bridge, CLEAN, CORRUPTED, metric, "mlp_out", progress=False).change()
    rows = [line.split(",") for line in out.read_text(encoding="utf-8").splitlines() if line.startswith("mlp_out,4,4,")]
    assert float(rows[0][-1]) == pytest.approx(float(expected[4, 4]), abs=1e-3)


def test_noising_swaps_the_runs(bridge, metric):
    expected = activation_patching(bridge, CLEAN, CORRUPTED, metric, direction="noising", progress=False)
    found = Effects.from_json(as_json(printed("patch", *PAIR, "--noising", "--json")))
    torch.testing.assert_close(found.of(), expected.of(), **CLOSE)
    assert "logits in the clean run, " in printed("patch", *PAIR, "--noising")


def test_rows_with_next_to_nothing_are_folded():
    text = printed("patch", *PAIR)
    assert "2 of 5 rows, all near 0, left out" in text
    assert "1 import" not in text
    assert "1 import" in printed("patch", *PAIR, "--full")


def test_the_two_answers_are_given_with_a_comma_or_twice():
    one = as_json(printed("patch", *PAIR, "--layers", "4", "--json"))
    prompts = (MODEL, CLEAN, CORRUPTED)
    assert one == as_json(printed("patch", *prompts, "-a", " os", "-a", " re", "--layers", "4", "--json"))
    assert one != as_json(printed("patch", *prompts, "-a", " os", "--layers", "4", "--json"))
    assert as_json(printed("patch", *prompts, "-a", ",", "--layers", "4", "--json"))


def test_prompts_that_measure_the_same_have_changes_and_no_shares():
    text = printed("patch", MODEL, CLEAN, CLEAN, *ANSWERS, "--full")
    assert "(change in logits)" in text
    assert "nan" not in text
    as_json(printed("patch", MODEL, CLEAN, CLEAN, *ANSWERS, "--json"))


def test_what_cannot_be_patched():
    refused(
        2, "no hook point has the short name 'resid_prr'\n  nearest: resid_pre", "patch", *PAIR, "--points", "resid_prr"
    )
    refused(
        2, "no hook point 'blocks.9.hook_resid_pre'\n  expected: a layer from 0 to 4", "patch", *PAIR, "--layers", "9"
    )
    refused(2, "'resid_pre' cannot be patched by heads\n", "patch", *PAIR, "--by", "heads")
    refused(2, "places on axes that no cell has: head", "patch", *PAIR, "--heads", "3")
    expected = "\n  expected: whole numbers and ranges, as 0-3,5,-1\n  got: a\n"
    refused(2, f"error: --layers '1,a'{expected}", "patch", *PAIR, "--layers", "1,a")
    refused(2, "the two inputs do not lie position on position", "patch", MODEL, "a b", "a", *ANSWERS)
    refused(2, "there are too many answers", "patch", MODEL, "a", "b", "-a", "a", "-a", "b", "-a", "c")
    refused(1, "'no way' is not a single token", "patch", MODEL, "a", "b", "-a", "no way")
    refused(2, "Missing option '--answers'", "patch", MODEL, "a", "b")


# --- circuit ---------------------------------------------------------------------------------------------------------


def test_the_circuit_is_the_library_s(bridge, metric, tmp_path):
    expected = discover_circuit(bridge, CLEAN, CORRUPTED, metric, target=0.5)
    out = tmp_path / "circuit.json"
    text = printed("circuit", *PAIR, "--target", "0.5", "--out", str(out))
    found = as_json(out.read_text(encoding="utf-8"))
    assert list(Circuit.from_json(json.dumps(found["circuit"]))) == list(expected.circuit)
    assert found["faithfulness"] == pytest.approx(expected.faithfulness, abs=1e-5)
    assert row_of(text, "faithfulness")[1] == f"{expected.faithfulness:.3f}"
    best = max(expected.effects, key=lambda edge: abs(expected.effects[edge]))
    assert row_of(text.split("edge  ", 1)[1], str(best.sender))[2] == str(best.receiver)


def test_the_best_edges_with_their_faithfulness(bridge, metric, tmp_path):
    scores = edge_attribution(bridge, CLEAN, CORRUPTED, metric, steps=5)
    measured = evaluate_circuits(bridge, CLEAN, CORRUPTED, metric, Circuit.of_scores(scores, n_edges=20))
    drawn = tmp_path / "circuit.svg"
    found = as_json(printed("circuit", *PAIR, "--edges", "20", "--json", "--out", str(drawn)))
    assert len(found["edges"]) == 20
    assert found["faithfulness"] == pytest.approx(measured.faithfulness.item(), abs=1e-5)
    assert drawn.read_text(encoding="utf-8").startswith("<svg")
    refused(2, "no circuit is sought for target=2.0", "circuit", *PAIR, "--target", "2")


# --- generate --------------------------------------------------------------------------------------------------------


def test_a_text_goes_on_as_the_model_does(bridge):
    expected = bridge.generate("def area(", max_new_tokens=5, do_sample=False)
    found = as_json(printed("generate", MODEL, "def area(", "-n", "5", "--json"))
    assert found["prompt"] + found["plain"] == expected
    assert found["steered"] is None
    assert expected in printed("generate", MODEL, "-n", "5", input="def area(\n")


def test_steering_from_one_text_to_another(bridge, tmp_path):
    out = tmp_path / "vector.safetensors"
    ways = ("--steer-from", "x = 'a'", "--steer-to", 'x = "a"', "--scale", "2", "--steer-at", "resid_post:2")
    found = as_json(printed("generate", MODEL, "print(", "-n", "6", *ways, "--json", "--out", str(out)))
    vector = fit_steering_vector(bridge, 'x = "a"', "x = 'a'", layers=2)
    steered = bridge.generate("print(", 6, interventions=vector.interventions(2.0), do_sample=False)
    assert found["prompt"] + found["steered"] == steered
    assert found["steered"] != found["plain"]
    torch.testing.assert_close(dict(SteeringVector.load(out, bridge).vectors), dict(vector.vectors))
    saved = ("--steer", f"resid_post:2:{out}:2")
    assert as_json(printed("generate", MODEL, "print(", "-n", "6", *saved, "--json"))["steered"] == found["steered"]
    text = printed("generate", MODEL, "print(", "-n", "6", *saved)
    assert "steered  +2 x blocks.2.hook_resid_post" in text
    refused(
        2,
        "there is not one vector at 'blocks.3.hook_resid_post'",
        "generate",
        MODEL,
        "a",
        "--steer",
        f"resid_post:3:{out}:2",
    )


def test_the_middle_layer_is_steered_by_default():
    ways = ("--steer-from", "a", "--steer-to", "b")
    assert as_json(printed("generate", MODEL, "a", "-n", "1", *ways, "--json"))["steering"][0]["point"] == (
        "blocks.2.hook_resid_post"
    )


def test_a_model_without_a_tokenizer_goes_on_in_ids(tmp_path):
    build("gpt2").save_pretrained(tmp_path / "model")
    found = as_json(printed("generate", str(tmp_path / "model"), "--tokens", "5,3", "-n", "2", "--json"))
    assert found["prompt"] == "#5 #3"
    assert len(found["plain"].split()) == 2


def test_steering_that_is_none(tmp_path):
    form = "\n  expected: POINT:LAYER:FILE:SCALE, as resid_post:2:vector.safetensors:4\n"
    for steer in ("resid_post", "resid_post:2:4", "resid_post:two:file:4"):
        refused(2, f"error: --steer {steer}{form}", "generate", MODEL, "a", "--steer", steer)
    refused(2, "there is no file no", "generate", MODEL, "a", "--steer", "resid_post:2:no:4")
    file = tmp_path / "vector.safetensors"
    file.touch()
    refused(2, "the scale 'x' is no number", "generate", MODEL, "a", "--steer", f"resid_post:2:{file}:x")
    refused(2, "vector.safetensors is no steering vector", "generate", MODEL, "a", "--steer", f"resid_post:2:{file}:1")
    refused(2, "a vector leads from one text to another", "generate", MODEL, "a", "--steer-to", "b")
    both = ("--steer-from", "a", "--steer-to", "b")
    refused(2, "--steer-at resid_post:x\n", "generate", MODEL, "a", *both, "--steer-at", "resid_post:x")
    refused(2, "no hook point has the short name 'resid'", "generate", MODEL, "a", *both, "--steer-at", "resid")
