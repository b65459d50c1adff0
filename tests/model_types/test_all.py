"""Every model type of transformers: built with a layer of each kind that its class makes by default, and verified."""

import inspect

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from clearspan import zoo
from clearspan.zoo import recipes
from clearspan.zoo.models import _parts, why_unbuildable

pytestmark = pytest.mark.zoo

BUILT = [name for name in zoo.types() if why_unbuildable(name) is None]

UNMAKEABLE = {
    "cohere_compass_text",
    "dbrx",
    "dots1",
    "gemma3n",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "lfm2_moe",
    "ministral",
    "nemotron",
    "qwen4_exp",
    "qwen4_exp_text",
    "reformer",
}
"""Model types of which transformers cannot make a model by its own default config, or not without further packages."""
REFUSED = {"inkling2_text", "xlm"}
"""Model types that are refused: `docs/architectures.md` says why."""
ABSENT = {"BigBirdBlockSparseAttention", "Identity"}
"""Kinds of module that a decoder does not have, or that compute nothing."""
TOWERS = ("vision", "audio", "visual", "vq", "image")

NEWER = {"dory", "inkling2_loop_text", "lara_mini", "sarvam_mla"}
"""Model types with a recipe that only the newest supported transformers has."""


def kinds(model):
    """Returns the classes of the modules that text passes through."""
    return {type(one).__name__ for path, one in model.named_modules() if not any(name in path for name in TOWERS)}


@pytest.mark.parametrize("model_type", BUILT)
def test_a_model_is_tiny_and_runs(model_type):
    model, again = zoo.build(model_type), zoo.build(model_type).state_dict()
    # Before it runs: RWKV scales weights of its own in a forward.
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    config = model.config.get_text_config()
    tokens = torch.randint(3, config.vocab_size, (2, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    assert logits.shape[:2] == tokens.shape
    assert logits.isfinite().all()
    assert 0.05 < logits.std() < 20


@pytest.mark.parametrize("model_type", [name for name in BUILT if name not in UNMAKEABLE])
def test_a_model_has_what_the_default_model_has(model_type):
    tiny = zoo.build(model_type)
    whole = CONFIG_MAPPING[model_type]
    own = type(tiny).config_class
    config = (own if own in _parts(whole).values() else whole)()
    with torch.device("meta"):
        default = type(tiny)(config)
    assert kinds(default) - kinds(tiny) - ABSENT == set()
    default_config, tiny_config = config.get_text_config(), tiny.config.get_text_config()
    for entry in ("layer_types", "mlp_layer_types"):
        assert set(vars(default_config).get(entry) or ()) <= set(vars(tiny_config).get(entry) or ()), entry


@pytest.mark.parametrize("model_type", zoo.types())
def test_a_model_verifies(model_type):
    row = zoo.check(model_type)
    assert (row.outcome == "unsupported") if model_type in REFUSED else row.is_right, row


@pytest.mark.parametrize(
    ("model_type", "fault"), [(name, one.fault) for one in zoo.PINS for name in one.model_types if name in zoo.types()]
)
def test_what_is_pinned_is_the_bare_models_fault(model_type, fault):
    assert fault(zoo.build(model_type)) > 1e-3


def test_an_entry_of_a_recipe_is_one_of_its_config():
    """A config keeps whatever it is given: a wrong name would change nothing, and not be noticed."""
    parts = (_parts(CONFIG_MAPPING[name]).values() for name in zoo.types())
    classes = {one.model_type: one for group in parts for one in group if hasattr(one, "model_type")}
    classes |= {name: CONFIG_MAPPING[name] for name in zoo.types()}
    for model_type, entries in recipes.OWN.items():
        if model_type not in classes:
            assert model_type in NEWER or transformers.__version__ < "5.23", model_type
            continue
        config_class = classes[model_type]
        names = set(config_class.__dataclass_fields__) | {"attn_implementation"}
        source = inspect.getsource(config_class)
        unknown = {name for name in entries if name not in names and name.removeprefix("swa_") not in source}
        assert not unknown, (model_type, unknown)
