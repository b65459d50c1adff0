"""The cache's tools for the residual stream: named and documented here, done in the modules on stacks and norms."""

from typing import TYPE_CHECKING, Literal, cast, overload

import torch
from torch import Tensor

from clearspan.bridge import norm_readings, residual_stacks
from clearspan.bridge.norm_readings import BatchSlice, Tokens, through_norm
from clearspan.bridge.positions import PosSlice, at_positions
from clearspan.bridge.residual_stacks import Mode, NeuronSlice, Stack, depth_of
from clearspan.errors import InvalidArgumentError

if TYPE_CHECKING:
    from clearspan.bridge.cache import ActivationCache

Labelled = tuple[Tensor, list[str]]


class CacheMethods:
    """What takes the residual stream of a run apart, and reads its parts in logits, exactly on raw weights.

    `layer` is the layer whose input is meant; None, -1 and `n_layers` mean the last residual stream. `pos_slice` picks
    positions as in `run_with_cache`. Stacks are `[component, batch, pos, d_model]`, without the axes that the cache or
    a choice of one position leaves out. With `apply_ln` components are what they are in the output of the norm that
    reads the stream there: centred (layer norm), over the norm's own scale in this run, times its weight. They sum to
    that output, less the norm's bias.
    """

    @overload
    def accumulated_resid(
        self,
        layer: int | None = ...,
        incl_mid: bool = ...,
        apply_ln: bool = ...,
        pos_slice: PosSlice = ...,
        mlp_input: bool = ...,
        *,
        return_labels: Literal[True],
    ) -> Labelled: ...
    @overload
    def accumulated_resid(
        self,
        layer: int | None = ...,
        incl_mid: bool = ...,
        apply_ln: bool = ...,
        pos_slice: PosSlice = ...,
        mlp_input: bool = ...,
        return_labels: Literal[False] = ...,
    ) -> Tensor: ...
    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Tensor | Labelled:
        """Returns the residual stream at every depth up to a layer.

        Args:
            layer: Up to whose input.
            incl_mid: Whether the stream between the sublayers is in it, where there is one.
            apply_ln: Whether each is read through the norm at `layer`, with that norm's scale in this run.
                `logit_lens` gives each a scale of its own.
            pos_slice: Positions.
            mlp_input: Whether the stack ends at the input of the layer's MLP.
            return_labels: Whether labels come with it.
        """
        cache, depth = _known(self), depth_of(_known(self), layer)
        stack = residual_stacks.accumulated(cache, depth, incl_mid=incl_mid, mlp_input=mlp_input, pos_slice=pos_slice)
        return self._given(stack, depth, apply_ln, pos_slice, return_labels, mlp_input)

    @overload
    def decompose_resid(
        self,
        layer: int | None = ...,
        mlp_input: bool = ...,
        mode: Mode = ...,
        apply_ln: bool = ...,
        pos_slice: PosSlice = ...,
        incl_embeds: bool = ...,
        *,
        return_labels: Literal[True],
    ) -> Labelled: ...
    @overload
    def decompose_resid(
        self,
        layer: int | None = ...,
        mlp_input: bool = ...,
        mode: Mode = ...,
        apply_ln: bool = ...,
        pos_slice: PosSlice = ...,
        incl_embeds: bool = ...,
        return_labels: Literal[False] = ...,
    ) -> Tensor: ...
    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Mode = "all",
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Tensor | Labelled:
        """Returns what embeddings, attentions and MLPs added to the residual stream before a layer.

        With mode `"all"` and embeddings they sum to the stream.

        Args:
            layer: Before which.
            mlp_input: Whether the layer's attention is in it.
            mode: `"all"`, `"attn"` or `"mlp"`: which sublayers.
            apply_ln: Whether they are read through the norm there.
            pos_slice: Positions.
            incl_embeds: Whether embeddings are in it.
            return_labels: Whether labels come with it.

        Raises:
            InvalidArgumentError: The stream of this architecture is no sum of what was added to it.
        """
        cache, depth = _known(self), depth_of(_known(self), layer)
        stack = residual_stacks.decomposed(
            cache, depth, mode=mode, mlp_input=mlp_input, incl_embeds=incl_embeds, pos_slice=pos_slice
        )
        return self._given(stack, depth, apply_ln, pos_slice, return_labels, mlp_input)

    @overload
    def stack_head_results(
        self,
        layer: int | None = ...,
        *,
        return_labels: Literal[True],
        incl_remainder: bool = ...,
        pos_slice: PosSlice = ...,
        apply_ln: bool = ...,
    ) -> Labelled: ...
    @overload
    def stack_head_results(
        self,
        layer: int | None = ...,
        return_labels: Literal[False] = ...,
        incl_remainder: bool = ...,
        pos_slice: PosSlice = ...,
        apply_ln: bool = ...,
    ) -> Tensor: ...
    def stack_head_results(
        self,
        layer: int | None = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: PosSlice = None,
        apply_ln: bool = False,
    ) -> Tensor | Labelled:
        """Returns what each head before a layer added to the residual stream, `L0H0` first.

        That is `hook_result`, but after a norm on attention's output and the residual multiplier where a block has
        them. Output biases are in no head's.

        Args:
            layer: Before which.
            return_labels: Whether labels come with it.
            incl_remainder: Whether the rest of the stream is a last component.
            pos_slice: Positions.
            apply_ln: Whether they are read through the norm there.
        """
        cache, depth = _known(self), depth_of(_known(self), layer)
        stack = residual_stacks.heads(cache, depth, pos_slice=pos_slice)
        if incl_remainder:
            stack = self._with_remainder(stack, depth, False, pos_slice)
        return self._given(stack, depth, apply_ln, pos_slice, return_labels, False)

    @overload
    def stack_neuron_results(
        self,
        layer: int | None = ...,
        pos_slice: PosSlice = ...,
        neuron_slice: NeuronSlice = ...,
        *,
        return_labels: Literal[True],
        incl_remainder: bool = ...,
        apply_ln: bool = ...,
        project_output_onto: Tensor | None = ...,
    ) -> Labelled: ...
    @overload
    def stack_neuron_results(
        self,
        layer: int | None = ...,
        pos_slice: PosSlice = ...,
        neuron_slice: NeuronSlice = ...,
        return_labels: Literal[False] = ...,
        incl_remainder: bool = ...,
        apply_ln: bool = ...,
        project_output_onto: Tensor | None = ...,
    ) -> Tensor: ...
    def stack_neuron_results(
        self,
        layer: int | None = None,
        pos_slice: PosSlice = None,
        neuron_slice: NeuronSlice = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Tensor | Labelled:
        """Returns what each MLP neuron before a layer added to the residual stream, `L0N0` first.

        All neurons of all positions are a great deal of memory: pick some, or project them.

        Args:
            layer: Before which.
            pos_slice: Positions.
            neuron_slice: Which neurons of each layer.
            return_labels: Whether labels come with it.
            incl_remainder: Whether the rest of the stream is a last component.
            apply_ln: Whether they are read through the norm there.
            project_output_onto: A direction `[d_model]` or several `[d_model, direction]`: the result is what each adds
                to these, and no `[..., d_model]` is formed. Not with `apply_ln`.

        Raises:
            MissingWeightError: A layer's MLP is a mixture of experts.
        """
        cache, depth = _known(self), depth_of(_known(self), layer)
        _check_projection(apply_ln, project_output_onto)
        stack = residual_stacks.neurons(
            cache,
            depth,
            neuron_slice=neuron_slice,
            pos_slice=pos_slice,
            project_output_onto=project_output_onto,
        )
        if incl_remainder:
            stack = self._with_remainder(stack, depth, False, pos_slice, project_output_onto)
        return self._given(stack, depth, apply_ln, pos_slice, return_labels, False)

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: NeuronSlice = None,
        pos_slice: PosSlice = None,
        project_output_onto: Tensor | None = None,
    ) -> Tensor:
        """Returns what each neuron of one layer added to the residual stream, `[batch, pos, neuron, d_model]`.

        The arguments are those of `stack_neuron_results`; projected, the last axis is the directions', or gone.
        """
        values, _ = residual_stacks.neuron_results(_known(self), layer, neuron_slice, pos_slice, project_output_onto)
        has_last = project_output_onto is None or project_output_onto.ndim > 1
        return values.movedim(0, -2 if has_last else -1)

    @overload
    def get_full_resid_decomposition(
        self,
        layer: int | None = ...,
        mlp_input: bool = ...,
        expand_neurons: bool = ...,
        apply_ln: bool = ...,
        pos_slice: PosSlice = ...,
        *,
        return_labels: Literal[True],
        project_output_onto: Tensor | None = ...,
    ) -> Labelled: ...
    @overload
    def get_full_resid_decomposition(
        self,
        layer: int | None = ...,
        mlp_input: bool = ...,
        expand_neurons: bool = ...,
        apply_ln: bool = ...,
        pos_slice: PosSlice = ...,
        return_labels: Literal[False] = ...,
        project_output_onto: Tensor | None = ...,
    ) -> Tensor: ...
    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Tensor | Labelled:
        """Returns heads, neurons, embeddings and biases, which sum to the residual stream before a layer.

        Args:
            layer: Before which.
            mlp_input: Whether the layer's own heads are in it.
            expand_neurons: Whether MLPs are divided into neurons; a mixture of experts is one component all the same.
            apply_ln: Whether they are read through the norm there.
            pos_slice: Positions.
            return_labels: Whether labels come with it.
            project_output_onto: As in `stack_neuron_results`.
        """
        cache, depth = _known(self), depth_of(_known(self), layer)
        _check_projection(apply_ln, project_output_onto)
        stack = residual_stacks.full(
            cache,
            depth,
            mlp_input=mlp_input,
            expand_neurons=expand_neurons,
            pos_slice=pos_slice,
            project_output_onto=project_output_onto,
        )
        return self._given(stack, depth, apply_ln, pos_slice, return_labels, mlp_input)

    def stack_activation(
        self, activation_name: str, layer: int | None = None, sublayer_type: str | None = None
    ) -> Tensor:
        """Returns an activation of all layers before one, `[layer, ...]`.

        Args:
            activation_name: Its short name, such as `"pattern"`.
            layer: Before which; by default all layers.
            sublayer_type: The part that it is in, where the name is in several: `"ln1"` for `"scale"`.
        """
        cache, depth = _known(self), depth_of(_known(self), layer)
        if sublayer_type is None:
            return torch.stack([cache[activation_name, index] for index in range(depth)])
        return torch.stack([cache[activation_name, index, sublayer_type] for index in range(depth)])

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: PosSlice = None,
        batch_slice: BatchSlice = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """Returns components of the residual stream as they are in the output of the norm that reads it at a layer.

        `(component - mean) / scale * weight` (an RMS norm has no mean). Where no norm reads the stream, it is returned.

        Args:
            residual_stack: `[component, batch, pos, d_model]`, with all of the cache's rows and positions, or those
                chosen: it is picked only where it was not.
            layer: Whose norm; by default that before the unembedding.
            mlp_input: Whether it is the norm of the layer's MLP.
            pos_slice: Positions, of the scale and of a stack that still has them all.
            batch_slice: Rows, in the same way.
            has_batch_dim: Whether the stack has a batch axis.
            recompute_ln: Whether each component is normed by a scale of its own, and not by that of the run.

        Raises:
            InvalidArgumentError: The stack is of another shape, or of one that could be either.
        """
        cache = _known(self)
        return through_norm(
            cache,
            residual_stack,
            depth_of(cache, layer),
            mlp_input=mlp_input,
            pos_slice=pos_slice,
            batch_slice=batch_slice,
            has_batch_dim=has_batch_dim,
            recompute_ln=recompute_ln,
        )

    def logit_attrs(
        self,
        residual_stack: Tensor,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: PosSlice = None,
        batch_slice: BatchSlice = None,
        has_batch_dim: bool = True,
    ) -> Tensor:
        """Returns what each component of the residual stream adds to tokens' logits, `[component, batch, pos]`.

        Over a full decomposition, its sum plus `logit_constant` is the model's logit (or difference of logits) before
        any cap. The norm's own weight is used, so that it need not be folded.

        Args:
            residual_stack: As in `apply_ln_to_stack`, before any norm.
            tokens: A text of one token, an id, ids `[batch]`, or ids `[batch, pos]`.
            incorrect_tokens: Tokens whose logits are subtracted.
            pos_slice: As in `apply_ln_to_stack`.
            batch_slice: As in `apply_ln_to_stack`.
            has_batch_dim: Whether the stack has a batch axis.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> logits, cache = bridge.run_with_cache("import os")
            >>> parts = cache.get_full_resid_decomposition(expand_neurons=False, pos_slice=-1)
            >>> found = cache.logit_attrs(parts, " os", pos_slice=-1).sum() + cache.logit_constant(" os")
            >>> abs(float(found - logits[0, -1, bridge.to_single_token(" os")])) < 1e-3
            True
        """
        return norm_readings.logit_attributions(
            _known(self),
            residual_stack,
            tokens,
            incorrect_tokens,
            pos_slice=pos_slice,
            batch_slice=batch_slice,
            has_batch_dim=has_batch_dim,
        )

    def logit_constant(self, tokens: Tokens, incorrect_tokens: Tokens | None = None) -> Tensor:
        """Returns what biases of the last norm and the unembedding add to tokens' logits, whatever the input.

        Args:
            tokens: As in `logit_attrs`; the result has their shape.
            incorrect_tokens: Tokens whose logits are subtracted.
        """
        found = norm_readings.constant(_known(self), tokens)
        return found if incorrect_tokens is None else found - norm_readings.constant(_known(self), incorrect_tokens)

    @overload
    def logit_lens(
        self, incl_mid: bool = ..., pos_slice: PosSlice = ..., *, return_labels: Literal[True]
    ) -> Labelled: ...
    @overload
    def logit_lens(
        self, incl_mid: bool = ..., pos_slice: PosSlice = ..., return_labels: Literal[False] = ...
    ) -> Tensor: ...
    def logit_lens(
        self, incl_mid: bool = False, pos_slice: PosSlice = None, return_labels: bool = False
    ) -> Tensor | Labelled:
        """Returns the logits at every depth, as if the model ended there, `[depth, batch, pos, d_vocab]`.

        The model's own final norm, unembedding, and scale or cap; the last row is what it returned. For targets, ranks
        and divergences there is `clearspan.analysis.lens_readings`.

        Args:
            incl_mid: Whether the stream between the sublayers is read too.
            pos_slice: Positions.
            return_labels: Whether labels come with it.
        """
        cache = _known(self)
        depth = cache.bridge.cfg.n_layers
        stack = residual_stacks.accumulated(cache, depth, incl_mid=incl_mid, mlp_input=False, pos_slice=pos_slice)
        streams = stack.values if cache.has_batch_dim else stack.values[:, None]
        has_positions = cache.has_positions and not isinstance(pos_slice, int)
        streams = streams if has_positions else streams[:, :, None]
        with torch.set_grad_enabled(cache.is_on_graph):
            logits = torch.stack([cache.bridge.read_out(stream) for stream in streams])
        found = logits.reshape(*stack.values.shape[:-1], -1)
        return (found, stack.labels) if return_labels else found

    def _with_remainder(
        self,
        stack: Stack,
        depth: int,
        mlp_input: bool,
        pos_slice: PosSlice,
        project_output_onto: Tensor | None = None,
    ) -> Stack:
        whole = at_positions(residual_stacks.residual(_known(self), depth, mlp_input=mlp_input), pos_slice)
        whole = whole if project_output_onto is None else whole @ project_output_onto.to(whole)
        rest = whole - stack.values.sum(0)
        return Stack(torch.cat([stack.values, rest[None]]), [*stack.labels, "remainder"])

    def _given(
        self, stack: Stack, depth: int, apply_ln: bool, pos_slice: PosSlice, return_labels: bool, mlp_input: bool
    ) -> Tensor | Labelled:
        values = stack.values
        if apply_ln:
            values = through_norm(
                _known(self),
                values,
                depth,
                mlp_input=mlp_input,
                pos_slice=pos_slice,
                batch_slice=None,
                has_batch_dim=True,
                recompute_ln=False,
                is_picked=True,
            )
        return (values, stack.labels) if return_labels else values


def _known(cache: CacheMethods) -> "ActivationCache":
    return cast("ActivationCache", cache)


def _check_projection(apply_ln: bool, project_output_onto: Tensor | None) -> None:
    if apply_ln and project_output_onto is not None:
        raise InvalidArgumentError(
            "apply_ln and project_output_onto do not go together",
            reason="the norm comes before what one would project onto",
            fix="cache.logit_attrs(stack, tokens) for logits, which reads through the norm",
        )
