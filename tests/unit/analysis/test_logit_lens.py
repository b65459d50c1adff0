import pytest
import torch

from clearspan.analysis import logit_lens


@pytest.fixture(scope="module")
def lens(bridge, tokens):
    return logit_lens(bridge, tokens)


@torch.no_grad()
def test_the_last_row_is_the_models_own_prediction_exactly(bridge, tokens, lens):
    own = bridge(tokens)[0].softmax(-1).max(-1)
    assert torch.equal(lens.top_ids[-1], own.indices)
    assert torch.equal(lens.top_probs[-1], own.values)
    assert torch.equal(lens.final_ids, own.indices)
    assert torch.equal(lens.final_probs[-1], own.values)
    assert not lens.final_ranks[-1].any()


@torch.no_grad()
def test_every_row_is_norm_then_unembedding_of_its_stream(bridge, tokens, lens):
    _, cache = bridge.run_with_cache(tokens)
    streams = [cache["resid_pre", 0], *(cache["resid_post", layer] for layer in range(bridge.cfg.n_layers))]
    assert lens.depths == ("embed", "0", "1", "2", "3", "4")
    for row, stream in enumerate(streams):
        probs = bridge.unembed(bridge.ln_final(stream))[0].softmax(-1)
        torch.testing.assert_close(lens.top_probs[row], probs.max(-1).values, rtol=1e-5, atol=1e-7)
        final = probs[range(tokens.shape[1]), lens.final_ids]
        torch.testing.assert_close(lens.final_probs[row], final, rtol=1e-5, atol=1e-7)
        assert torch.equal(lens.final_ranks[row], (probs > final[:, None]).sum(-1))
