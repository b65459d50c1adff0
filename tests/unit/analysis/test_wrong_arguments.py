"""Wrong types, empty lists and places that are not there: each public function works, or says which argument it was."""

import pytest
import torch

from clearspan.analysis import (
    detect_heads,
    direct_logit_attribution,
    head_scores,
    lens_divergence,
    lens_readings,
    logit_lens,
    repeated_tokens,
    singular_readings,
    train_probe,
    train_tuned_lens,
)
from clearspan.errors import ClearspanError

TEXTS = ["import os, sys", "def f(self"]
NOTHING = object()
COUNT = [0, -1, 1.5, "2", None, [1]]
SEED = [-1, 1.5, "2", None]
INPUT = [None, 5, 2.5, [], "", [""], [[]], [1, "a"], NOTHING, {}, {"x": [1]}, [[99999]], torch.ones(2), b"x", [None]]
POSITIONS = [99, -99, [99], [], [[0]], [[0], [99]], [[0], []], "a", 1.5, [1.5], NOTHING]
WRONG = {
    "input": INPUT,
    "corpus": [one for one in INPUT if one not in ("", [1, "a"])],
    "positions": POSITIONS,
    "pos": [*POSITIONS, None, [0, 1], [[0, 1], [0]]],
    "targets": ["no token", "", 99999, -1, [1, 2, 3], [], 1.5, NOTHING, [None, 1], torch.ones(2)],
    "depths": [99, -99, [], [99], "a", 1.5, [1.5], NOTHING],
    "top_k": [*COUNT, 99999],
    "lens": [5, "a", NOTHING, lambda resid, depth: None, lambda resid, depth: resid[:, :3], torch.eye(2)],
    "attention_mask": ["a", 5, torch.ones(2, 3), torch.full((2, 5), 7), [[1]], torch.zeros(2, 5), NOTHING],
    "pattern": [None, 5, "inducton", torch.ones(2, 2), torch.eye(3)[0], NOTHING, lambda tokens: None, lambda _: [[1]]],
    "heads": [5, [], {}, [0, 1], [(0,)], [(9, 0)], [(0, 99)], [(-9, 0)], "a", {0: 1}, {"a": [1]}, [(0, "x")], NOTHING],
    "error_measure": [None, "max", 5],
    "unit": [None, "token", 5],
    "matrix": [None, "QK", 5],
    "layer": [None, 5, -6, "a", 1.5],
    "head": [None, 8, -9, "a", 1.5],
    "k": [*COUNT, 33],
    "tokens": [*COUNT, 99999],
    "steps": COUNT,
    "batch_size": COUNT,
    "length": COUNT,
    "rows": COUNT,
    "period": [*COUNT, 1],
    "learning_rate": [0, -1, "a", None],
    "weight_decay": [-1, "a", None],
    "seed": SEED,
    "progress": ["a", 5, None],
    "vocabulary": [[], 5, "a", [1.5], [-1], [99999], [[1]], NOTHING],
    "prepend_bos": [],
    "labels": [None, 5, "ab", [], ["a"], ["a"] * 9, [None] * 8, [["a"]] * 8, ["a", 1] * 4, torch.ones(3), NOTHING],
    "groups": [5, [], [1], "ab", [[1]] * 8, NOTHING],
    "layers": [99, -99, [], "a", 1.5, [1.5], [99], NOTHING],
    "name": [None, 5, "nothing", "blocks.9.hook_resid_pre", "pattern", ""],
    "folds": [0, 1, 99, 1.5, "a", None],
    "l2": [0, -1, "a", None],
    "control": [None, "none", 5],
    "controls": [-1, 1.5, "a", None],
}
WRONG["answer_tokens"] = [*WRONG["targets"], None]
WRONG["incorrect_tokens"] = WRONG["targets"]
CASES = {
    lens_readings: {
        "input": TEXTS, **dict.fromkeys(["positions", "targets", "depths", "top_k", "lens", "attention_mask"])
    },
    logit_lens: {"input": TEXTS[0], "lens": None},
    train_tuned_lens: {
        "corpus": TEXTS, "steps": 1, **dict.fromkeys(["batch_size", "length", "learning_rate", "weight_decay", "seed"]),
        "progress": None,
    },
    lens_divergence: {"corpus": TEXTS, "lens": lambda resid, depth: resid, "batch_size": None, "length": None},
    head_scores: {"rows": 1, "period": 4, "seed": None, "vocabulary": None},
    repeated_tokens: {"rows": 1, "period": 4, "seed": None, "vocabulary": None},
    detect_heads: {
        "input": TEXTS, "pattern": "induction", **dict.fromkeys(["heads", "error_measure", "attention_mask"])
    },
    direct_logit_attribution: {
        "input": TEXTS, "answer_tokens": 5, **dict.fromkeys(["incorrect_tokens", "unit", "pos", "attention_mask"])
    },
    singular_readings: {"matrix": "OV", "layer": 0, "head": 0, "k": None, "tokens": None},
    train_probe: {
        "input": [f"x = {i}" for i in range(8)], "labels": ["a", "b"] * 4, "folds": 2,
        **dict.fromkeys(["positions", "groups", "layers", "name", "l2", "control", "controls", "seed", "batch_size"]),
        "progress": None,
    },
}  # fmt: skip
"""Every function with arguments that work; None for an argument's own default."""
ALSO = {
    "input": ["row", "text", "list", "mapping", "ids", "mask", "token"],
    "corpus": ["input", "read", "row", "mapping", "ids", "text"],
    "positions": ["position"],
    "depths": ["depth"],
    "targets": ["token"],
    "answer_tokens": ["token"],
    "incorrect_tokens": ["token"],
    "attention_mask": ["mask", "no real token"],
    "vocabulary": ["token to draw"],
    "name": ["point", "value"],
    "layers": ["layer"],
    "labels": ["label", "class"],
}
"""How else a message may name an argument."""


def wrong_arguments():
    for function, given in CASES.items():
        for name in given:
            for number, wrong in enumerate(WRONG[name]):
                yield pytest.param(function, name, wrong, id=f"{function.__name__}-{name}-{number}")


@pytest.mark.parametrize(("function", "name", "wrong"), list(wrong_arguments()))
def test_it_raises_and_names_the_argument(embedded, function, name, wrong):
    given = {one: value for one, value in CASES[function].items() if value is not None}
    if name == "attention_mask":
        given["input"] = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])
    with pytest.raises(ClearspanError, match="|".join([name, *ALSO.get(name, ())])):
        function(embedded, **{**given, name: wrong})
