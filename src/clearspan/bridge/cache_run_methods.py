"""The bridge's methods that keep activations, or plan it; the work is in `caching.py`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.bridge import caching
from clearspan.bridge.cache import ActivationCache
from clearspan.bridge.cache_plan import CachePlan
from clearspan.bridge.forward import ReturnType
from clearspan.bridge.inputs import Input
from clearspan.bridge.positions import PosSlice
from clearspan.points import NamesFilter

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge


class CacheRunMethods:
    """Names what caching does."""

    def run_with_cache(
        self,
        input: Input,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        pos_slice: PosSlice = None,
        incl_bwd: bool | Callable[[Tensor], Float[Tensor, ""]] = False,
        remove_batch_dim: bool = False,
        return_type: ReturnType | None = "logits",
        loss_per_token: bool = False,
        **forward_kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Runs the model and keeps its activations.

        Hooks that are on the bridge stay, fire, and are seen in the cache.

        Args:
            input: As for `forward`.
            names_filter: What to keep: all (None), a name, a list of names, or a predicate of names.
            device: Where to keep it; by default where it is. Each value goes there as it appears, and the model's
                device keeps none.
            pos_slice: Positions to keep: one, whose axis goes, `(start, stop[, step])`, a list, or a tensor of indices.
            incl_bwd: Whether to keep gradients of the loss too, as `<name>_grad`; or a function whose gradients are
                kept instead: from the logits, or the residual stream where the run stops, to one number. No parameter's
                `grad` is touched, and what is returned is detached.
            remove_batch_dim: Whether look-ups leave out the batch axis of one row.
            return_type: As for `forward`.
            loss_per_token: As for `forward`.
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
        bridge = cast("TransformerBridge", self)
        given, segment = bridge.prepare(input, **forward_kwargs)
        output, cache = caching.run_with_cache(
            bridge,
            given,
            segment,
            return_type,
            loss_per_token,
            names_filter=names_filter,
            device=device,
            pos_slice=pos_slice,
            incl_bwd=incl_bwd,
        )
        return output, cache.remove_batch_dim() if remove_batch_dim else cache

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
        return caching.plan_cache(cast("TransformerBridge", self), input_shape, names_filter, pos_slice, device)
