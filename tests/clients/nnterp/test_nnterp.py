"""nnsight and nnterp on the same model: what the page that compares says of both is so."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import LanguageModel
from nnterp import StandardizedTransformer
from nnterp.interventions import logit_lens
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import clearspan
from clearspan import TransformerBridge
from clearspan.interventions import Add, Intervention

PAGE = Path(__file__).parents[3] / "docs/coming-from-nnsight.md"
PROMPTS = {"prompt": "import os\nimport sys", "clean": "import os\nimport sys", "corrupted": "import re\nimport ast"}
SIZES = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4}


def saved(model: Any, folder: Path) -> str:
    """Returns the folder of a model with random weights and the embedded model's tokenizer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    model.save_pretrained(folder)
    clearspan.boot("tiny-bigcode").tokenizer.save_pretrained(folder)
    return str(folder)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def blocks(section: str) -> Iterator[tuple[str, str]]:
    """Yields each example of a section of the page: what is nnsight's, and what is clearspan's."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    assert text is not None, section
    for code in re.findall(r"```python\n(.*?)```", text[1], re.S):
        parts = re.split(r"^# (nnsight|clearspan).*\n", code, flags=re.M)
        found = dict(zip(parts[1::2], parts[2::2], strict=True))
        yield found.get("nnsight", ""), found.get("clearspan", "")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny GPT-2, whose modules' paths the page uses."""
    config = GPT2Config(n_positions=64, n_embd=48, n_layer=5, n_head=4, **SIZES)
    return saved(GPT2LMHeadModel(config), tmp_path_factory.mktemp("gpt2"))


@pytest.mark.parametrize(
    ("section", "variable"),
    [
        ("Read", "resid"),
        ("Write", "logits"),
        ("From one prompt into another", "logits"),
        ("Gradients", "grad"),
        ("Generation", "tokens"),
    ],
)
def test_both_sides_of_the_page_are_equal(gpt2: str, section: str, variable: str, tmp_path: Path) -> None:
    bridge = clearspan.boot(gpt2)
    bridge.cfg.default_prepend_bos = False  # nnsight gives its tokenizer's own ids to the model
    model = LanguageModel(gpt2, device_map="cpu", dispatch=True)
    for theirs, ours in blocks(section):
        found, expected = run(ours, tmp_path / "ours.py", bridge=bridge), None
        if theirs:
            expected = run(theirs, tmp_path / "theirs.py", model=model)[variable]
            close(torch.as_tensor(found[variable]).float(), expected.float())


def run(code: str, path: Path, **given: Any) -> dict[str, Any]:
    """Returns the variables of a piece of code after it was run; nnsight reads its source from a file."""
    path.write_text(code)
    there: dict[str, Any] = {**PROMPTS, **given, "torch": torch}
    exec(compile(code, str(path), "exec"), there)
    return there


def test_both_work_on_one_model_at_once() -> None:
    bridge = clearspan.boot("tiny-bigcode")
    model = LanguageModel(bridge.hf_model, tokenizer=bridge.tokenizer)
    tokens = bridge.to_tokens("import os")
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda value, hook: value * 0)]):
        with model.trace(tokens):
            resid = model.transformer.h[3].output.save()
        close(resid, bridge.run_with_cache(tokens)[1]["resid_post", 3])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TransformerBridge]:
    """A tiny Llama as nnterp has it, and a bridge to it."""
    config = LlamaConfig(num_key_value_heads=2, **LLAMA, **SIZES)
    folder = saved(LlamaForCausalLM(config), tmp_path_factory.mktemp("llama"))
    theirs = StandardizedTransformer(folder, device_map="cpu", dispatch=True, enable_attention_probs=True)
    return theirs, clearspan.boot(folder)


NAMES = re.findall(r"^\| `(\w+)(?:\[l\])?` \| `([\w.{}]+)` \|", PAGE.read_text(), re.M)
"""nnterp's names and ours, as the page has them."""


def test_names_of_nnterp_are_those_of_the_page(llama: tuple[Any, TransformerBridge]) -> None:
    theirs, bridge = llama
    prompt = PROMPTS["prompt"]
    tokens = bridge.to_tokens(prompt, prepend_bos=False)
    _, cache = bridge.run_with_cache(tokens)
    assert len(NAMES) == 9
    for name, own in NAMES:
        reads: Callable[[], Any] = lambda name=name, own=own: (  # noqa: E731
            getattr(theirs, name)[2] if "{l}" in own else getattr(theirs, name)
        )
        with theirs.trace(prompt):
            value = reads().save()
        close(value, cache[own.format(l=2)])


def test_functions_of_nnterp_have_their_like(llama: tuple[Any, TransformerBridge]) -> None:
    theirs, bridge = llama
    prompt = PROMPTS["prompt"]
    tokens = bridge.to_tokens(prompt, prepend_bos=False)
    _, cache = bridge.run_with_cache(tokens)
    vector = torch.randn(48, generator=torch.Generator().manual_seed(1))
    with theirs.trace(prompt):
        theirs.steer(layers=1, steering_vector=vector, factor=2.0, token_positions=-1)
        steered = theirs.logits.save()
    added = Intervention("resid_post", Add.of(vector, 2.0), layer=1, positions=-1)
    close(steered, bridge(tokens, interventions=[added]))
    with theirs.trace(prompt):
        theirs.skip_layers(1, 2)
        skipped = theirs.logits.save()
    close(skipped, bridge(cache["resid_pre", 1], start_at_layer=3))
    with theirs.trace(prompt):
        resid = theirs.layers_output[1]
        projected = theirs.project_on_vocab(resid).save()
    close(projected, bridge.read_out(cache["resid_post", 1]))
    close(logit_lens(theirs, [prompt]), cache.logit_lens()[1:, :, -1].softmax(-1).movedim(0, 1))
