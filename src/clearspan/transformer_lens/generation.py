"""Keywords of TransformerLens's `generate` as Hugging Face's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clearspan.checks import check_flags, number_of
from clearspan.errors import InvalidArgumentError, UnknownArgumentError

_OF_GENERATE = {
    "device": "cache.to(device), of the cache that return_cache=True gives",
    "return_input_tokens": "bridge.to_batch(input).tokens",
}
GENERATION_KEYWORDS = ("freq_penalty", "return_type", "stop_at_eos", "use_past_kv_cache", "verbose")
"""Keywords of TransformerLens's `generate` that Hugging Face's has not, and the bridge's has."""


@dataclass(frozen=True)
class FrequencyPenalty:
    """A logits processor of `generate` that makes a token less likely by how often the sequence has it.

    `logits / temperature - penalty * count`, as TransformerLens has it. Hugging Face divides by the temperature later.

    Attributes:
        penalty: What each occurrence takes, in logits.
        temperature: Of the sampling.
    """

    penalty: float
    temperature: float = 1.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the logits `[row, d_vocab]` less the penalty for the tokens `[row, pos]`."""
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype))
        return scores - self.penalty * self.temperature * counts


def hugging_face_keywords(given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords of a generation, TransformerLens's as Hugging Face's.

    Args:
        given: The keywords.
        settings: The model's settings of generation, where these say nothing.

    Raises:
        UnknownArgumentError: A keyword of TransformerLens's that is not here.
        InvalidArgumentError: A value that means nothing, or what two keywords say differently.
    """
    keywords = dict(given)
    if keywords.get("custom_generate") is not None:  # which has keywords of its own
        return keywords
    for name in keywords.keys() & _OF_GENERATE.keys():
        raise UnknownArgumentError(f"generate does not take {name!r}", fix=_OF_GENERATE[name])
    flags = {name: keywords.pop(name) for name in ("verbose", "stop_at_eos", "use_past_kv_cache") if name in keywords}
    check_flags(**flags)
    if not flags.get("stop_at_eos", True):
        _put(keywords, "eos_token_id", None, "stop_at_eos=False")
    if "use_past_kv_cache" in flags:
        _put(keywords, "use_cache", flags["use_past_kv_cache"], f"use_past_kv_cache={flags['use_past_kv_cache']}")
    if keywords.get("output_logits"):
        keywords.setdefault("return_dict_in_generate", True)
    penalty = number_of("freq_penalty", keywords.pop("freq_penalty", 0))
    if penalty:
        keywords["logits_processor"] = [*(keywords.get("logits_processor") or ()), _penalty(penalty, settings)]
    return keywords


def _put(keywords: dict[str, Any], name: str, value: object, said: str) -> None:
    if keywords.get(name, value) != value:
        raise InvalidArgumentError(f"{said} and {name}={keywords[name]!r} say different things", fix="one of them")
    keywords[name] = value


def _penalty(penalty: float, settings: Mapping[str, Any]) -> FrequencyPenalty:
    if penalty < 0:
        raise InvalidArgumentError(f"freq_penalty={penalty!r}", expected="0 or more")
    if not settings.get("do_sample"):
        raise InvalidArgumentError(
            "freq_penalty changes how tokens are sampled, and none are",
            got="do_sample=False",
            fix="generate(..., do_sample=True, freq_penalty=...), or repetition_penalty=",
        )
    return FrequencyPenalty(penalty, number_of("temperature", settings.get("temperature") or 1.0))
