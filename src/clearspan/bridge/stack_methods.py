"""The cache's stacks: the residual stream at every depth, and taken apart; the work is in `residual_stacks`."""

from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.bridge import residual_stacks
from clearspan.bridge.cache_lookup import CacheLookup
from clearspan.bridge.norm_readings import through_norm
from clearspan.bridge.positions import PosSlice
from clearspan.bridge.residual_stacks import Mode, Stack, depth_of, residual
from clearspan.bridge.sublayer_parts import NeuronSlice, neuron_results
from clearspan.errors import InvalidArgumentError

Components = Float[Tensor, "component *batch_pos d_model"]
Labelled = tuple[Components, list[str]]


class StackMethods(CacheLookup):
    """Takes the residual stream of a run apart, on the model's raw weights.

    `layer` is the layer whose input is meant; None, -1 and `n_layers` mean the last residual stream. `pos_slice` picks
    positions as in `run_with_cache`. Stacks are `[component, batch, pos, d_model]`, without the axes that the cache or
    a choice of one position leaves out. With `apply_ln`, components are what they are in the output of the norm that
    reads the stream there: centred (layer norm), over the norm's own scale in this run, times its weight. They sum to
    that output, less the norm's bias. With `return_labels`, a name for each component comes with the stack.
    """

    # fmt: off
    @overload
    def accumulated_resid(
        self, layer: int | None = ..., incl_mid: bool = ..., apply_ln: bool = ..., pos_slice: PosSlice = ...,
        mlp_input: bool = ..., *, return_labels: Literal[True]) -> Labelled: ...
    @overload
    def accumulated_resid(
        self, layer: int | None = ..., incl_mid: bool = ..., apply_ln: bool = ..., pos_slice: PosSlice = ...,
        mlp_input: bool = ..., return_labels: Literal[False] = ...) -> Components: ...
    # fmt: on
    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Components | Labelled:
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
        cache, depth = self.apply_slice_to_pos_dim(pos_slice), depth_of(self, layer)
        stack = residual_stacks.accumulated(cache, depth, incl_mid=incl_mid, mlp_input=mlp_input)
        return cache._given(stack, depth, mlp_input, apply_ln, return_labels)

    # fmt: off
    @overload
    def decompose_resid(
        self, layer: int | None = ..., mlp_input: bool = ..., mode: Mode = ..., apply_ln: bool = ...,
        pos_slice: PosSlice = ..., incl_embeds: bool = ..., *, return_labels: Literal[True]) -> Labelled: ...
    @overload
    def decompose_resid(
        self, layer: int | None = ..., mlp_input: bool = ..., mode: Mode = ..., apply_ln: bool = ...,
        pos_slice: PosSlice = ..., incl_embeds: bool = ..., return_labels: Literal[False] = ...) -> Components: ...
    # fmt: on
    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Mode = "all",
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Components | Labelled:
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

        Example:
            >>> import clearspan
            >>> _, cache = clearspan.boot("tiny-bigcode").run_with_cache("import os")
            >>> parts, labels = cache.decompose_resid(layer=1, pos_slice=-1, return_labels=True)
            >>> parts.shape, labels
            (torch.Size([4, 1, 256]), ['embed', 'pos_embed', '0_attn_out', '0_mlp_out'])
        """
        cache, depth = self.apply_slice_to_pos_dim(pos_slice), depth_of(self, layer)
        stack = residual_stacks.decomposed(cache, depth, mode=mode, mlp_input=mlp_input, incl_embeds=incl_embeds)
        return cache._given(stack, depth, mlp_input, apply_ln, return_labels)

    # fmt: off
    @overload
    def stack_head_results(
        self, layer: int | None = ..., *, return_labels: Literal[True], incl_remainder: bool = ...,
        pos_slice: PosSlice = ..., apply_ln: bool = ...) -> Labelled: ...
    @overload
    def stack_head_results(
        self, layer: int | None = ..., return_labels: Literal[False] = ..., incl_remainder: bool = ...,
        pos_slice: PosSlice = ..., apply_ln: bool = ...) -> Components: ...
    # fmt: on
    def stack_head_results(
        self,
        layer: int | None = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: PosSlice = None,
        apply_ln: bool = False,
    ) -> Components | Labelled:
        """Returns what each head before a layer added to the residual stream, `L0H0` first.

        That is `hook_result`, but after a norm on attention's output and the residual multiplier where a block has
        them. Output biases are in no head's.

        Args:
            layer: Before which.
            return_labels: Whether labels come with it.
            incl_remainder: Whether the rest of the stream is a last component.
            pos_slice: Positions.
            apply_ln: Whether they are read through the norm there.

        Raises:
            InvalidArgumentError: As `decompose_resid`.
        """
        cache, depth = self.apply_slice_to_pos_dim(pos_slice), depth_of(self, layer)
        stack = residual_stacks.heads(cache, range(depth))
        if incl_remainder:
            stack = stack.with_remainder(residual(cache, depth))
        return cache._given(stack, depth, False, apply_ln, return_labels)

    # fmt: off
    @overload
    def stack_neuron_results(
        self, layer: int | None = ..., pos_slice: PosSlice = ..., neuron_slice: NeuronSlice = ..., *,
        return_labels: Literal[True], incl_remainder: bool = ..., apply_ln: bool = ...,
        project_output_onto: Tensor | None = ..., mlp_input: bool = ...) -> Labelled: ...
    @overload
    def stack_neuron_results(
        self, layer: int | None = ..., pos_slice: PosSlice = ..., neuron_slice: NeuronSlice = ...,
        return_labels: Literal[False] = ..., incl_remainder: bool = ..., apply_ln: bool = ...,
        project_output_onto: Tensor | None = ..., mlp_input: bool = ...) -> Components: ...
    # fmt: on
    def stack_neuron_results(
        self,
        layer: int | None = None,
        pos_slice: PosSlice = None,
        neuron_slice: NeuronSlice = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Float[Tensor, "d_model *direction"] | None = None,
        mlp_input: bool = False,
    ) -> Components | Labelled:
        """Returns what each MLP neuron before a layer added to the residual stream, `L0N0` first.

        All neurons of all positions are a great deal of memory: pick some, or project them.

        Args:
            layer: Before which.
            pos_slice: Positions.
            neuron_slice: Which neurons of each layer, said as positions are.
            return_labels: Whether labels come with it.
            incl_remainder: Whether the rest of the stream is a last component.
            apply_ln: Whether they are read through the norm there.
            project_output_onto: A direction `[d_model]` or several `[d_model, direction]`: the result is what each adds
                to these, and no `[..., d_model]` is formed. Not with `apply_ln`.
            mlp_input: Whether the stream, and the norm, are those of the layer's MLP.

        Raises:
            MissingWeightError: A layer's MLP is a mixture of experts.
            InvalidArgumentError: As `decompose_resid`.
        """
        cache, depth = self.apply_slice_to_pos_dim(pos_slice), depth_of(self, layer)
        directions = _directions(project_output_onto, apply_ln)
        stack = residual_stacks.neurons(cache, range(depth), neuron_slice, directions)
        if incl_remainder:
            whole = residual(cache, depth, mlp_input=mlp_input)
            stack = stack.with_remainder(whole if directions is None else whole @ directions.to(whole))
        return cache._given(stack, depth, mlp_input, apply_ln, return_labels, project_output_onto)

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: NeuronSlice = None,
        pos_slice: PosSlice = None,
        project_output_onto: Float[Tensor, "d_model *direction"] | None = None,
    ) -> Float[Tensor, "*batch_pos neuron d_model"]:
        """Returns what each neuron of one layer added to the residual stream, `[batch, pos, neuron, d_model]`.

        The arguments are those of `stack_neuron_results`; projected, the last axis is the directions', or gone.
        """
        directions = _directions(project_output_onto, False)
        values, _ = neuron_results(self.apply_slice_to_pos_dim(pos_slice), layer, neuron_slice, directions)
        values = values.movedim(0, -2)
        return values[..., 0] if project_output_onto is not None and project_output_onto.ndim == 1 else values

    # fmt: off
    @overload
    def get_full_resid_decomposition(
        self, layer: int | None = ..., mlp_input: bool = ..., expand_neurons: bool = ..., apply_ln: bool = ...,
        pos_slice: PosSlice = ..., *, return_labels: Literal[True], project_output_onto: Tensor | None = ...
    ) -> Labelled: ...
    @overload
    def get_full_resid_decomposition(
        self, layer: int | None = ..., mlp_input: bool = ..., expand_neurons: bool = ..., apply_ln: bool = ...,
        pos_slice: PosSlice = ..., return_labels: Literal[False] = ..., project_output_onto: Tensor | None = ...
    ) -> Components: ...
    # fmt: on
    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        return_labels: bool = False,
        project_output_onto: Float[Tensor, "d_model *direction"] | None = None,
    ) -> Components | Labelled:
        """Returns heads, neurons, embeddings and biases, which sum to the residual stream before a layer.

        Args:
            layer: Before which.
            mlp_input: Whether the layer's own heads are in it.
            expand_neurons: Whether MLPs are divided into neurons; a mixture of experts is one component all the same.
            apply_ln: Whether they are read through the norm there.
            pos_slice: Positions.
            return_labels: Whether labels come with it.
            project_output_onto: As in `stack_neuron_results`.

        Raises:
            InvalidArgumentError: As `decompose_resid`.
        """
        cache, depth = self.apply_slice_to_pos_dim(pos_slice), depth_of(self, layer)
        directions = _directions(project_output_onto, apply_ln)
        stack = residual_stacks.full(
            cache, depth, mlp_input=mlp_input, expand_neurons=expand_neurons, directions=directions
        )
        return cache._given(stack, depth, mlp_input, apply_ln, return_labels, project_output_onto)

    def stack_activation(
        self, activation_name: str, layer: int | None = None, sublayer_type: str | None = None
    ) -> Float[Tensor, "layer ..."]:
        """Returns an activation of all layers before one, `[layer, ...]`.

        Args:
            activation_name: Its short name, such as `"pattern"`.
            layer: Before which; by default all layers.
            sublayer_type: The part that it is in, where the name is in several: `"ln1"` for `"scale"`.
        """
        layers = range(depth_of(self, layer))
        if sublayer_type is None:
            return torch.stack([self[activation_name, index] for index in layers])
        return torch.stack([self[activation_name, index, sublayer_type] for index in layers])

    def compute_head_results(self) -> None:
        """Has the cache show `hook_result` of every layer of which it has `hook_z`, as TransformerLens's does.

        A run that keeps everything shows it anyway. It is computed when it is looked up, and takes no memory.
        """
        results = [block.attn.hook_result for block in self.bridge.blocks]
        self._points = {**self._points, **{point.name: point for point in results if self._recording.has(point)}}

    def _given(
        self,
        stack: Stack,
        depth: int,
        mlp_input: bool,
        apply_ln: bool,
        return_labels: bool,
        project_output_onto: Tensor | None = None,
    ) -> Components | Labelled:
        """Returns a stack as it was asked for."""
        values = through_norm(self, stack.values, depth, mlp_input=mlp_input) if apply_ln else stack.values
        if project_output_onto is not None and project_output_onto.ndim == 1:
            values = values[..., 0]
        return (values, stack.labels) if return_labels else values


def _directions(project_output_onto: Tensor | None, apply_ln: bool) -> Float[Tensor, "d_model direction"] | None:
    if project_output_onto is None:
        return None
    if apply_ln:
        raise InvalidArgumentError(
            "apply_ln and project_output_onto do not go together",
            reason="the norm comes before what one would project onto",
            fix="cache.logit_attrs(stack, tokens) for logits, which reads through the norm",
        )
    return project_output_onto[:, None] if project_output_onto.ndim == 1 else project_output_onto
