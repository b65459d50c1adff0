"""The cache's readings: components of the residual stream through a norm, and in logits."""

from typing import Literal, Self, overload

from jaxtyping import Float
from torch import Tensor

from clearspan.bridge import residual_stacks
from clearspan.bridge.cache_lookup import CacheLookup
from clearspan.bridge.logit_readings import TokenReading, Tokens, attributions, laid_out, lens, token_ids
from clearspan.bridge.norm_readings import FrozenNorm, norm_at
from clearspan.bridge.picks import Picks
from clearspan.bridge.positions import BatchSlice, PosSlice
from clearspan.bridge.residual_stacks import depth_of
from clearspan.errors import InvalidArgumentError

Logits = Float[Tensor, "depth *batch_pos d_vocab"]
_STACK = ("the stack", ("component",), ("d_model",))


class ReadingMethods(CacheLookup):
    """Reads components of the residual stream as the model does: by its own norms, unembedding and biases."""

    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "component *batch_pos d_model"],
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: PosSlice = None,
        batch_slice: BatchSlice = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "component *batch_pos d_model"]:
        """Returns components of the residual stream as they are in the output of the norm that reads it at a layer.

        `(component - mean) / scale * weight` (an RMS norm has no mean). Where no norm reads the stream, it is returned.

        Args:
            residual_stack: `[component, batch, pos, d_model]`, with all of the cache's rows and positions, or those
                chosen: it is picked only where it was not.
            layer: Whose norm; by default that before the unembedding.
            mlp_input: Whether it is the norm of the layer's MLP.
            pos_slice: Positions, of the scale and of a stack that still has them all.
            batch_slice: Rows, in the same way.
            has_batch_dim: Whether the stack has a batch axis. Without one it is of the only row, or of that which
                `batch_slice` names.
            recompute_ln: Whether each component is normed by a scale of its own, and not by that of the run.

        Raises:
            InvalidArgumentError: The stack is of another shape, or of one that could be either.
        """
        cache, picks = self._at(pos_slice, batch_slice, has_batch_dim)
        stack, depth = picks.made(residual_stack, *_STACK), depth_of(self, layer)
        norm = norm_at(self.bridge, depth, mlp_input=mlp_input)
        if norm is None:
            return stack
        return FrozenNorm.of(cache, norm, norm.scale(stack) if recompute_ln else None)(stack)

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "component *batch_pos d_model"],
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: PosSlice = None,
        batch_slice: BatchSlice = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "component *batch_pos"]:
        """Returns what each component of the residual stream adds to tokens' logits, `[component, batch, pos]`.

        `component -> (component - mean) / scale * weight @ W_U[:, token]`, with the last norm's scale in this run and
        its own weight, and the model's scale of the logits. Over a full decomposition, its sum plus `logit_constant` is
        the model's logit (or difference of logits) before any cap. No norm need be folded.

        Args:
            residual_stack: As in `apply_ln_to_stack`, before any norm.
            tokens: Text of one token, an id, ids `[batch]`, or ids `[batch, pos]` (`[pos]` where there is no batch
                axis): of all rows and positions, or of those chosen.
            incorrect_tokens: Tokens whose logits are subtracted.
            pos_slice: As in `apply_ln_to_stack`.
            batch_slice: As in `apply_ln_to_stack`.
            has_batch_dim: As in `apply_ln_to_stack`.

        Returns:
            In logits, in float32 at least.

        Raises:
            InvalidArgumentError: No tokens, or not one for each row; a stack as in `apply_ln_to_stack`.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> logits, cache = bridge.run_with_cache("import os")
            >>> parts = cache.get_full_resid_decomposition(expand_neurons=False, pos_slice=-1)
            >>> found = cache.logit_attrs(parts, " os", pos_slice=-1).sum() + cache.logit_constant(" os")
            >>> abs(found - logits[0, -1, bridge.to_single_token(" os")]).item() < 1e-3
            True
        """
        cache, picks = self._at(pos_slice, batch_slice, has_batch_dim)
        direction = TokenReading.of(cache, laid_out(token_ids(self.bridge, tokens), picks)).direction
        if incorrect_tokens is not None:
            others = laid_out(token_ids(self.bridge, incorrect_tokens), picks)
            direction = direction - TokenReading.of(cache, others).direction
        return attributions(cache, picks.made(residual_stack, *_STACK), direction)

    def logit_constant(self, tokens: Tokens, incorrect_tokens: Tokens | None = None) -> Float[Tensor, "*batch_pos"]:
        """Returns what biases of the last norm and the unembedding add to tokens' logits, whatever the input.

        Args:
            tokens: As in `logit_attrs`. The result has their shape; `[batch]` is to be `[:, None]` beside positions.
            incorrect_tokens: Tokens whose logits are subtracted.
        """
        ids = token_ids(self.bridge, tokens)
        if incorrect_tokens is None:
            return TokenReading.of(self, ids).constant
        others = token_ids(self.bridge, incorrect_tokens)
        if {ids.ndim, others.ndim} == {1, 2}:  # [batch] and [batch, pos]
            ids, others = (one[:, None] if one.ndim == 1 else one for one in (ids, others))
        return TokenReading.of(self, ids).constant - TokenReading.of(self, others).constant

    # fmt: off
    @overload
    def logit_lens(
        self, incl_mid: bool = ..., pos_slice: PosSlice = ..., *, return_labels: Literal[True],
    ) -> tuple[Logits, list[str]]: ...
    @overload
    def logit_lens(
        self, incl_mid: bool = ..., pos_slice: PosSlice = ..., return_labels: Literal[False] = ...,
    ) -> Logits: ...
    # fmt: on
    def logit_lens(
        self, incl_mid: bool = False, pos_slice: PosSlice = None, return_labels: bool = False
    ) -> Logits | tuple[Logits, list[str]]:
        """Returns the logits at every depth, as if the model ended there, `[depth, batch, pos, d_vocab]`.

        The model's own final norm, unembedding, and scale or cap; the last row is what it returned. For targets, ranks
        and divergences there is `clearspan.analysis.lenses.lens_readings`.

        Args:
            incl_mid: Whether the stream between the sublayers is read too.
            pos_slice: Positions.
            return_labels: Whether labels come with it.
        """
        cache = self.apply_slice_to_pos_dim(pos_slice)
        stack = residual_stacks.accumulated(cache, depth_of(self, None), incl_mid=incl_mid, mlp_input=False)
        logits = lens(cache, stack.values)
        return (logits, stack.labels) if return_labels else logits

    def _at(self, pos_slice: PosSlice, batch_slice: BatchSlice, has_batch_dim: bool) -> tuple[Self, Picks]:
        """Returns the cache at chosen places, and the same choice for stacks of the cache."""
        whole = self
        if self.has_batch_dim and not has_batch_dim:
            if not isinstance(batch_slice, int) and self.n_rows > 1:
                raise InvalidArgumentError(
                    "a stack without a batch axis is of one row",
                    got=f"has_batch_dim=False, and a cache of {self.n_rows} rows",
                    fix="batch_slice=row",
                )
            whole = self.apply_slice_to_batch_dim(batch_slice if isinstance(batch_slice, int) else 0)
            batch_slice = None
        picks = Picks(whole.sizes, {"batch": batch_slice, "pos": pos_slice})
        return whole.apply_slice_to_batch_dim(batch_slice).apply_slice_to_pos_dim(pos_slice), picks
