"""The bridge: a model that can be run. Its methods name and document; each calls one function.

It is long by its documentation, not by what it does.
"""

import contextlib
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clearspan._cache.plan import CachePlan
from clearspan._cache.readings import Tokens, token_ids
from clearspan._cache.slices import PosSlice
from clearspan._forward.forward import ReturnType, lm_loss
from clearspan._forward.readout import read_out
from clearspan._run import caching, generation, runs
from clearspan._run.hooks import Hooked, Hooks, add_hook, edits, reset_hooks
from clearspan._run.processed import orthogonalized, processed
from clearspan._run.sources import Source
from clearspan.architectures import AdapterSource, check_source, find_adapter, name_of
from clearspan.cache import ActivationCache
from clearspan.checks import check_flags, device_of, dtype_of
from clearspan.errors import (
    AdapterError,
    ClearspanError,
    DerivedWarning,
    HooksOnModelWarning,
    InvalidArgumentError,
    UnknownArgumentError,
    UnsupportedArchitectureError,
    argument,
)
from clearspan.hf.loading import bridge_config, check_model, load_model
from clearspan.hf.releases import warn_of_release, warn_of_what_is_left_out
from clearspan.hf.shrunk import is_large
from clearspan.hf.taps import heard, reset
from clearspan.hf.tokenizers import NO_TOKENIZER, check_tokenizer
from clearspan.index import Names
from clearspan.inputs import Input
from clearspan.interventions import Intervention
from clearspan.model import handed_over
from clearspan.modes import eager
from clearspan.points import Direction, HookFunction, NamesFilter
from clearspan.progress import Progress
from clearspan.saes import SparseAutoencoders
from clearspan.structure import Structure, derive, derive_from_small
from clearspan.text import PaddingSide
from clearspan.transformer_lens import TransformerLensNames
from clearspan.verification import FAULTS, Level, Verification, check_derived, not_holding, verify, warn_of_structure
from clearspan.weights.orthogonal import Part

if TYPE_CHECKING:
    from clearspan.hf.types import PreTrainedModel, PreTrainedTokenizerBase


