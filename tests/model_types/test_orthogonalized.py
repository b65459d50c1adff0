"""Directions leave the weights of model types of transformers, or are refused by the name of a part."""

import pytest
import torch
from tests.model_types.test_all import BUILT, REFUSED

import clearspan
from clearspan import zoo
from clearspan.errors import InexactProcessingError

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore::UserWarning")]

NORMED = set(
    """
afmoe bloom exaone4 flex_olmo gemma2 gemma3 gemma3_text gemma4_text gemma4_unified gemma4_unified_text glm4
hyperclovax kolibri1 lfm3 mbart modernbert-decoder nanochat olmo2 olmo3 olmo_hybrid roberta-prelayernorm
""".split()
)
"""Types where a norm comes after sublayers or the embedding: the rest is normed anew, on demand."""
KEPT = set(
    """
axk1 bart beam bert bert-generation big_bird blenderbot-small blt camembert cpmant ctrl data2vec-text
deepseek_v4 diffllama doge electra ernie falcon_h1 gemma3n gemma3n_text gemma4 git hrm_text hy_v4 inkling_text
jetmoe longcat_flash marian minimax musicgen musicgen_melody mvp openai-gpt plbart prophetnet qwen4_exp
qwen4_exp_text reformer rembert roberta roc_bert roformer rwkv trocr xglm xlm-roberta xlnet xmod zaya
""".split()
)
"""Types whose stream is normed or multiplied, or where some part is opaque or has no weights."""
EVERY = 6
"""One type of so many is tried; with 1, all hold."""
ZERO = 1e-6
"""Of the stream's largest value; measured at most 3e-7."""
SAME = 2e-4
"""In logits; measured at most 4e-5."""


@pytest.mark.parametrize("model_type", sorted({*BUILT} - REFUSED)[::EVERY])
@torch.no_grad()
def test_the_stream_has_no_component_or_a_part_is_named(model_type):
    bridge = clearspan.boot(zoo.build(model_type))
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(bridge.cfg.d_model, 2, generator=generator)).Q
    if model_type in NORMED | KEPT:
        with pytest.raises(InexactProcessingError, match=r"(?s)where: \w.*reason: \w"):
            bridge.orthogonalized(basis.T)
    if model_type in KEPT:
        with pytest.raises(InexactProcessingError, match=r"(?s)where: \w.*reason: \w"):
            bridge.orthogonalized(basis.T, rescale=True)
        return
    new = bridge.orthogonalized(basis.T, rescale=model_type in NORMED)
    tokens = torch.randint(3, bridge.cfg.d_vocab, (2, 14), generator=generator)
    logits, cache = new.run_with_cache(tokens)
    for layer in range(bridge.cfg.n_layers):
        stream = cache["resid_post", layer]
        assert (stream @ basis.to(stream)).abs().max() < ZERO * stream.abs().max()
    if model_type not in NORMED:
        torch.testing.assert_close(logits, ablated(bridge, tokens, basis), rtol=0, atol=SAME)


def ablated(bridge, tokens, basis):
    """Logits of a run in which everything that is added loses its component."""

    def project(value, hook):
        columns = basis.to(value)
        return value - value @ columns @ columns.T

    added = [name for name in ("hook_embed", "hook_pos_embed", "hook_type_embed") if name in bridge.hook_dict]
    added += [sublayer.hook_out for block in bridge.blocks for sublayer in block.sublayers]
    return bridge.run_with_hooks(tokens, fwd_hooks=[(name, project) for name in added])
