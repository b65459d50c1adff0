"""Model types that only the newest supported release of transformers has: served by structure, or refused by name."""

import pytest
from tests.releases import known

from clearspan import zoo

SERVED = known(("apertus1p5_text", "exaone", "lara_mini", "sarvam_mla", "sarvam_moe"))
REFUSED = {
    "dory": "no linear map gives the logits",
    "inkling2_loop_text": "what model.layers.0 adds to the residual stream is no sum of modules' outputs",
}
"""With what is missing. Dory's blocks besides move a stream of length 1 towards what sublayers give; Inkling 2 runs
blocks again, on messages of the run before."""


@pytest.mark.parametrize("model_type", SERVED)
def test_a_type_is_verified(model_type):
    row = zoo.check(model_type, "quick")
    assert row.outcome == "passes", row


@pytest.mark.parametrize("model_type", known(REFUSED))
def test_a_type_of_another_make_is_refused(model_type):
    row = zoo.check(model_type, "quick")
    assert (row.outcome, row.reason.splitlines()[2]) == ("unsupported", f"  reason: {REFUSED[model_type]}")
