"""Generation by Hugging Face's own generate, whole or as a stream, with hooks and a cache for its length."""

import collections
import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from clearspan._cache.room import Choice, choose
from clearspan._forward.given import check_width, counting, either, positions
from clearspan._run import caching, hooks
from clearspan._run.handover import Handover
from clearspan._run.hooks import Hooks
from clearspan._run.settings import checked_settings, effective_settings
from clearspan.cache import ActivationCache
from clearspan.checks import check_choice, is_whole
from clearspan.errors import GenerationRefusedError, InputError, InvalidArgumentError
from clearspan.hf.generation import GenerationRecording
from clearspan.hf.keywords import KV_CACHE, kv_cache_in
from clearspan.inputs import Batch, Input
from clearspan.interrupts import let_through
from clearspan.model import Model
from clearspan.points import NamesFilter
from clearspan.text import BROKEN, PaddingSide

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


ReturnType = Literal["input", "str", "tokens"]


@dataclass(frozen=True)
class Prompt:
    """What Hugging Face's `generate` is called with.

    Attributes:
        batch: The prompt's rows.
        kwargs: Its keywords.
        return_type: `"str"` for text, `"tokens"`, or `"input"` for what the input was.
    """

    batch: Batch
    kwargs: Mapping[str, Any]
    return_type: ReturnType = "input"

    @property
    def gives_text(self) -> bool:
        """Whether text is returned, and not tokens."""
        return self.batch.texts is not None if self.return_type == "input" else self.return_type == "str"

    @property
    def gives_one(self) -> bool:
        """Whether the text of one row is returned by itself, and not in a list."""
        return self.batch.is_one or (self.batch.texts is None and self.batch.rows == 1)

    @property
    def start(self) -> Tensor:
        """Token ids that come before the new ones in what is generated: none for embeddings."""
        return self.batch.value.new_empty(self.batch.rows, 0).long() if self.batch.tokens is None else self.batch.tokens


def prepare(
    model: Model,
    input: Input | None,
    prepend_bos: bool | None,
    padding_side: PaddingSide | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    generate_kwargs: Mapping[str, Any],
) -> Prompt:
    """Returns the prompt of an input. The arguments are those of `TransformerBridge.generate`.

    Raises:
        GenerationRefusedError: Points cannot be followed through a generation of this model.
    """
    if model.adapter.no_generation is not None:
        raise GenerationRefusedError(
            "this model's generations cannot be followed",
            where=model.cfg.architecture,
            reason=model.adapter.no_generation,
            fix="bridge.hf_model.generate(...), without hooks; or a run of the whole sequence",
        )
    batch = model.to_batch(
        either(input, inputs_embeds),
        attention_mask,
        prepend_bos,
        "left" if padding_side is None else padding_side,
        continue_final_message=None,
    )
    if batch.embeds is not None:
        check_width(model, batch.embeds, is_residual=False)
    if batch.attention is not None:
        raise InputError(
            "a generation takes a mask of padding",
            expected=f"attention_mask {list(batch.value.shape[:2])}",
            got=str(list(batch.attention.shape)),
        )
    # Transformers would number positions from 0 on, whatever the model does.
    own = {} if counting(model) is None else positions(model, batch, batch.real)
    given = dict(generate_kwargs)
    if given.get("max_new_tokens") is None:  # which would hide what the configs say
        given.pop("max_new_tokens", None)
    return_type = given.pop("return_type", "input")
    check_choice(("input", "str", "tokens"), return_type=return_type)
    kwargs = {"attention_mask": batch.real, **own, **checked_settings(model, batch, given)}
    if "pad_token_id" not in kwargs and model.hf_model.generation_config.pad_token_id is None:
        kwargs["pad_token_id"] = model.text.pad_id
    prompt = Prompt(batch, kwargs, return_type)
    if prompt.gives_text:
        _ = model.text.tokenizer  # raises before anything is run
    return prompt


def generate(model: Model, prompt: Prompt, fwd_hooks: Hooks) -> Any:
    """Returns text for text, tokens for tokens."""
    with hooked(model, fwd_hooks, itertools.count(), prompt) as listeners:
        generated = run(model, prompt)
        hooks.check_fired(listeners)
    return _as_given(model, prompt, generated)


