"""What releases of transformers call differently, for tests that call transformers themselves."""

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from clearspan import zoo
from clearspan.hf.keywords import kv_cache_keyword


def on(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """Returns the keyword by which a model's own forward is given a KV cache."""
    return {kv_cache_keyword(model): cache}


def known(model_types: Iterable[str]) -> list[str]:
    """Returns those of some model types that this release of transformers has."""
    return [one for one in model_types if one in zoo.types()]


def repeats_keys(mixer: type[nn.Module]) -> bool:
    """Returns whether a mixer by the delta rule calls its function with queries and keys repeated for all heads.

    Transformers up to 5.20 does; later ones leave it to the function.
    """
    return "repeat_interleave" in inspect.getsource(mixer.forward)


def start_checkpointing(model: Any, *, reentrant: bool = False) -> None:
    """Turns gradient checkpointing on; transformers up to 5.22 has the first name alone."""
    newer = "activation_checkpointing_enable" in dir(type(model))
    start = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    start({"use_reentrant": reentrant})


def stop_checkpointing(model: Any) -> None:
    """Turns it off."""
    newer = "activation_checkpointing_disable" in dir(type(model))
    (model.activation_checkpointing_disable if newer else model.gradient_checkpointing_disable)()
