import pytest
import torch
from clearspan.analysis.attribution.readout import directions_of, logits_of
from tests.zoo import build

import clearspan

VARIANTS = {
    "gpt_bigcode": {},
    "gemma2": {},
    "granite": {},
    "cohere2": {},
    "gptj": {},
    "opt": {"word_embed_proj_dim": 32},
    "opt post-norm": {},
}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_ways_are_the_models_own_readout_at_one_scale(variant):
    bridge = clearspan.boot(build(variant, **VARIANTS[variant]))
    tokens = torch.tensor([[1, 2, 3]])
    vector = torch.randn(bridge.cfg.d_model, generator=torch.Generator().manual_seed(1))
    names = ["unembed.hook_out"] + ["ln_final.hook_scale"] * ("ln_final.hook_scale" in bridge.hook_dict)
    _, clean = bridge.run_with_cache(tokens, names)

    def add(resid, hook):
        resid += vector

    hooks = [(f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post", add)]
    hooks += [(name, lambda scale, hook: clean[hook.name]) for name in names[1:]]
    with bridge.hooks(fwd_hooks=hooks):
        _, edited = bridge.run_with_cache(tokens, names[:1])
    added = (edited["unembed.hook_out"] - clean["unembed.hook_out"])[0] * bridge.cfg.logit_scale
    scale = clean["ln_final.hook_scale"][0] if names[1:] else 1
    torch.testing.assert_close(logits_of(bridge, vector).expand(3, -1), added * scale, rtol=1e-3, atol=1e-3)
    ids = torch.tensor([[5, 6], [7, 96]])
    torch.testing.assert_close(
        directions_of(bridge, ids) @ vector, logits_of(bridge, vector)[ids], rtol=1e-4, atol=1e-4
    )


def test_half_precision_is_read_in_float32():
    bridge = clearspan.boot(build("llama").bfloat16())
    found = logits_of(bridge, torch.ones(bridge.cfg.d_model, dtype=torch.bfloat16))
    weights = bridge.ln_final.w.float() @ bridge.W_U.float()
    assert found.dtype == directions_of(bridge, torch.tensor(3)).dtype == torch.float32
    torch.testing.assert_close(found, weights)
