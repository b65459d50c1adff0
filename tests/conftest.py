"""Models built in the process, and the embedded one."""

import functools
import gc
import os
import pickle
from collections.abc import Callable

import hypothesis
import pytest
import torch
from filelock import FileLock
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

import clearspan
from clearspan import TransformerBridge
from clearspan.verification import Verification
from tests import zoo

# Tiny models are fastest with one thread, many times so where several processes share the cores.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# The same examples at every run, however long each takes: a machine may be slow.
hypothesis.settings.register_profile("everywhere", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("everywhere")


def pytest_collection_finish() -> None:
    """Leaves out of garbage collection what stays to the end."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Verification]:
    """Returns the full verification of a model of the zoo: made once, by the process of the tests that first asks."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all processes

    @functools.cache
    def of(variant: str) -> Verification:
        path = folder / f"{variant}.pickle"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_bytes(pickle.dumps(clearspan.boot(zoo.build(variant)).verify("full")))
        return pickle.loads(path.read_bytes())

    return of


@pytest.fixture
def make_bridge() -> Callable[..., TransformerBridge]:
    """Makes bridges to random models of other configs."""
    return lambda **config: clearspan.boot(tiny_model(**config))


@pytest.fixture(autouse=True)
def _torch_is_left_as_it_was() -> object:
    torch.manual_seed(0)  # what a test draws does not depend on the tests before it in its process
    yield
    assert torch.is_grad_enabled()
