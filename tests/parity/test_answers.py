"""The log-probability of an answer of several tokens, on every architecture: that of the plain model, row by row."""

import pytest
import torch
from tests.zoo import MODELS, build

import clearspan
from clearspan.sweep import answered

PROMPTS, ANSWERS = [[5, 9, 30, 2, 7], [11], [3, 3, 8]], [[4, 8], [60, 61, 62, 63], [12]]


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in MODELS if " " not in name])
def test_it_is_the_sum_that_the_plain_model_gives_whichever_side_is_padded(family):
    model = build(family)
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        log_probs = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected.append(log_probs.gather(-1, torch.tensor(answer)[:, None]).sum())
    bridge = clearspan.boot(model)
    for side in ("left", "right"):
        batch, metric = answered(bridge, PROMPTS, ANSWERS, padding_side=side)
        assert batch.is_padded
        torch.testing.assert_close(metric(bridge(batch), batch), torch.stack(expected), rtol=1e-4, atol=1e-4)
