"""The page of architectures is made from a result of the zoo."""

import json
import runpy
from pathlib import Path

import pytest

from clearspan.zoo import Row, Zoo

MAKE = runpy.run_path(str(Path(__file__).parents[2] / "docs/architectures.py"))
ROWS = (
    Row(
        "gpt2",
        "GPT2LMHeadModel",
        "passes",
        "by hand",
        447,
        parts={"positions": "standard", "norms": "ln1, ln2", "attn": "JointQKVAttention", "mlp": "MLP"},
        seconds=1.5,
    ),
    Row("bart", "BartForCausalLM", "pinned", "by structure", 400, pinned={"row of 9 (error 1.0e-01)": "it counts"}),
    Row("mbart", "MBartForCausalLM", "pinned", "by structure", 400, pinned={"row of 9 (error 1.5e-01)": "it counts"}),
    Row("rwkv", "RwkvForCausalLM", "fails", "by hand", 9, failures={"writes": ("one (error 1.0e+00)", "two")}),
    Row("gemma3n", "Gemma3nForConditionalGeneration", "not built", reason="it needs packages\n  fix: none"),
)


def test_the_page_and_the_count():
    result = json.loads(MAKE["kept"](Zoo("5.23.0", "full", ROWS, 12.0)))
    assert MAKE["page"](result).splitlines()[5:] == [
        "| result | model types | what it means |",
        "|---|---|---|",
        '| passes | 1 | every check of `bridge.verify("full")` holds |',
        "| pinned | 2 | every check holds but for those that fail in transformers itself, without this library |",
        "| fails | 1 | a check fails |",
        "| not built | 1 | there is no tiny model to verify |",
        "",
        "| model type | class | adapted | attention | positions | norms | MLP | other sublayers | result |",
        "|---|---|---|---|---|---|---|---|---|",
        "| `gpt2` | `GPT2LMHeadModel` | by hand | JointQKVAttention | standard | ln1, ln2 | MLP |  | passes |",
        "| `bart` | `BartForCausalLM` | by structure |  |  |  |  |  | pinned |",
        "| `mbart` | `MBartForCausalLM` | by structure |  |  |  |  |  | pinned |",
        "| `rwkv` | `RwkvForCausalLM` | by hand |  |  |  |  |  | fails |",
        "| `gemma3n` | `Gemma3nForConditionalGeneration` |  |  |  |  |  |  | not built |",
        "",
        "Why a model type does not simply pass:",
        "",
        "- `bart`, `mbart`: pinned: it counts.",
        "- `rwkv`: 2 of the checks of writes fail, such as one.",
        "- `gemma3n`: it needs packages.",
    ]
    assert MAKE["count"](result) == (
        "3 of the 5 model types that transformers 5.23.0 maps to a causal language model pass,\n"
        "1 adapted by hand and 2 by structure; 2 of them but for checks that fail in transformers itself.\n"
    )
    assert "seconds" not in result
    assert "error" not in json.dumps(result)


@pytest.mark.skipif(not MAKE["KEPT"].exists(), reason="docs/zoo.json is there: python docs/architectures.py --run")
def test_the_page_is_current():
    result = json.loads(MAKE["KEPT"].read_text())
    assert MAKE["PAGE"].read_text() == MAKE["page"](result), "run: python docs/architectures.py"
    assert MAKE["count"](result) in MAKE["README"].read_text()
