"""Keywords of Hugging Face's forwards and of its `generate`: what the installed release of transformers calls them."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from clearspan.errors import InvalidArgumentError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

KV_CACHE = "past_key_values"
"""This library's keyword for a KV cache, whatever the model's forward calls it."""
KV_CACHE_NAMES = (KV_CACHE, "cache", "cache_params")
"""What forwards call their KV cache: `past_key_values` up to transformers 5.23, `cache` from 5.24 on."""


def kv_cache_keyword(model: nn.Module) -> str:
    """Returns what a model's forward calls its KV cache.

    Raises:
        InvalidArgumentError: The forward takes none.
    """
    return _kv_cache_keyword(type(model))


@functools.cache
def _kv_cache_keyword(kind: type[nn.Module]) -> str:
    names = inspect.signature(kind.forward).parameters
    for name in KV_CACHE_NAMES:
        if name in names:
            return name
    raise InvalidArgumentError(
        "this model takes no KV cache",
        expected=f"one of {', '.join(KV_CACHE_NAMES)} among the parameters of its forward",
        got=", ".join(names),
        where=kind.__name__,
    )


def takes_position_ids(model: "PreTrainedModel") -> bool:
    """Whether a model's forward takes the positions of tokens: by itself, or for the decoder that it hands them to.

    Args:
        model: A Hugging Face model.
    """
    named = inspect.signature(type(model).forward).parameters
    if "position_ids" in named:
        return True
    decoder = model.get_decoder()
    if decoder is model or not isinstance(decoder, nn.Module):
        return False
    hands_on = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in named.values())
    return hands_on and "position_ids" in inspect.signature(type(decoder).forward).parameters


def kv_cache_in(keywords: Mapping[str, Any]) -> "Cache | None":
    """Returns the KV cache among the keywords of a forward, under whichever name; or None.

    Forwards also take the name of an earlier release, and rename it after torch hooks have seen it.
    """
    for name in KV_CACHE_NAMES:
        found = keywords.get(name)
        if found is not None:
            return found
    return None


def is_kv_cache(value: object) -> bool:
    """Whether an argument of a block is a KV cache."""
    from transformers import Cache

    return isinstance(value, Cache)


def without_kv_cache(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords of a forward without its KV cache."""
    return {name: value for name, value in keywords.items() if name not in KV_CACHE_NAMES}


def generation_keywords(model: Any) -> set[str]:
    """Returns the keywords that a model's `generate` does something with: settings, and arguments of its forward.

    A KV cache is among them under this library's keyword.

    Args:
        model: A Hugging Face model that can generate.
    """
    from transformers.utils.generic import TransformersKwargs

    functions = ("generate", "prepare_inputs_for_generation", "forward")
    named = {name for function in functions for name in _parameters_of(model, function)}
    # These are taken out of the keywords by name, in code of `generate` that no signature shows.
    hidden = {"tokenizer", "assistant_tokenizer", "trust_remote_code"}
    settings = vars(model.generation_config).keys()
    known = {*named, *hidden, *settings, *TransformersKwargs.__optional_keys__} - {"self", "kwargs", "model_kwargs"}
    return known - {*KV_CACHE_NAMES} | {KV_CACHE}


def _parameters_of(model: Any, function: str) -> tuple[str, ...]:
    """Returns the names of the parameters of a model's function; of one in the place of its class's, where it is."""
    own = vars(model).get(function)
    return _parameters(getattr(type(model), function)) if own is None else tuple(inspect.signature(own).parameters)


@functools.lru_cache(64)
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
