"""Small adapters for tests: a mapping of components, as a function of the sizes, on a tiny model of transformers."""

from collections.abc import Callable, Collection

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from clearspan import TransformerBridge
from clearspan.architectures import ArchitectureAdapter
from clearspan.architectures.adapter import Sizes
from clearspan.components import GeneralizedComponent, LinearBridge, NormalizationBridge
from clearspan.config import TransformerBridgeConfig
from clearspan.hf.loading import bridge_config
from clearspan.points import Layout
from clearspan.verification import Level, Verification
from tests.zoo import GROUPED, IDS, SIZES

Mapping = Callable[[TransformerBridgeConfig], dict[str, GeneralizedComponent]]

RMS_NORM: dict[str, object] = {"normalization_type": "RMS", "uses_rms_norm": True, "final_rms": True}
LAYER_NORM: dict[str, object] = {"normalization_type": "LN", "uses_rms_norm": False, "final_rms": False}
"""`config_values` for mappings whose norms leave it to the sizes which kind they are."""
SPLIT_EVENLY: Sizes = {"d_head": (), "n_key_value_heads": ()}
"""`sizes` of heads that share `d_model` evenly, each with a key and a value of its own, whatever the config says."""


def bridged(model: PreTrainedModel, mapping: Mapping, **attributes: object) -> TransformerBridge:
    """Returns the bridge to a model under a mapping; `attributes` are those of an adapter's class."""
    kind = type("Mapped", (ArchitectureAdapter,), {"mapping": lambda _, cfg: mapping(cfg), **attributes})
    return TransformerBridge(model, kind(bridge_config(model, kind)))


def tiny(name: str, model: str | None = None, *, attn: str | None = None, **settings: object) -> PreTrainedModel:
    """Returns a tiny model with all weights random.

    Args:
        name: The start of its config's class name.
        model: Its class name; by default `{name}ForCausalLM`.
        attn: The implementation of attention.
        settings: Entries of its config.
    """
    config = getattr(transformers, f"{name}Config")(**{**IDS, **settings})
    if attn is not None:
        config._attn_implementation = attn
    return _randomised(getattr(transformers, model or f"{name}ForCausalLM")(config).eval())


def _randomised(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # tables of sines are frozen
                spread = 0.25 if parameter.ndim > 1 else 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def linears(layout: Layout = Layout.TOKENS, **names: str) -> dict[str, GeneralizedComponent]:
    """Returns linear maps by canonical name; `in_` stands for `in`."""
    return {key.rstrip("_"): LinearBridge(name=name, layout=layout) for key, name in names.items()}


def norms(**names: str) -> dict[str, GeneralizedComponent]:
    """Returns norms by canonical name."""
    return {key: NormalizationBridge(name=name) for key, name in names.items()}


def tokens(model: PreTrainedModel, rows: int = 2, length: int = 9) -> torch.Tensor:
    """Returns random token ids, of which none is for padding."""
    size = model.config.get_text_config().vocab_size
    return torch.randint(3, size, (rows, length), generator=torch.Generator().manual_seed(3))


levels = pytest.mark.parametrize("level", ["quick", pytest.param("full", marks=pytest.mark.slow)])
"""Runs a test at both levels of `verify`, the full one among the slow tests."""


def assert_verified(bridge: TransformerBridge, level: Level, *, but: Collection[str] = ()) -> Verification:
    """Asserts that a bridge passes all of `verify`, and returns what that found.

    Args:
        bridge: The bridge.
        level: How much is tried.
        but: Checks that fail for a reason of the model's own: they must.
    """
    found = bridge.verify(level)
    failed = {f"{check.group}: {check.what}": f"{check.error} {check.explanation[:300]}" for check in found.failures}
    said = "\n".join(f"{what}: {why}"[:400] for what, why in list(failed.items())[:12])
    assert set(failed) == set(but), f"{len(failed)} of {len(found.checks)}:\n{said}"
    return found


__all__ = [
    "GROUPED",
    "LAYER_NORM",
    "RMS_NORM",
    "SIZES",
    "SPLIT_EVENLY",
    "assert_verified",
    "bridged",
    "levels",
    "linears",
    "norms",
    "tiny",
    "tokens",
]