class TransformerBridge(SparseAutoencoders, TransformerLensNames):
    """A Hugging Face model, seen and reached into under canonical names. `clearspan.boot` makes one.

    What it holds is documented in `Model`: `hf_model`, `cfg`, `blocks`, `hook_dict`, `to_tokens`, `W_Q`, ... Names of
    TransformerLens that are others here are in `TransformerLensNames`.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> tokens = bridge.to_tokens("def area(self):")
        >>> logits, cache = bridge.run_with_cache(tokens)
        >>> list(cache["pattern", 0].shape) == [1, 8, tokens.shape[1], tokens.shape[1]]
        True
    """

    # --- forward -----------------------------------------------------------------------------------------------------

    # fmt: off
    @overload
    def __call__(
        self, input: Input | None = ..., return_type: Literal["logits", "loss"] = ..., loss_per_token: bool = ...,
        **forward_kwargs: Any
    ) -> Tensor: ...
    @overload
    def __call__(
        self, input: Input | None = ..., *, return_type: Literal["both"], loss_per_token: bool = ...,
        **forward_kwargs: Any
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self, input: Input | None = ..., *, return_type: None, loss_per_token: bool = ...,
        **forward_kwargs: Any
    ) -> None: ...
    # fmt: on
    @eager
    def __call__(
        self,
        input: Input | None = None,
        return_type: ReturnType | None = "logits",
        loss_per_token: bool = False,
        **forward_kwargs: Any,
    ) -> Any:
        """Runs the model; see `forward`."""
        return runs.forward(self, input, return_type, loss_per_token, **forward_kwargs)

    @eager
    def forward(
        self,
        input: Input | None = None,
        return_type: ReturnType | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        inputs_embeds: Tensor | None = None,
        interventions: Sequence[Intervention] = (),
        sources: Mapping[str, Source] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Runs the model.

        Args:
            input: Text, a list of texts, token ids `[batch, pos]`, and all else that `to_batch` takes; embeddings
                `[batch, pos, d_model]`; or, with `start_at_layer`, the residual stream entering that layer. A token
                tensor is taken as it is: padding in it is only known by `attention_mask`.
            return_type: `"logits"` `[batch, pos, d_vocab]`; `"loss"`, the mean next-token cross-entropy in nats;
                `"both"`; or None, for hooks alone.
            loss_per_token: Whether the loss is `[batch, pos-1]` instead of its mean.
            prepend_bos: Whether text gets one BOS first; by default as `cfg.default_prepend_bos` says.
            padding_side: Where shorter texts are filled; by default the tokenizer's side.
            attention_mask: `[batch, pos]`, 1 for real tokens, 0 for padding.
            position_ids: `[batch, pos]`; by default made from the mask where there is padding.
            past_key_values: A Hugging Face cache, which the run extends in place. Without one no KV cache is made. It
                goes with whole runs alone.
            start_at_layer: First block to run; those before it are not run.
            stop_at_layer: Block before which to stop; the residual stream there `[batch, pos, d_model]` is returned.
                `n_layers` gives the last residual. Negative layers count from the end.
            inputs_embeds: Embeddings, in place of an input.
            interventions: What is done to which value, as data (`clearspan.interventions`), in this order where several
                are at one point.
            sources: The runs from which interventions take values, by name: any input, which is run, a cache, or
                tensors by hook point's full name.
            **model_kwargs: Further keywords of the model's own forward.

        Raises:
            InputError: Empty, longer than the context, of the wrong shape, or ids outside the vocabulary.
            NoTokenizerError: Text without a tokenizer.
            UnknownArgumentError: A keyword that neither this method nor the model's forward has.
            InvalidArgumentError: A layer that does not exist, or a loss without tokens.
            PointNotReachedError: Someone listens in a part of the model that is not run.

        Example:
            >>> import clearspan
            >>> from clearspan.interventions import Intervention, Patch
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> patch = Intervention("resid_pre", Patch("other"), layer=2, positions=-1)
            >>> logits = bridge("import os", interventions=[patch], sources={"other": "import re"})
        """
        return runs.forward(
            self,
            input,
            return_type,
            loss_per_token,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            start_at_layer=start_at_layer,
            stop_at_layer=stop_at_layer,
            inputs_embeds=inputs_embeds,
            interventions=interventions,
            sources=sources,
            **model_kwargs,
        )

    @eager
    def read_out(
        self, residual: Float[Tensor, "batch pos d_model"], tokens: Sequence[int] | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Returns the logits that the model makes of a residual stream after the last block.

        Its final norm, unembedding, and scale or cap. Gradients pass. No hook is called.

        Args:
            residual: The stream.
            tokens: Ids whose logits are computed, `[batch, pos, token]` in their order; by default all.
        """
        return read_out(self, residual, tokens)

    @eager
    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Input,
        attention_mask: Tensor | None = None,
        per_token: bool = False,
    ) -> Float[Tensor, "..."]:
        """Returns the loss of logits, as `forward` does: the cross-entropy of each next token, in nats.

        Args:
            logits: Of a run on the tokens.
            tokens: What was run: token ids `[batch, pos]`, or any other input.
            attention_mask: As for `forward`.
            per_token: Whether it is `[batch, pos-1]`, zero where none counts, and not the mean.

        Raises:
            InvalidArgumentError: The logits are not those of the tokens, or there is one token alone.
        """
        with argument("tokens"):
            batch = self.to_batch(tokens, attention_mask)
        check_flags(per_token=per_token)
        expected = [batch.rows, batch.width, self.cfg.d_vocab]
        if not isinstance(logits, Tensor) or list(logits.shape) != expected or batch.tokens is None or batch.width < 2:
            raise InvalidArgumentError(
                "these are no logits of these tokens",
                expected=f"logits {expected}, of two tokens or more",
                got=f"logits {list(logits.shape)}" if isinstance(logits, Tensor) else f"logits={logits!r}"[:80],
            )
        return lm_loss(logits, batch.ids.to(logits.device), batch.mask, per_token)

    @eager
    def tokens_to_residual_directions(self, tokens: Tokens) -> Float[Tensor, "*token d_model"]:
        """Returns the unembedding's column of each token; without an axis of tokens for one.

        Args:
            tokens: Text that is one token, an id, or ids `[token]` or `[batch, pos]`.

        Raises:
            InvalidArgumentError: They are no ids of the vocabulary.

        Example:
            >>> import clearspan, torch
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> direction = bridge.tokens_to_residual_directions(" os")
            >>> torch.equal(direction, bridge.W_U[:, bridge.to_single_token(" os")])
            True
        """
        ids = token_ids(self, tokens)
        return self.W_U[:, ids.reshape(()) if ids.numel() == 1 else ids].movedim(0, -1)

    # --- hooks and interventions -------------------------------------------------------------------------------------

    # fmt: off
    @overload
    def run_with_hooks(
        self, input: Input | None = ..., fwd_hooks: Hooks = ..., bwd_hooks: Hooks = ..., reset_hooks_end: bool = ...,
        clear_contexts: bool = ..., return_type: Literal["logits", "loss"] = ..., loss_per_token: bool = ...,
        **forward_kwargs: Any
    ) -> Tensor: ...
    @overload
    def run_with_hooks(
        self, input: Input | None = ..., fwd_hooks: Hooks = ..., bwd_hooks: Hooks = ..., reset_hooks_end: bool = ...,
        clear_contexts: bool = ..., *, return_type: Literal["both"], loss_per_token: bool = ...,
        **forward_kwargs: Any
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def run_with_hooks(
        self, input: Input | None = ..., fwd_hooks: Hooks = ..., bwd_hooks: Hooks = ..., reset_hooks_end: bool = ...,
        clear_contexts: bool = ..., *, return_type: None, loss_per_token: bool = ...,
        **forward_kwargs: Any
    ) -> None: ...
    # fmt: on
    @eager
    def run_with_hooks(
        self,
        input: Input | None = None,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        return_type: ReturnType | None = "logits",
        loss_per_token: bool = False,
        *,
        interventions: Sequence[Intervention] = (),
        sources: Mapping[str, Source] | None = None,
        **forward_kwargs: Any,
    ) -> Any:
        """Runs the model with hooks that are there for this run.

        Args:
            input: As for `forward`.
            fwd_hooks: Pairs of a name, several names, a compiled pattern or a predicate of names, and
                `fn(value, hook)`. The function edits the value in
                place, or returns one of the same shape and dtype, or returns None. Edits in place are known by torch's
                count of them, which `value.data` and numpy go past: use `value` itself. Where gradients are enabled the
                value is on their graph (`value.retain_grad()`), but for derived ones, which refuse.
            bwd_hooks: Likewise with the value's gradient, called in the `backward` of what this run returns.
            reset_hooks_end: Whether the hooks come off at the end, also after an exception.
            clear_contexts: Whether the `ctx` of their points is emptied at the end.
            return_type: As for `forward`.
            loss_per_token: As for `forward`.
            interventions: As for `forward`. At one point they come before the functions of this run.
            sources: As for `forward`.
            **forward_kwargs: Further arguments of `forward`.

        Returns:
            What `forward` returns.

        Raises:
            UnknownPointError: A name is unknown, or a predicate holds for none; nothing was run.
            PointNotReachedError: A hook cannot fire, or did not fire, in this run; or a function asked a derived value
                for its gradient.
            HookValueError, HookTypeError: A function returned a value of the wrong shape, dtype or device.
            UnwritableError: A write that gradient checkpointing would lose.
            ModelBusyError: Another thread's run is inside a hook function that does not return; see `patience`.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> def ablate_head_3(z, hook):
            ...     z[:, :, 3] = 0
            >>> logits = bridge.run_with_hooks("import os", fwd_hooks=[("blocks.1.attn.hook_z", ablate_head_3)])
        """
        return runs.run_with_hooks(
            self,
            input,
            fwd_hooks,
            bwd_hooks,
            reset_hooks_end,
            clear_contexts,
            return_type,
            loss_per_token,
            interventions=interventions,
            sources=sources,
            **forward_kwargs,
        )

    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        *,
        interventions: Sequence[Intervention] = (),
        sources: Mapping[str, Source] | None = None,
    ) -> contextlib.AbstractContextManager[Self]:
        """Keeps hooks on while the context is open: for several runs, generation, or a forward and its backward.

        The arguments are those of `run_with_hooks`. Sources are run once, when the context opens. The hooks see the
        forwards of this context (`contextvars`) alone: what other threads and tasks run meanwhile is as it would be
        without them.
        """
        return Hooked(self, fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts, interventions, sources)

    @eager
    def add_hook(
        self,
        name: Names,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> None:
        """Puts a function on a point, or on all that a predicate holds for, until `reset_hooks`; on all or on none.

        It sees every forward of the model, in whatever thread.

        Args:
            name: A point's name, or a predicate of names.
            hook: As in `run_with_hooks`.
            dir: `"fwd"` for the value, `"bwd"` for its gradient.
            is_permanent: Whether `reset_hooks` leaves it unless told otherwise.
            prepend: Whether it is called before the functions there already.
        """
        add_hook(self, name, hook, dir, is_permanent, prepend)

    @eager
    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
    ) -> None:
        """Takes hooks off all points, also those of other bridges to this model, and of bridges that are gone.

        Those of a `with bridge.hooks()` that is open in another thread or task stay.

        Args:
            clear_contexts: Whether every point's `ctx` is emptied too.
            direction: Which hooks.
            including_permanent: Whether permanent ones go too.
        """
        reset_hooks(self, clear_contexts, direction, including_permanent)

    # --- caches ------------------------------------------------------------------------------------------------------

    # fmt: off
    @overload
    def run_with_cache(
        self, input: Input | None = ..., names_filter: NamesFilter = ..., device: torch.device | str | None = ...,
        pos_slice: PosSlice = ..., incl_bwd: bool | Callable[[Tensor], Tensor] = ..., remove_batch_dim: bool = ...,
        return_type: Literal["logits", "loss"] = ..., loss_per_token: bool = ...,
        **forward_kwargs: Any
    ) -> tuple[Tensor, ActivationCache]: ...
    @overload
    def run_with_cache(
        self, input: Input | None = ..., names_filter: NamesFilter = ..., device: torch.device | str | None = ...,
        pos_slice: PosSlice = ..., incl_bwd: bool | Callable[[Tensor], Tensor] = ..., remove_batch_dim: bool = ...,
        *, return_type: Literal["both"], loss_per_token: bool = ...,
        **forward_kwargs: Any
    ) -> tuple[tuple[Tensor, Tensor], ActivationCache]: ...
    @overload
    def run_with_cache(
        self, input: Input | None = ..., names_filter: NamesFilter = ..., device: torch.device | str | None = ...,
        pos_slice: PosSlice = ..., incl_bwd: bool | Callable[[Tensor], Tensor] = ..., remove_batch_dim: bool = ...,
        *, return_type: None, loss_per_token: bool = ...,
        **forward_kwargs: Any
    ) -> tuple[None, ActivationCache]: ...
    # fmt: on
    @eager
    def run_with_cache(
        self,
        input: Input | None = None,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        pos_slice: PosSlice = None,
        incl_bwd: bool | Callable[[Tensor], Float[Tensor, ""]] = False,
        remove_batch_dim: bool = False,
        return_type: ReturnType | None = "logits",
        loss_per_token: bool = False,
        *,
        fwd_hooks: Hooks = (),
        interventions: Sequence[Intervention] = (),
        sources: Mapping[str, Source] | None = None,
        **forward_kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Runs the model and keeps its activations.

        Hooks that are on the bridge stay, fire, and are seen in the cache.

        Args:
            input: As for `forward`.
            names_filter: What to keep: all (None), a name, a list of names, a compiled pattern that is searched for in
                names, or a predicate of names.
            device: Where to keep it; by default where it is. Each value goes there as it appears, beside the
                computation, and is complete when the run returns; the model's device then keeps none. What an
                accelerator sends to the CPU is in pinned memory, up to `clearspan.transfers.PINNED.limit` bytes in all
                caches (4 GiB if it is not set), and beyond in ordinary memory, for which the run waits.
            pos_slice: Positions to keep: one, `(start, stop[, step])`, a list, or a tensor of indices. The axis stays
                for one too, which the cache's own methods leave out.
            incl_bwd: Whether to keep gradients of the loss too, as `<name>_grad`; or a function whose gradients are
                kept instead: from the logits, or the residual stream where the run stops, to one number. No parameter's
                `grad` is touched, and what is returned is detached.
            remove_batch_dim: Whether look-ups leave out the batch axis of one row.
            return_type: As for `forward`.
            loss_per_token: As for `forward`.
            fwd_hooks: As for `run_with_hooks`; the cache shows what the model went on with.
            interventions: As for `forward`; the cache shows what the model went on with.
            sources: As for `forward`.
            **forward_kwargs: Further arguments of `forward`.

        Returns:
            What `forward` returns, and the cache, whose entries are detached.

        Raises:
            UnknownPointError: A name is unknown (one in a list is enough), or a predicate holds for none.
            PointNotReachedError: A name is in a part of the model that is not run.
            CacheTooLargeError: The cache is larger than the memory that is free; nothing was run.
            InvalidArgumentError: With `incl_bwd`, a loss by token or of a run that stops at a layer, a part of the
                positions, or a function that does not give one number with a gradient.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> loss, cache = bridge.run_with_cache("import os", return_type="loss", incl_bwd=True)
            >>> cache["resid_post_grad", 2].shape == cache["resid_post", 2].shape
            True
            >>> _, cache = bridge.run_with_cache("import os", incl_bwd=lambda logits: logits[0, -1, 7])
            >>> list(cache["z_grad", 2].shape) == list(cache["z", 2].shape)
            True
        """
        return runs.run_with_cache(
            self,
            input,
            names_filter,
            device,
            pos_slice,
            incl_bwd,
            remove_batch_dim,
            return_type,
            loss_per_token,
            fwd_hooks=fwd_hooks,
            interventions=interventions,
            sources=sources,
            **forward_kwargs,
        )

    def plan_cache(
        self,
        input_shape: Sequence[int],
        names_filter: NamesFilter = None,
        *,
        pos_slice: PosSlice = None,
        device: torch.device | str | None = None,
    ) -> CachePlan:
        """Returns what a cache will keep, in bytes and name by name; the model is not run.

        The model's own forward is gone through with shapes alone, as on unpadded rows, with its own dtypes (no
        autocast), and without hooks and gradients. `plan.total_bytes` is then the `nbytes` of the cache.

        Args:
            input_shape: Rows and positions, as `tokens.shape`.
            names_filter: As for `run_with_cache`.
            pos_slice: As for `run_with_cache`.
            device: As for `run_with_cache`.

        Raises:
            InputError: More positions than the context has.
            InvalidArgumentError: No such shape, or no such positions.
            UnknownPointError: A name is unknown, or a predicate holds for none.
            UnplannableError: The model's forward asks for numbers, or runs a kernel that knows no shapes.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> bridge.plan_cache((4, 128), ["blocks.0.attn.hook_q", "blocks.0.attn.hook_v", "hook_logits"])
            CachePlan: 3 entries, 8.6 MiB kept; batch 4, pos 128
            name                    layers  axes                                      kept
            blocks.{l}.attn.hook_q  0       [batch 4, pos 128, head 8, d_head 32]     640.0 KiB
            blocks.{l}.attn.hook_v  0       [batch 4, pos 128, kv_head 1, d_head 32]  shared
            hook_logits                     [batch 4, pos 128, d_vocab 4096]          8.0 MiB
        """
        return caching.plan_cache(self, input_shape, names_filter, pos_slice, device)

    # --- generation --------------------------------------------------------------------------------------------------

    # fmt: off
    @overload
    def generate(
        self, input: Input | None = ..., max_new_tokens: int | None = ..., *, prepend_bos: bool | None = ...,
        padding_side: PaddingSide | None = ..., attention_mask: Tensor | None = ...,
        inputs_embeds: Tensor | None = ..., fwd_hooks: Hooks = ...,
        interventions: Sequence[Intervention] = ..., sources: Mapping[str, Source] | None = ...,
        return_cache: Literal[False] = ..., **generate_kwargs: Any) -> Any: ...
    @overload
    def generate(
        self, input: Input | None = ..., max_new_tokens: int | None = ..., *, prepend_bos: bool | None = ...,
        padding_side: PaddingSide | None = ..., attention_mask: Tensor | None = ...,
        inputs_embeds: Tensor | None = ..., fwd_hooks: Hooks = ...,
        interventions: Sequence[Intervention] = ..., sources: Mapping[str, Source] | None = ...,
        return_cache: Literal[True], names_filter: NamesFilter = ..., **generate_kwargs: Any
    ) -> tuple[Any, ActivationCache]: ...
    # fmt: on
    @eager
    def generate(
        self,
        input: Input | None = None,
        max_new_tokens: int | None = None,
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        fwd_hooks: Hooks = (),
        interventions: Sequence[Intervention] = (),
        sources: Mapping[str, Source] | None = None,
        return_cache: bool = False,
        names_filter: NamesFilter = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Continues text or tokens by Hugging Face's own `generate`; hooks fire at each step.

        The cache is made in the same pass. It is that of one forward over the whole sequence but its last token, which
        was chosen but never went into the model. Where hooks wrote, it shows what each step went on with. Generation
        computes the logits of the prompt's last position alone, unless the cache is to have logits.

        Args:
            input: Text, a list of texts, token ids `[batch, pos]`, and all else that `to_batch` takes; or embeddings.
                Chat messages are answered, and a last message of the assistant's is continued; for another ending give
                `to_batch(messages, ...)`.
            max_new_tokens: How many tokens at most; by default what the model's generation config says, or 20.
            prepend_bos: As for `forward`.
            padding_side: Where shorter texts are filled; by default on the left.
            attention_mask: `[batch, pos]` of a token tensor with padding.
            fwd_hooks: As for `run_with_hooks`, for this generation alone. A function is called once a forward: with all
                positions of the prompt, then with one position at a time; `hook.position` is the first one's index in
                the sequence, and `hook.step` counts the forwards.
            inputs_embeds: Embeddings, in place of an input; only the new tokens are returned then.
            interventions: As for `forward`, for this generation. Positions are those of the whole sequence, each
                written in the step that makes it; negative ones count from the prompt's last token, and
                `every_step=True` writes each new token too.
            sources: As for `forward`.
            return_cache: Whether to return the activations too.
            names_filter: With `return_cache=True`, what to keep: as for `run_with_cache`.
            **generate_kwargs: For `hf_model.generate`: `do_sample`, `temperature`, `num_beams`, ... Its `stop_strings`
                are looked for with the bridge's tokenizer; `stopping_criteria` may be one or a list. Besides, keywords
                that TransformerLens has: `return_type` (`"str"`, `"tokens"`, or `"input"` for what the input was),
                `stop_at_eos`, `use_past_kv_cache`, `freq_penalty` (when sampling, what a token's logit loses for each
                time that the sequence has it), and `verbose`, which does nothing. Defaults are Hugging Face's.

        Returns:
            The whole text (a list for a list, or for several sequences), or the whole token tensor; with
            `return_dict_in_generate=True`, Hugging Face's output object. With `return_cache=True`, that and the cache,
            which has as many positions as the sequence has tokens, less one.

        Raises:
            UnknownPointError: A name is unknown, or a predicate holds for none; nothing was run.
            PointNotReachedError: A hook did not fire.
            HookValueError, HookTypeError: A function returned a value of the wrong shape, dtype or device.
            UnknownArgumentError: A keyword that nothing takes.
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
        keywords = {**generate_kwargs, "max_new_tokens": max_new_tokens}
        prompt = generation.prepare(self, input, prepend_bos, padding_side, attention_mask, inputs_embeds, keywords)
        own = edits(self, fwd_hooks, interventions, sources, prompt.batch, is_generating=True)
        check_flags(return_cache=return_cache)
        if return_cache:
            return generation.generate_with_cache(self, prompt, own, names_filter)
        generation.check_no_filter(names_filter)
        return generation.generate(self, prompt, own)

    @eager
    def generate_stream(
        self,
        input: Input | None = None,
        max_new_tokens: int | None = None,
        *,
        max_tokens_per_yield: int = 1,
        fwd_hooks: Hooks = (),
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        interventions: Sequence[Intervention] = (),
        sources: Mapping[str, Source] | None = None,
        **generate_kwargs: Any,
    ) -> Generator[Any, None, None]:
        """Yields new tokens as `generate` makes them.

        Generation waits while the caller does something else, and its hooks are off then: the bridge may be used
        between two items, also for another stream. The torch modes (`inference_mode`, `autocast`) are those under which
        the stream was made. A stream that is closed, or dropped, ends the generation.

        Args:
            input: As for `generate`.
            max_new_tokens: As for `generate`.
            max_tokens_per_yield: New tokens of each row in an item; the last one may have fewer.
            fwd_hooks: As for `generate`.
            interventions: As for `generate`.
            sources: As for `generate`.
            prepend_bos: As for `generate`.
            padding_side: As for `generate`.
            attention_mask: As for `generate`.
            inputs_embeds: As for `generate`.
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
        keywords = {**generate_kwargs, "max_new_tokens": max_new_tokens}
        prompt = generation.prepare(self, input, prepend_bos, padding_side, attention_mask, inputs_embeds, keywords)
        own = edits(self, fwd_hooks, interventions, sources, prompt.batch, is_generating=True)
        return generation.stream(self, prompt, max_tokens_per_yield, own)

    # --- the model as a whole ----------------------------------------------------------------------------------------

    @eager
    def verify(
        self, level: Level = "quick", tokens: Tensor | None = None, *, progress: bool | Progress = True
    ) -> Verification:
        """Checks this very model: that its points show what they promise, and that writes do. Returns the findings.

        Every parameter must be in a component; logits are compared with the unbridged model's; every point is read; the
        identities between points and weights are computed; queries and keys are followed into their product; points are
        written and their effect is followed; padded rows are compared with rows alone, a generation with one forward,
        gradients with small writes, and each step of `processed()` with the model. What fails is tried on a copy in
        better precision, so that rounding is not taken for a fault. What is wrong is in the findings, never raised.

        Args:
            level: `"quick"` writes in one layer of each kind; `"full"` in every layer, returned and in place.
            tokens: Token ids `[batch, pos]`, at least two rows of four; by default random ones, longer than the
                config's windows where these are short.
            progress: Whether a bar is shown, or a function called as `progress(stage, done, total)` after each check.

        Raises:
            NotFiniteError: The model's own logits are not finite.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> found = bridge.verify()
            >>> found.passed, found.forwards <= 40
            (True, True)
        """
        return verify(self, level, tokens, progress)

    def processed(
        self,
        fold_ln: bool | None = True,
        center_writing_weights: bool | None = None,
        center_unembed: bool | None = None,
        fold_value_biases: bool | None = True,
        refactor_factored_attn_matrices: bool | None = False,
    ) -> Self:
        """Returns a new bridge whose weights are easier to read, and whose log-probabilities are the same.

        This bridge and its model stay as they are. The new model shares every tensor that does not change. Each step is
        True (do it, or raise where it is not exact), None (do it where it is exact) or False; `processing` of the new
        bridge says what was done.

        Args:
            fold_ln: Norms' weights and biases go into the linear maps that read them. Maps that read a layer norm lose
                their mean over `d_model`, since its output has none. A map that had no bias gets one where there is
                something to put in; Hugging Face's files of that architecture have no place for it.
            center_writing_weights: What is written to the residual stream has mean zero over `d_model`. Exact where all
                that reads the stream is a layer norm.
            center_unembed: Logits have mean zero over the vocabulary. They change, probabilities do not. Exact where no
                cap comes after.
            fold_value_biases: What value biases add goes into the output bias. Exact where patterns sum to one.
            refactor_factored_attn_matrices: Queries and keys, and values and outputs, in the basis of their singular
                vectors; heads that share keys or values have one basis. For queries and keys exact where they are
                neither rotated nor normed. `hook_q`, `hook_k`, `hook_v` and `hook_z` are then other numbers.

        Raises:
            InexactProcessingError: A step asked for (True) would change what the model computes.
            UnreadableWeightError: The model is quantised or offloaded.

        Example:
            >>> import clearspan
            >>> processed = clearspan.boot("tiny-bigcode").processed()
            >>> for step in processed.processing:
            ...     print(step)
            fold_ln: 11 norms folded
            center_writing_weights: 12 weights centred
            center_unembed: the unembedding is centred
            fold_value_biases: value biases of 5 layers folded
        """
        return processed(
            self,
            {
                "fold_ln": fold_ln,
                "center_writing_weights": center_writing_weights,
                "center_unembed": center_unembed,
                "fold_value_biases": fold_value_biases,
                "refactor_factored_attn_matrices": refactor_factored_attn_matrices,
            },
        )

    def orthogonalized(
        self,
        directions: Float[Tensor, "d_model"] | Float[Tensor, "direction d_model"],
        *,
        parts: Sequence[Part] | Part | None = None,
        layers: int | Sequence[int] | None = None,
        rescale: bool = False,
    ) -> Self:
        """Returns a new bridge whose weights write nothing along some directions of the residual stream.

        With `P` the projection onto what is orthogonal to the directions, each weight and bias that writes to the
        stream becomes `P W`: embeddings of tokens, positions and types, the output maps of attention, mixers, MLPs and
        experts. At every layer the stream has then no component along the directions, to the rounding of the weights'
        dtype, and logits are those of a run in which `ProjectOut` ablates everything that is added. What the model
        multiplies outputs by is accounted for. This bridge and its model stay as they are; the new model shares every
        tensor that does not change. An embedding that is tied to the unembedding is untied, and the unembedding kept.
        `processing` of the new bridge says what was done, and `hf_model.save_pretrained` saves it.

        Args:
            directions: One, or several, which need be neither orthogonal nor of length 1.
            parts: What loses them: `"embed"`, `"attn"`, `"mixer"`, `"mlp"`; by default all, or with `layers` all but
                embeddings. What is left out, and goes through no part that is changed, still writes along them.
            layers: Layers whose sublayers lose them, negative from the end; by default all.
            rescale: Where a norm comes after a sublayer or the embedding (Gemma 2, BLOOM), no weights give its output
                without the directions at the length that it had. True lets the weights before the norm lose what it
                maps onto the directions: its output then has no component there, and what is left is normed anew, so
                that it is longer than after `ProjectOut`. False raises.

        Raises:
            InexactProcessingError: A chosen part adds something that its weights cannot be without: a norm comes after
                (and not `rescale`), norms lie on the stream itself, positions are computed, the part is opaque.
            InvalidArgumentError: A direction of another width or without length, an unknown part, or no such layer.
            UnreadableWeightError: The model is quantised or offloaded.

        Example:
            >>> import clearspan, torch
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> direction = bridge.W_U[:, 7] - bridge.W_U[:, 8]
            >>> ablated = bridge.orthogonalized(direction)
            >>> print(*ablated.processing)
            orthogonalize: 1 direction taken out of what 12 parts write
            >>> _, cache = ablated.run_with_cache("import os")
            >>> all((cache["resid_post", layer] @ direction).abs().max() < 1e-3 for layer in range(5))
            True

        References:
            Arditi et al. (2024), "Refusal in Language Models Is Mediated by a Single Direction", arXiv:2406.11717,
            section 4.1 and appendix E.
        """
        return orthogonalized(self, directions, parts, layers, rescale=rescale)


