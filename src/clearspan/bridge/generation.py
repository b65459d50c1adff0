"""Generation, by Hugging Face's own `generate`, with hooks and a cache for its length."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clearspan.bridge import caching, hooks
from clearspan.bridge.cache import ActivationCache
from clearspan.bridge.hooks import Hooks
from clearspan.bridge.inputs import Input, as_tensor, check_length
from clearspan.bridge.text import PaddingSide
from clearspan.errors import InputError, InvalidArgumentError
from clearspan.hf.generation import GenerationRecording
from clearspan.points import Direction, HookPoint, Listener, NamesFilter

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge

_SPECULATION = "it runs tokens that are then thrown away"
_OWN_LOOP = "it decides itself what the model is run on"
_UNCACHED = {
    "num_beams": "the search moves rows from one beam to another",
    "num_return_sequences": "rows of the cache are rows of the input",
    "assistant_model": _SPECULATION,
    "assistant_early_exit": _SPECULATION,
    "prompt_lookup_num_tokens": _SPECULATION,
    "use_mtp": _SPECULATION,
    "custom_generate": _OWN_LOOP,
    "penalty_alpha": _OWN_LOOP,
    "dola_layers": _OWN_LOOP,
    "logits_to_keep": "the cache has the logits of every position",
}
"""Settings of Hugging Face's `generate` under which the forwards are not the sequence piece by piece, and why."""


@dataclass(frozen=True)
class Prompt:
    """What Hugging Face's `generate` is called with.

    Attributes:
        tokens: Token ids `[batch, pos]`.
        kwargs: Its keywords.
        is_text: Whether the input was text.
        is_one: Whether it was one text, not a list.
    """

    tokens: Tensor
    kwargs: Mapping[str, Any]
    is_text: bool
    is_one: bool


def prepare(
    bridge: "TransformerBridge",
    input: Input,
    prepend_bos: bool | None,
    padding_side: PaddingSide,
    attention_mask: Tensor | None,
    generate_kwargs: Mapping[str, Any],
) -> Prompt:
    """Returns the prompt of an input. The arguments are those of `TransformerBridge.generate`."""
    tokens, mask = as_tensor(bridge, input, prepend_bos, padding_side)
    if tokens.is_floating_point():
        raise InputError("generation starts from text or token ids", got="embeddings")
    check_length(bridge, tokens.shape[1] + (generate_kwargs.get("max_new_tokens") or 0))
    mask = attention_mask if attention_mask is not None else mask
    kwargs = {"attention_mask": torch.ones_like(tokens) if mask is None else mask, **generate_kwargs}
    if "pad_token_id" not in kwargs and bridge.hf_model.generation_config.pad_token_id is None:
        pad = None if bridge.tokenizer is None else bridge.tokenizer.pad_token_id
        kwargs["pad_token_id"] = 0 if pad is None else pad
    return Prompt(tokens, kwargs, not isinstance(input, Tensor), isinstance(input, str))


def generate(bridge: "TransformerBridge", prompt: Prompt, fwd_hooks: Hooks) -> Any:
    """Returns text for text, tokens for tokens."""
    with hooked(bridge, fwd_hooks, itertools.count()) as listeners:
        generated = run(bridge, prompt)
        hooks.check_fired(listeners)
    return _as_given(bridge, prompt, generated)


def generate_with_cache(
    bridge: "TransformerBridge", prompt: Prompt, fwd_hooks: Hooks, names_filter: NamesFilter
) -> tuple[Any, ActivationCache]:
    """Returns what `generate` does, and a cache of all that went through the model."""
    _check_cacheable(bridge, prompt)
    choice = caching.choose(bridge, names_filter)
    recording = GenerationRecording(choice.points, len(prompt.tokens))
    keywords = {"logits_to_keep": 0} if _keeps_logits(bridge, choice) else {}
    with (
        hooked(bridge, fwd_hooks, itertools.count()) as listeners,
        bridge.taps.record(choice.points.values(), choice.plan, recording),
        recording.following(bridge.hf_model, lambda: bridge.taps.is_suspended),
    ):
        generated = run(bridge, prompt, **keywords)
        hooks.check_fired(listeners)
    sequences = generated if isinstance(generated, Tensor) else generated.sequences
    recording.close(sequences.shape[1] - 1)
    caching.check_kept(choice, names_filter, recording)
    cache = ActivationCache(
        bridge,
        choice.points,
        recording,
        rows=len(prompt.tokens),
    )
    return _as_given(bridge, prompt, generated), cache


