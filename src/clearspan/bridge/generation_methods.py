"""The bridge's methods that generate; the work is in `generation.py` and `streaming.py`."""

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from torch import Tensor

from clearspan.bridge import generation, streaming
from clearspan.bridge.cache import ActivationCache
from clearspan.bridge.hooks import Hooks
from clearspan.bridge.inputs import Input
from clearspan.bridge.text import PaddingSide
from clearspan.points import NamesFilter

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge


class GenerationMethods:
    """Names what generation does."""

    @overload
    def generate(
        self,
        input: Input,
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide = "left",
        attention_mask: Tensor | None = None,
        fwd_hooks: Hooks = (),
        return_cache: Literal[False] = False,
        **generate_kwargs: Any,
    ) -> Any: ...

    @overload
    def generate(
        self,
        input: Input,
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide = "left",
        attention_mask: Tensor | None = None,
        fwd_hooks: Hooks = (),
        return_cache: Literal[True],
        names_filter: NamesFilter = None,
        **generate_kwargs: Any,
    ) -> tuple[Any, ActivationCache]: ...

    def generate(
        self,
        input: Input,
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide = "left",
        attention_mask: Tensor | None = None,
        fwd_hooks: Hooks = (),
        return_cache: bool = False,
        names_filter: NamesFilter = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Continues text or tokens by Hugging Face's own `generate`; hooks fire at each step.

        The cache is made in the same pass. It is that of one forward over the whole sequence but its last token, which
        was chosen but never went into the model. Where hooks wrote, it shows what each step went on with. Generation
        computes the logits of the prompt's last position alone, unless the cache is to have logits.

        Args:
            input: Text, a list of texts, or token ids `[batch, pos]`.
            prepend_bos: As for `forward`.
            padding_side: Where shorter texts are filled.
            attention_mask: `[batch, pos]` of a token tensor with padding.
            fwd_hooks: As for `run_with_hooks`, for this generation alone. A function is called once a forward: with all
                positions of the prompt, then with one position at a time; `hook.position` is the first one's index in
                the sequence, and `hook.step` counts the forwards.
            return_cache: Whether to return the activations too.
            names_filter: With `return_cache=True`, what to keep: as for `run_with_cache`.
            **generate_kwargs: For `hf_model.generate`: `max_new_tokens`, `do_sample`, `temperature`, `num_beams`, ...

        Returns:
            The whole text (a list for a list, or for several sequences), or the whole token tensor; with
            `return_dict_in_generate=True`, Hugging Face's output object. With `return_cache=True`, that and the cache,
            which has as many positions as the sequence has tokens, less one.

        Raises:
            UnknownPointError: A name is unknown, or a predicate holds for none; nothing was run.
            PointNotReachedError: A hook did not fire.
            HookValueError, HookTypeError: A function returned a value of the wrong shape, dtype or device.
            InvalidArgumentError: `return_cache=True` with several sequences a row (`num_beams`,
                `num_return_sequences`), speculation, or a KV cache that is not empty; `names_filter` without it.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> tokens = bridge.to_tokens("import o")
            >>> generated, cache = bridge.generate(tokens, return_cache=True, max_new_tokens=4, do_sample=False)
            >>> cache["resid_post", 3].shape[1] == generated.shape[1] - 1 == tokens.shape[1] + 3
            True
            >>> list(cache["pattern", 3].shape) == [1, 8, tokens.shape[1] + 3, tokens.shape[1] + 3]
            True
        """
        bridge = cast("TransformerBridge", self)
        prompt = generation.prepare(bridge, input, prepend_bos, padding_side, attention_mask, generate_kwargs)
        if return_cache:
            return generation.generate_with_cache(bridge, prompt, fwd_hooks, names_filter)
        generation.check_no_filter(names_filter)
        return generation.generate(bridge, prompt, fwd_hooks)

    @overload
    def generate_stream(
        self, input: Tensor, max_tokens_per_yield: int = 1, fwd_hooks: Hooks = (), **generate_kwargs: Any
    ) -> Generator[Tensor, None, None]: ...

    @overload
    def generate_stream(
        self, input: str | Sequence[str], max_tokens_per_yield: int = 1, fwd_hooks: Hooks = (), **generate_kwargs: Any
    ) -> Generator[Any, None, None]: ...

    def generate_stream(
        self,
        input: Input,
        max_tokens_per_yield: int = 1,
        fwd_hooks: Hooks = (),
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide = "left",
        attention_mask: Tensor | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Yields what `generate` adds, while it goes on.

        Generation waits while the caller does something else, and its hooks are off then: the bridge may be used
        between two items, also for another stream. The torch modes (`inference_mode`, `autocast`) are those under which
        the stream was made. A stream that is closed, or dropped, ends the generation.

        Args:
            input: As for `generate`.
            max_tokens_per_yield: New tokens of each row in an item; the last one may have fewer.
            fwd_hooks: As for `generate`.
            prepend_bos: As for `generate`.
            padding_side: As for `generate`.
            attention_mask: As for `generate`.
            **generate_kwargs: As for `generate`, but no beams: they change what was generated before.

        Returns:
            A generator. For tokens, of `[batch, new]` on the bridge's device. For text, of new text (a list for a list,
            or for several sequences), which together is what `generate` adds: bytes of a character that is not
            complete yet wait for the others.

        Raises:
            UnknownPointError: A name is unknown, or a predicate holds for none; nothing was run.
            InvalidArgumentError: `max_tokens_per_yield` below one, or a `streamer`.
            PointNotReachedError: Of the generator: a hook did not fire in the whole generation.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> added = "".join(bridge.generate_stream("import o", max_new_tokens=4, do_sample=False))
            >>> "import o" + added == bridge.generate("import o", max_new_tokens=4, do_sample=False)
            True
        """
        bridge = cast("TransformerBridge", self)
        prompt = generation.prepare(bridge, input, prepend_bos, padding_side, attention_mask, generate_kwargs)
        return streaming.stream(bridge, prompt, max_tokens_per_yield, fwd_hooks)