def boot(
    model: "str | Path | PreTrainedModel",
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
    adapter: AdapterSource | None = None,
    partial: bool = False,
    **from_pretrained_kwargs: Any,
) -> TransformerBridge:
    """Returns a bridge to a model.

    A model loaded here is in eval mode; one handed over stays in the mode, dtype and attention implementation it has.

    Args:
        model: A hub id, a checkpoint's folder, an adapter's folder as peft saves it, `"tiny-bigcode"` (the embedded
            model), a loaded `PreTrainedModel`, or a `PeftModel`, whose base model is then `bridge.hf_model`.
        tokenizer: For a loaded model, or instead of the checkpoint's own. Without any, or where the checkpoint's cannot
            turn text into the model's ids, the bridge takes token ids only, and text raises `NoTokenizerError`.
        dtype: Of the weights; `"auto"` is the checkpoint's own.
        device: Where to move the model; by default it stays where it is.
        adapter: The adapter of this model alone, such as a subclass of `clearspan.architectures.ArchitectureAdapter`;
            by default the one that is registered for the model's class. Where none is, the model's structure is derived
            from a traced forward, and checked.
        partial: Whether a structure of which only a part was found, or holds, is enough: the rest is absent, with the
            reason, and blocks whose inside is not known have their residual stream alone.
        **from_pretrained_kwargs: For `AutoModelForCausalLM.from_pretrained`. `trust_remote_code` is False by default:
            the code of a checkpoint runs only where you say so.

    Raises:
        UnsupportedArchitectureError: The architecture has no adapter, and its structure was not found.
        AdapterError: Its adapter does not fit the model.
        AdapterWarning: A warning: parts of the model are in no component, or have other sizes than the adapter says.
        CheckpointNotFoundError: The name is no checkpoint.
        CheckpointError: Its weights are missing, damaged, or of other sizes than its config says.
        InvalidArgumentError: It is no model, or has an adapter that changes the forward, such as a learned prompt.
        CompiledModelError: The model is the result of `torch.compile`.
        InvalidArgumentError: The tokenizer given cannot turn text into the model's ids; or `adapter` is no adapter.
        DerivedWarning: A warning, once for each class of models: its structure was derived.
        PlugInWarning: A warning: an installed package offers an adapter that cannot be loaded.
        TokenizerWarning: A warning: the tokenizer given covers much less than the vocabulary.
        HooksOnModelWarning: A warning: hooks of another bridge act on the model; `clearspan.unhook` takes them off.
        UntestedReleaseWarning: A warning: transformers is newer than what this library is tested with.
        LeftOutWarning: A warning: transformers 5.20 runs this model without the cap on attention's scores.
        UnknownArgumentError: Keywords for loading, for a model that is loaded already.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> bridge.cfg.n_layers, bridge.cfg.n_heads, bridge.cfg.n_key_value_heads
        (5, 8, 1)
    """
    if dtype != "auto":
        dtype = dtype_of(dtype)
    if device is not None:
        device = device_of(device)
    check_tokenizer(tokenizer)
    if adapter is not None:
        check_source(adapter)
    if isinstance(model, str | Path):
        hf_model, own = load_model(model, dtype, adapter, **from_pretrained_kwargs)
    else:
        loaded = check_model(model)
        if from_pretrained_kwargs:
            raise UnknownArgumentError(
                f"unknown keywords {', '.join(from_pretrained_kwargs)}",
                reason="the model is loaded already; keywords for from_pretrained go with a name or a folder",
            )
        hf_model, own = loaded, NO_TOKENIZER
        if dtype != "auto":
            nn.Module.to(hf_model, dtype)
    if device is not None:
        nn.Module.to(hf_model, device)
    warn_of_release()
    warn_of_what_is_left_out(hf_model)
    _warn_of_hooks(hf_model)
    known = adapter or find_adapter(type(hf_model).__name__)
    bridge = _derived(hf_model, partial=partial) if known is None else _bridged(hf_model, known)
    bridge.text.own = own.serving(bridge.embed.n_tokens) if tokenizer is None else handed_over(bridge, tokenizer)
    warn_of_structure(bridge)
    return bridge


