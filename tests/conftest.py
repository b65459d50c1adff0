"""Models built in the process, and the embedded one."""

import os
from collections.abc import Callable

import pytest
import torch
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

import clearspan
from clearspan import TransformerBridge

# Tiny models are fastest with one thread, many times so where several processes share the cores.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

SIZES = {"vocab_size": 97, "n_positions": 32, "n_embd": 48, "n_layer": 3, "n_head": 4}


def tiny_model(**config: object) -> GPTBigCodeForCausalLM:
    """Returns a model with weights, biases and norms all random, and large enough that every path matters."""
    settings = {**SIZES, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **config}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPTBigCodeForCausalLM(GPTBigCodeConfig(**{**dropouts, **settings})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.25 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


VARIANTS: dict[str, dict[str, object]] = {
    "multi-query": {},
    "multi-head": {"multi_query": False},
    "one head": {"n_head": 1},
    "unscaled": {"scale_attn_weights": False},
    "softmax not in fp32": {"attention_softmax_in_fp32": False, "scale_attention_softmax_in_fp32": False},
    "eager": {"attn_implementation": "eager"},
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> TransformerBridge:
    """A bridge to each variant of the family."""
    return clearspan.boot(tiny_model(**VARIANTS[request.param]))


@pytest.fixture
def bridge() -> TransformerBridge:
    """A bridge to a random multi-query model without a tokenizer."""
    return clearspan.boot(tiny_model())


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two rows of seven tokens."""
    return torch.randint(1, SIZES["vocab_size"], (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def embedded() -> TransformerBridge:
    """The embedded model. Tests must leave it as it is."""
    return clearspan.boot("tiny-bigcode")


@pytest.fixture
def make_bridge() -> Callable[..., TransformerBridge]:
    """Makes bridges to random models of other configs."""
    return lambda **config: clearspan.boot(tiny_model(**config))


@pytest.fixture(autouse=True)
def _torch_is_left_as_it_was() -> object:
    yield
    assert torch.is_grad_enabled()