def check_no_filter(names_filter: NamesFilter) -> None:
    """Raises if a filter was given where nothing is kept."""
    if names_filter is not None:
        raise InvalidArgumentError(
            "names_filter says what a cache keeps, and there is none",
            got="return_cache=False",
            fix="bridge.generate(..., return_cache=True, names_filter=...)",
        )


@contextlib.contextmanager
def hooked(
    bridge: "TransformerBridge", fwd_hooks: Hooks, steps: Iterator[int]
) -> Iterator[list[tuple[HookPoint, Listener, Direction]]]:
    """Keeps generation's hooks on, and numbers its forwards for them, while the context is open."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(bridge.taps.follower.counting(steps))
        # Without hooks of its own, generation inside a hook function is the plain model's.
        attached = hooks.attached(bridge, fwd_hooks, (), True, False) if fwd_hooks else None
        yield [] if attached is None else stack.enter_context(attached)


def run(bridge: "TransformerBridge", prompt: Prompt, **keywords: Any) -> Any:
    """Returns what Hugging Face's `generate` does.

    With a KV cache of fixed length it would compile the model on a GPU, and the compiled model would not call the torch
    hooks; so it is kept from it where somebody listens.
    """
    kwargs = {**prompt.kwargs, **keywords}
    may_compile = "past_key_values" in kwargs or _settings(bridge, prompt).get("cache_implementation") is not None
    if may_compile and (bridge.taps.is_listening or bridge.taps.is_recording):
        kwargs["disable_compile"] = True
    model: Any = bridge.hf_model  # its class has `generate` where it is a causal language model
    return model.generate(prompt.tokens, **kwargs)


def _settings(bridge: "TransformerBridge", prompt: Prompt) -> dict[str, Any]:
    """Returns what `generate` was given and, where it was not, what the configs say."""
    given = prompt.kwargs.get("generation_config")
    configs = [config.to_dict() for config in (bridge.hf_model.generation_config, given) if config is not None]
    return {name: value for source in (*configs, prompt.kwargs) for name, value in source.items() if value is not None}


def _check_cacheable(bridge: "TransformerBridge", prompt: Prompt) -> None:
    settings = _settings(bridge, prompt)
    past = settings.get("past_key_values")
    if past is not None and past.get_seq_length():
        raise InvalidArgumentError(
            "return_cache=True starts with an empty KV cache",
            got=f"past_key_values of {int(past.get_seq_length())} positions",
            reason="positions that do not go through the model would be missing",
        )
    for name, reason in _UNCACHED.items():
        value = settings.get(name)
        usual = 1 if name in ("num_beams", "num_return_sequences") else None
        if value and value != usual:
            raise InvalidArgumentError(
                f"return_cache=True does not go with {name}",
                got=f"{name}={value!r}" if isinstance(value, int | float | str) else type(value).__name__,
                reason=reason,
                fix="generate without a cache, then bridge.run_with_cache(generated[:, :-1])",
            )


def _keeps_logits(bridge: "TransformerBridge", choice: caching.Choice) -> bool:
    """Whether the unembedding, which generation runs at the last position alone, must run at all of them."""
    unembeds = any(place.module in ("", bridge.unembed.module_path) for place in choice.plan.places)
    model: Any = bridge.hf_model
    return unembeds and model._supports_logits_to_keep()


def _as_given(bridge: "TransformerBridge", prompt: Prompt, generated: Any) -> Any:
    if not prompt.is_text or not isinstance(generated, Tensor):
        return generated
    texts = decode(bridge, generated)
    return texts[0] if prompt.is_one and len(texts) == 1 else texts


def decode(bridge: "TransformerBridge", sequences: Tensor) -> list[str]:
    """Returns the text of each row, without special tokens."""
    assert bridge.tokenizer is not None, "text was encoded"
    return [str(text) for text in bridge.tokenizer.batch_decode(sequences, skip_special_tokens=True)]