def generate_with_cache(
    model: Model, prompt: Prompt, fwd_hooks: Hooks, names_filter: NamesFilter
) -> tuple[Any, ActivationCache]:
    """Returns what `generate` does, and a cache of all that went through the model."""
    _check_cacheable(model, prompt)
    choice = choose(model, names_filter)
    recording = GenerationRecording(choice.points, prompt.batch.rows)
    keywords = {"logits_to_keep": 0} if _keeps_logits(model, choice) else {}

    def is_paused() -> bool:
        return model.taps.turns.is_away or not model.taps.is_recording

    with (
        hooked(model, fwd_hooks, itertools.count(), prompt) as listeners,
        model.taps.record(choice.points.values(), choice.plan, recording),
        recording.following(model.hf_model, is_paused, keywords),
    ):
        generated = run(model, prompt, **keywords)
        hooks.check_fired(listeners)
    sequences = generated if isinstance(generated, Tensor) else generated.sequences
    batch = _gone_through(prompt, sequences)
    recording.close(batch.width)
    caching.check_kept(choice, names_filter, recording)
    return _as_given(model, prompt, generated), ActivationCache.of_run(model, choice.points, recording, batch=batch)


def _gone_through(prompt: Prompt, sequences: Tensor) -> Batch:
    """Returns what went through the model in a generation: the prompt and all new tokens but the last."""
    new = sequences.shape[1] - prompt.start.shape[1] - 1
    mask = None if prompt.batch.mask is None else functional.pad(prompt.batch.mask, (0, new), value=1)
    if prompt.batch.tokens is not None:
        return Batch(sequences[:, :-1], mask)
    nothing = torch.empty(prompt.batch.rows, prompt.batch.width + new, 0)
    return Batch(None, mask, embeds=nothing)


def check_no_filter(names_filter: NamesFilter) -> None:
    """Raises if a filter was given where nothing is kept."""
    if names_filter is not None:
        raise InvalidArgumentError(
            "names_filter says what a cache keeps, and no cache was asked for",
            got="return_cache=False",
            fix="bridge.generate(..., return_cache=True, names_filter=...)",
        )


@contextlib.contextmanager
def hooked(model: Model, fwd_hooks: Hooks, steps: Iterator[int], prompt: Prompt) -> Iterator[hooks.Attached]:
    """Keeps generation's hooks on, and numbers its forwards for them, while the context is open."""
    with model.taps.run(prompt.batch, steps), hooks.attached(model, fwd_hooks) as listeners:
        yield listeners


def run(model: Model, prompt: Prompt, **keywords: Any) -> Any:
    """Returns what Hugging Face's `generate` does.

    With a KV cache of fixed length it would compile the model on a GPU, and the compiled model would not call torch
    hooks; so compiling is turned off where something listens.
    """
    kwargs = {**prompt.kwargs, **keywords}
    may_compile = (
        kv_cache_in(kwargs) is not None
        or effective_settings(model, prompt.kwargs).get("cache_implementation") is not None
    )
    if may_compile and (model.taps.is_listening or model.taps.is_recording):
        kwargs["disable_compile"] = True
    hf_model: Any = model.hf_model  # its class has `generate` where it is a causal language model
    if prompt.batch.tokens is None:
        return let_through(hf_model.generate, inputs_embeds=prompt.batch.embeds, **kwargs)
    return let_through(hf_model.generate, prompt.batch.tokens, **kwargs)