_SAID: set[str] = set()
"""Classes of models of which it was said that their structure is derived."""


def _derived(hf_model: "PreTrainedModel", *, partial: bool) -> TransformerBridge:
    """Returns the bridge to a model that no adapter is written for.

    Raises:
        UnsupportedArchitectureError: Its structure was not found, or what was found does not hold.
    """
    bridge = _from_small(hf_model) if is_large(hf_model) else None
    if bridge is None:
        bridge = _from_itself(hf_model, partial=partial)
    _say_derived(bridge)
    return bridge


def _from_small(hf_model: "PreTrainedModel") -> TransformerBridge | None:
    """Returns the bridge to a model whose structure is that of a small model of its class, or None where it is not."""
    structure = derive_from_small(hf_model)
    if structure is None:
        return None
    try:
        bridge = _bridged(hf_model, structure)
        check_derived(bridge)
    except (AdapterError, UnsupportedArchitectureError):
        return None
    return bridge


def _from_itself(hf_model: "PreTrainedModel", *, partial: bool) -> TransformerBridge:
    """Returns the bridge to a model whose structure is derived on the model itself.

    Raises:
        UnsupportedArchitectureError: Its structure was not found, or what was found does not hold.
    """
    structure = derive(hf_model, partial=partial)
    bridge = _bridged(hf_model, structure)
    while partial and (wrong := not_holding(bridge)).points | wrong.layers:
        structure = structure.without(wrong.points, wrong.layers)
        bridge = _bridged(hf_model, structure)
    if not partial:
        check_derived(bridge)
    return bridge


