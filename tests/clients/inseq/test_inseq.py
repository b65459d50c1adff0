"""inseq takes the bridge's own model, and its attributions see the bridge's hooks."""

import contextlib

import inseq
import pytest
import torch
from torch import Tensor

import clearspan
from clearspan import TransformerBridge

PROMPT = "import os\nimport sys\n\ndef area(self"
OFF = [("blocks.1.hook_mlp_out", lambda value, hook: value * 0)]


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    """A bridge to the embedded model."""
    return clearspan.boot("tiny-bigcode")


def attributed(bridge: TransformerBridge, method: str, text: str) -> tuple[list[int], Tensor, int]:
    """Returns the ids of a text, what inseq attributes to them for each generated token, and where that starts."""
    model = inseq.load_model(bridge.hf_model, method, tokenizer=bridge.tokenizer)
    found = model.attribute(PROMPT, text, show_progress=False).sequence_attributions[0]
    return [token.id for token in found.target], found.target_attributions, found.attr_pos_start


@pytest.mark.parametrize("hooked", [False, True])
def test_saliency_is_the_gradient_at_the_embedding(bridge: TransformerBridge, hooked: bool) -> None:
    text = bridge.generate(PROMPT, max_new_tokens=4, do_sample=False)
    with bridge.hooks(fwd_hooks=OFF) if hooked else contextlib.nullcontext():
        ids, found, start = attributed(bridge, "saliency", text)
        assert len(ids) == start + 4
        for step in range(start, len(ids)):
            _, cache = bridge.run_with_cache(
                torch.tensor([ids[:step]]),
                names_filter="hook_embed",
                incl_bwd=lambda logits, step=step: logits[0, -1].softmax(-1)[ids[step]],
            )
            own = cache["hook_embed_grad"][0].abs()
            torch.testing.assert_close(found[:step, step - start], own, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "method", ["input_x_gradient", "integrated_gradients", "gradient_shap", "deeplift", "occlusion"]
)
def test_hooks_are_on_in_attributions(bridge: TransformerBridge, method: str) -> None:
    text = bridge.generate(PROMPT, max_new_tokens=2, do_sample=False)
    _, plain, _ = attributed(bridge, method, text)
    with bridge.hooks(fwd_hooks=OFF):
        _, hooked, _ = attributed(bridge, method, text)
    assert hooked.shape == plain.shape
    assert not torch.allclose(hooked, plain, equal_nan=True)
    _, again, _ = attributed(bridge, method, text)
    if method != "gradient_shap":  # which draws at random
        torch.testing.assert_close(again, plain, equal_nan=True)


def test_attention_is_the_pattern() -> None:
    """With eager attention: transformers gives no patterns otherwise."""
    bridge = clearspan.boot("tiny-bigcode", attn_implementation="eager")
    text = bridge.generate(PROMPT, max_new_tokens=3, do_sample=False)
    ids, found, start = attributed(bridge, "attention", text)
    _, cache = bridge.run_with_cache(torch.tensor([ids]))
    patterns = torch.stack([cache["pattern", layer][0] for layer in range(bridge.cfg.n_layers)])
    for step in range(start, len(ids)):
        own = patterns[:, :, step - 1, :step]
        torch.testing.assert_close(found[:step, step - start].permute(1, 2, 0), own, atol=1e-5, rtol=1e-4)