def _check_cacheable(model: Model, prompt: Prompt) -> None:
    settings = effective_settings(model, prompt.kwargs)
    past = kv_cache_in(settings)
    if past is not None and past.get_seq_length():
        raise InvalidArgumentError(
            "return_cache=True starts with an empty KV cache",
            got=f"{KV_CACHE} of {int(past.get_seq_length())} positions",
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


def _keeps_logits(model: Model, choice: Choice) -> bool:
    """Whether the unembedding, which generation runs at the last position alone, must run at all of them."""
    unembeds = any(place.module in ("", model.unembed.module_path) for place in choice.plan.places)
    hf_model: Any = model.hf_model
    return unembeds and hf_model._supports_logits_to_keep()


def _as_given(model: Model, prompt: Prompt, generated: Any) -> Any:
    if not prompt.gives_text or not isinstance(generated, Tensor):
        return generated
    texts = model.text.without_special(generated)
    return texts[0] if prompt.gives_one and len(texts) == 1 else texts


def stream(
    model: Model, prompt: Prompt, max_tokens_per_yield: int, fwd_hooks: Hooks
) -> Generator[Tensor, None, None] | Generator[str | list[str], None, None]:
    """Returns the stream of a prompt's continuation. The arguments are those of `TransformerBridge.generate_stream`."""
    if not is_whole(max_tokens_per_yield) or max_tokens_per_yield < 1:
        raise InvalidArgumentError(
            "a stream gives at least one token at a time",
            expected="max_tokens_per_yield of 1 or more",
            got=f"{max_tokens_per_yield}",
        )
    if "streamer" in prompt.kwargs:
        raise InvalidArgumentError(
            "generate_stream has a streamer of its own",
            got=type(prompt.kwargs["streamer"]).__name__,
            fix="bridge.generate(..., streamer=...)",
        )
    with hooked(model, fwd_hooks, iter(()), prompt):
        pass  # a name that is unknown raises here, not when the first token is asked for
    handover: Handover[Tensor] = Handover(
        lambda hand: run(model, prompt, streamer=_Streamer(hand, max_tokens_per_yield))
    )
    tokens = _tokens(model, handover, fwd_hooks, prompt)
    return _texts(model, prompt, tokens) if prompt.gives_text else tokens


class _Streamer:
    """What Hugging Face's `generate` puts its tokens into.

    Args:
        hand: Given up to `size` tokens of each row at a time, `[batch, new]`.
        size: How many.
    """

    def __init__(self, hand: Callable[[Tensor], None], size: int) -> None:
        self._hand = hand
        self._size = size
        self._rows: int | None = None
        self._tokens: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        """Takes the prompt first, then the new token of each row (several, of one row, in speculation)."""
        if self._rows is None:
            self._rows = len(value)
            return
        self._tokens.extend(value.reshape(self._rows, -1).unbind(1))
        while len(self._tokens) >= self._size:
            self._flush()

    def end(self) -> None:
        """Hands on what is left."""
        if self._tokens:
            self._flush()

    def _flush(self) -> None:
        tokens, self._tokens = self._tokens[: self._size], self._tokens[self._size :]
        self._hand(torch.stack(tokens, 1))


def _tokens(
    model: Model, handover: Handover[Tensor], fwd_hooks: Hooks, prompt: Prompt
) -> Generator[Tensor, None, None]:
    """Yields new tokens `[batch, new]`. The hooks are on while a token is made, and off while the caller has it."""
    steps = itertools.count()
    calls: collections.Counter[int] = collections.Counter()
    with contextlib.closing(handover):
        while True:
            with hooked(model, fwd_hooks, steps, prompt) as listeners:
                chunk = next(handover, None)
            calls.update({index: listener.calls for index, (_, listener, _) in enumerate(listeners)})
            if chunk is None:
                break
            yield chunk.to(model.device)
    for index, (_, listener, _) in enumerate(listeners):
        listener.calls = calls[index]
    hooks.check_fired(listeners)


def _texts(
    model: Model, prompt: Prompt, chunks: Generator[Tensor, None, None]
) -> Generator[str | list[str], None, None]:
    """Yields the new text of each row, as soon as it is known and not earlier."""
    sequences = prompt.start
    shown = model.text.without_special(sequences)
    with contextlib.closing(chunks):
        for chunk in itertools.chain(chunks, [None]):
            if chunk is not None:
                copies = len(chunk) // len(sequences)  # several sequences a row
                sequences = torch.cat([sequences.repeat_interleave(copies, 0), chunk], 1)
                shown = [text for text in shown for _ in range(copies)]
            texts = model.text.without_special(sequences)
            new = [_beyond(before, text, chunk is None) for before, text in zip(shown, texts, strict=True)]
            shown = [text if there else before for before, (text, there) in zip(shown, new, strict=True)]
            if any(there for _, there in new):
                yield new[0][1] if prompt.gives_one and len(new) == 1 else [there for _, there in new]


def _beyond(shown: str, text: str, is_last: bool) -> tuple[str, str]:
    """Returns how far a text is certain, and what of that is beyond the text shown already.

    Bytes at its end may be the first of a character whose others come later.

    Args:
        shown: What was shown, the prompt's text first.
        text: The text of all tokens so far.
        is_last: Whether it is complete.
    """
    certain = text if is_last else text.rstrip(BROKEN)
    if certain.startswith(shown):
        return certain, certain[len(shown) :]
    if not is_last:
        return shown, ""
    # Some tokenizers decode a character that never becomes whole into more than its own bytes.
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(shown, text, strict=False)))
    return text, text[same:]
