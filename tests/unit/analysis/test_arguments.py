"""Whatever is given to a public function: it works, or it raises one of the library's own errors."""

import inspect

import numpy as np
import pytest
import torch

from clearspan import analysis
from clearspan.errors import ClearspanError

BILLION = 10**9
WRONG = (
    None,
    True,
    0,
    -1,
    2.5,
    BILLION,
    float("nan"),
    "nonsense",
    b"bytes",
    object(),
    [],
    (),
    {},
    [None],
    ["", 3],
    [[]],
    {"a": 1},
    print,
    torch.tensor([]),
    torch.tensor([0.5]),
    torch.ones(1, 2, 3),
    torch.tensor([[10**6]]),
    np.array(["x"]),
    range(0),
)
"""Values of every type that somebody may give by mistake."""
RIGHT = {
    "predictions": {"input": "import os"},
    "causal_effect": {"input": "x", "progress": False},
    "report": {"input": "x", "progress": False},
    "loss_by_position": {"corpus": "import os"},
    "evaluate_repetition": {"rows": 1, "period": 3},
    "induction_loss": {"rows": 1, "period": 3},
    "ioi_prompts": {"count": 2, "templates": ["if {first} < {second}: {again} ="], "names": ["a", "b", "c", "d", "e"]},
    "evaluate_ioi": {"prompts": "as ioi_prompts"},
    "max_activating_examples": {"texts": "import os", "name": "blocks.0.mlp.hook_post", "index": 3, "k": 1},
    "next_token_loss": {"tokens": torch.tensor([[1, 2]])},
}
"""What each function is given where nothing is wrong."""
ARGUMENTS = [(name, one) for name in RIGHT for one in inspect.signature(getattr(analysis, name)).parameters]
WORK = {"rows", "count", "k"}
"""Arguments of which 10 ** 9 is much work, and no mistake."""


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_a_wrong_argument_raises_an_error_of_the_librarys_own(embedded, name, argument):
    function, given = getattr(analysis, name), {**RIGHT[name]}
    if "bridge" in inspect.signature(function).parameters:
        given["bridge"] = embedded
    if name == "evaluate_ioi":
        given["prompts"] = analysis.ioi_prompts(embedded, **RIGHT["ioi_prompts"])
    raw = []
    for wrong in WRONG:
        if argument == "bridge" or (argument in WORK and wrong is BILLION):
            continue
        try:
            function(**{**given, argument: wrong})
        except ClearspanError:
            pass
        except Exception as error:  # noqa: BLE001 - all are told at once
            raw.append(f"{argument}={wrong!r}: {type(error).__name__}: {error}"[:200])
    assert not raw, "\n".join(raw)
