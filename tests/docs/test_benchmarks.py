"""The script for a GPU runs on a CPU with tiny models: every part gives numbers, and a failure stays in its part."""

import importlib
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

import clearspan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu")


def lines_of(gpu, monkeypatch, capfd, *arguments):
    """Returns the script's exit code, and its lines."""
    monkeypatch.setattr("sys.argv", ["gpu.py", *arguments, "--rounds", "1"])
    code = gpu.main()
    return code, [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    "parts",
    [("counts-gpt-bigcode-32", "attribution-llama"), pytest.param((), marks=pytest.mark.slow)],
    ids=["two", "all"],
)
def test_parts_give_numbers(gpu, monkeypatch, capfd, parts):
    code, lines = lines_of(gpu, monkeypatch, capfd, *parts, "--tiny", "--device", "cpu", "--here")
    assert code == 0
    assert len(lines) >= 3 * len(parts or gpu.PARTS)
    assert all(math.isfinite(line["measured"]) and line["name"].startswith("tiny ") for line in lines)
    assert all(line.keys() == {"name", "asked", "measured", "card", "versions"} for line in lines)
    wrong = [line for line in lines if line["name"].endswith("error") and line["measured"] > float(line["asked"][3:])]
    assert not wrong


def test_operators_and_reads_are_counted(gpu):
    kernels = importlib.import_module("kernels")
    values = torch.arange(4.0)

    def run():
        chosen = values[values > 1]  # compares, and chooses by a mask
        return (chosen * 2).tolist(), bool(values.any()), values.view(2, 2).cpu(), torch.empty(3)

    found = kernels.kernels_of(run, values.device)
    assert (found.operators, found.reads, found.shapes) == (3, 4, 0)


@pytest.mark.parametrize("name", ["gpt-bigcode", "llama"])
def test_loops_by_hand_agree(gpu, name):
    hand_written, libraries = map(importlib.import_module, ("hand_written", "libraries"))
    reference = importlib.import_module("reference").build(name, 64, 3)
    reference.model.float()
    tokens, clean = reference.tokens(1, 7), reference.tokens(1, 7, seed=1)
    cells = list(itertools.product(range(3), range(7)))
    with torch.no_grad():
        streams = hand_written.inputs_of(reference, reference.blocks, clean)
        one_by_one = hand_written.patched_residuals(reference, tokens, streams, cells)
        tiles = hand_written.tiled_residuals(reference, tokens, clean, 2, 3)
        by_hand = libraries.nbytes_of(hand_written.everything(reference, tokens))
        kept = clearspan.boot(reference.model).run_with_cache(tokens)[1].nbytes
    torch.testing.assert_close(tiles.flatten(), one_by_one)
    assert by_hand <= kept <= 1.01 * by_hand  # rotated queries and keys are on no module


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="parts fail where there is no GPU")
def test_a_part_that_fails_says_so_and_the_next_one_runs(gpu, monkeypatch, capfd):
    code, lines = lines_of(gpu, monkeypatch, capfd, "memory", "transfers", "--tiny")
    assert code == 1
    assert [line["part"] for line in lines] == ["memory", "transfers"]
    assert all("CUDA" in line["error"] for line in lines)