def _say_derived(bridge: TransformerBridge) -> None:
    """Warns, once for each class of models, that an adapter was derived, and of what it does not show the inside."""
    structure = bridge.adapter.source
    assert isinstance(structure, Structure), "it was derived"
    architecture = structure.architecture
    if architecture in _SAID:
        return
    _SAID.add(architecture)
    hidden = "; ".join(map(str, structure.unshown()))
    is_checked = not any(one.is_meta for one in bridge.hf_model.parameters())
    held = "the identities between its points hold" if is_checked else "nothing was checked, since it has no weights"
    warnings.warn(
        f"no adapter is written for {architecture}: its structure was derived from a traced forward, and "
        f"{held}. bridge.adapter.source.report() says what was found and how; "
        "bridge.verify() checks the rest" + (f". Not shown: {hidden}" if hidden else ""),
        DerivedWarning,
        stacklevel=4,
    )


def _bridged(hf_model: "PreTrainedModel", source: AdapterSource) -> TransformerBridge:
    """Returns the bridge to a model, without a tokenizer.

    Raises:
        AdapterError: Its adapter does not fit it.
    """
    try:
        return TransformerBridge(hf_model, source(bridge_config(hf_model, source)))
    except ClearspanError:
        raise
    except FAULTS as error:
        raise AdapterError(
            f"{name_of(source)} does not fit {type(hf_model).__name__}",
            reason=f"{type(error).__name__}: {error}",
            fix="the adapter: CONTRIBUTING.md shows what it says",
        ) from error


def unhook(model: "PreTrainedModel | TransformerBridge") -> None:
    """Takes all hooks off a model that bridges have put on it, permanent ones included, whichever bridge they are of.

    Hooks of a `with bridge.hooks()` that is open in another thread or task stay, and so do torch hooks of your own.

    Args:
        model: The Hugging Face model, or a bridge to it.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> bridge.add_hook("blocks.0.hook_resid_post", lambda value, hook: value * 0)
        >>> clearspan.unhook(bridge.hf_model)
        >>> bridge.hook_dict["blocks.0.hook_resid_post"].is_listening
        False
    """
    hf_model = model.hf_model if isinstance(model, TransformerBridge) else model
    reset(check_model(hf_model))


def _warn_of_hooks(model: "PreTrainedModel") -> None:
    names = heard(model)
    if names:
        where = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        text = f"hooks of another bridge are on this model, at {where}; clearspan.unhook(model) takes them off"
        warnings.warn(text, HooksOnModelWarning, stacklevel=3)


TransformerBridge.__module__ = ActivationCache.__module__ = "clearspan"
