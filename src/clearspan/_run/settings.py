"""Settings of a generation, checked before it starts: what Hugging Face's `generate` would find out on its way."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from clearspan._forward.given import check_kv_cache, check_length
from clearspan.checks import check_counts, check_flags, check_kind, number_of, whole
from clearspan.errors import InputError, InvalidArgumentError, UnknownArgumentError
from clearspan.hf.generation import as_criteria
from clearspan.hf.keywords import KV_CACHE, KV_CACHE_NAMES, generation_keywords, kv_cache_keyword
from clearspan.inputs import Batch
from clearspan.model import Model
from clearspan.points import nearest
from clearspan.transformer_lens import GENERATION_KEYWORDS, hugging_face_keywords

_COUNTS = {
    "max_new_tokens": 1,
    "max_length": 1,
    "min_new_tokens": 0,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
    "prompt_lookup_num_tokens": 1,
}
"""Settings that are whole numbers, with the least."""
_NUMBERS = {
    "temperature": math.inf,
    "top_p": 1.0,
    "min_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": math.inf,
}
"""Settings that are numbers from 0, with the most."""
_FLAGS = (
    "do_sample",
    "use_cache",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "remove_invalid_values",
    "renormalize_logits",
)
"""Settings that are True or False."""
_LISTS = ("stopping_criteria", "logits_processor")
"""Settings that are lists."""


@runtime_checkable
class _GenerationConfig(Protocol):
    """What of a `transformers.GenerationConfig` is asked for."""

    def to_dict(self) -> dict[str, Any]: ...


def effective_settings(model: Model, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `generate` is given and, where it is not, what the configs say."""
    config = given.get("generation_config")
    configs = [model.hf_model.generation_config, *([config] if isinstance(config, _GenerationConfig) else [])]
    sources = (*map(vars, configs), given)  # `to_dict` copies them deeply, which takes as long as a small forward
    return {name: value for source in sources for name, value in source.items() if value is not None}


def checked_settings(model: Model, batch: Batch, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords of a generation as Hugging Face has them, with whole numbers as Python's.

    Stop strings are looked for with the bridge's own tokenizer.

    Raises:
        UnknownArgumentError: A keyword that neither clearspan nor `generate` has.
        InvalidArgumentError: A value that means nothing.
        InputError: More tokens than the model's table of positions has.
        NoTokenizerError: Stop strings without a tokenizer.
    """
    given = hugging_face_keywords(given, effective_settings(model, given))
    _check_known(model, given)
    config = given.get("generation_config")
    if not (config is None or isinstance(config, _GenerationConfig)):
        raise InvalidArgumentError(
            f"generation_config={config!r}"[:80], expected="a transformers.GenerationConfig", got=type(config).__name__
        )
    settings = dict(given)
    if "stopping_criteria" in settings:
        settings["stopping_criteria"] = as_criteria(settings["stopping_criteria"])
    if settings.get("stop_strings"):
        settings.setdefault("tokenizer", model.text.tokenizer)
    if (kv_cache := settings.pop(KV_CACHE, None)) is not None:
        check_kv_cache(kv_cache)
        settings[kv_cache_keyword(model.hf_model)] = kv_cache
    for name, least in _COUNTS.items():
        if settings.get(name) is not None:
            found = whole(settings[name])
            check_counts(least, **{name: settings[name] if found is None else found})
            settings[name] = found
    for name, most in _NUMBERS.items():
        if settings.get(name) is not None and not 0 <= number_of(name, settings[name]) <= most:
            raise InvalidArgumentError(
                f"{name}={settings[name]!r}", expected="0 or more" if most == math.inf else f"0 to {most:g}"
            )
    check_flags(**{name: settings[name] for name in _FLAGS if settings.get(name) is not None})
    check_kind(list, tuple, **{name: settings[name] for name in _LISTS if settings.get(name) is not None})
    if settings.get("do_sample") and settings.get("temperature") == 0:
        raise InvalidArgumentError(
            "temperature=0 leaves nothing to sample", expected="temperature > 0", fix="do_sample=False"
        )
    _check_room(model, batch, {} if config is None else config.to_dict(), settings)
    return settings


def _check_known(model: Model, given: Mapping[str, Any]) -> None:
    """Raises if a keyword is one that `generate` would not know; a loop of the user's own has its own."""
    if given.get("custom_generate") is not None:
        return
    known = generation_keywords(model.hf_model) if given else set()
    for name in given:
        if name in KV_CACHE_NAMES and name != KV_CACHE:
            raise UnknownArgumentError(
                f"the bridge does not take {name!r}", fix=f"{KV_CACHE}=..., whatever the model's own forward calls it"
            )
        if name not in known:
            raise UnknownArgumentError(
                f"unknown keyword {name!r}",
                nearest=nearest(name, {*known, *GENERATION_KEYWORDS}),
                where=f"neither TransformerBridge.generate nor that of {type(model.hf_model).__name__} takes it",
            )


def _check_room(model: Model, batch: Batch, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises if nothing would be generated, or a position be asked for that the model does not have."""
    own = model.hf_model.generation_config.max_new_tokens
    new = settings.get("max_new_tokens") or config.get("max_new_tokens") or own
    length = settings.get("max_length") or config.get("max_length")
    if new is None and length is not None and batch.tokens is not None and length <= batch.width:
        raise InvalidArgumentError(
            f"max_length={length} leaves no room for new tokens",
            expected=f"more than the {batch.width} tokens of the input",
            fix="max_new_tokens=..., which does not count the input",
        )
    check_length(model, batch.width)
    n_ctx, total = model.cfg.n_ctx, length or 0 if new is None else batch.width + new
    if model.cfg.is_limited and total - 1 > n_ctx:  # the last token is chosen, but never goes into the model
        raise InputError(
            "the generation is longer than the model's context",
            expected=f"at most {n_ctx} tokens to go into the model",
            got=f"{total - 1}: {batch.width} of the input, and all new ones but the last",
            fix=f"max_new_tokens={n_ctx - batch.width + 1}",
        )
