import pytest
import torch

import clearspan.analysis.reporting.effect as effect
from clearspan.analysis import causal_effect


@pytest.fixture(scope="module")
def found(bridge, tokens):
    return causal_effect(bridge, tokens)


@torch.no_grad()
def test_each_cell_is_one_run_with_a_hook(bridge, tokens, found):
    log_probs = bridge(tokens)[0, -1].log_softmax(-1)
    assert found.target == int(log_probs.argmax())
    assert found.log_prob == pytest.approx(float(log_probs.max()))
    for layer in range(bridge.cfg.n_layers):
        for position in range(tokens.shape[1]):

            def ablate(resid, hook, position=position):
                resid[:, position] = resid[:, 1:].mean(1)

            logits = bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", ablate)])
            naive = log_probs[found.target] - logits[0, -1].log_softmax(-1)[found.target]
            # Log-probabilities of size 10, in float32: 1e-5 relative.
            assert found.drop[layer, position] == pytest.approx(float(naive), rel=1e-5, abs=1e-4), (layer, position)


def test_chunks_change_nothing_and_report_how_far_they_are(bridge, tokens, found, monkeypatch):
    monkeypatch.setattr(effect, "BATCH_TOKENS", 4 * tokens.shape[1])
    steps = []
    chunked = causal_effect(bridge, tokens, progress=lambda *step: steps.append(step))
    torch.testing.assert_close(chunked.drop, found.drop, rtol=1e-5, atol=1e-5)
    per_layer = -(-tokens.shape[1] // 4)
    total = per_layer * bridge.cfg.n_layers
    assert steps == [("causal effect", done, total) for done in range(1, total + 1)]


def test_a_single_token_has_nothing_to_be_replaced_by(bridge, tokens):
    assert not causal_effect(bridge, tokens[:, :1]).drop.abs().gt(1e-5).any()


def test_the_replacement_is_the_mean_without_the_first_position():
    resid = torch.tensor([[[100.0], [1.0], [3.0]]])
    assert effect.stand_in(resid).tolist() == [2.0]
