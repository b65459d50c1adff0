"""The activation cache: the values of one run under every name in canonical axes, and what one does with them.

Each method names and documents, and calls one function of `_cache`. The file is long by its documentation and by the
overloads that give labels their type.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan._cache import file as cache_file
from clearspan._cache import stacks
from clearspan._cache.file import StoredCache
from clearspan._cache.lookup import CacheLookup, places_left
from clearspan._cache.memory import bytes_as_text
from clearspan._cache.readings import (
    Tokens,
    attributions,
    before_norm,
    frozen,
    laid_out,
    lens,
    normed,
    over_scale,
    reading_of,
    through_norm,
    token_ids,
)
from clearspan._cache.run_weights import RunWeights
from clearspan._cache.slices import BatchSlice, Picks, PosSlice, plain
from clearspan._cache.stacks import Mode, NeuronSlice, Stack, block_at, depth_of, neuron_results, residual
from clearspan._cache.writes import by_head
from clearspan._forward.readout import norm_at
from clearspan.checks import check_flags, check_kind, device_of
from clearspan.errors import InvalidArgumentError, NotPicklableError
from clearspan.hf.recording import Recording
from clearspan.hf.storages import Relocation, storages
from clearspan.model import Model, check_bridge, check_layers
from clearspan.points import Address
from clearspan.results import Shown, Summary, layer_ranges
from clearspan.transfers import Outbound
from clearspan.weights.processing import final_norm

Components = Float[Tensor, "component *batch_pos d_model"]
Labelled = tuple[Components, list[str]]
Logits = Float[Tensor, "depth *batch_pos d_vocab"]


class ActivationCache(Shown, CacheLookup):
    """The activations of one run: a mapping from names to tensors, with tools for the residual stream.

    It keeps the tensors that the forward itself made, by reference, and no others. A look-up converts to canonical axes
    and computes, at that moment, derived values (`hook_scale`, `hook_normalized`, `hook_result`, path inputs) and the
    inside of attention, by the model's own eager function on the run's queries, keys and mask. Entries are detached.
    They share storage with each other where their values do, so clone one before editing it in place: an entry whose
    storage was written since it was kept raises when it is looked up. So does what would be computed with weights that
    were written since the run.

    The tools are exact on the model's own weights: they use the norms' weights, biases and scales, so that nothing has
    to be folded.

    In the stacks, `layer` is the layer whose input is meant; None, -1 and `n_layers` mean the last residual stream.
    `pos_slice` picks positions as in `run_with_cache`. Stacks are `[component, batch, pos, d_model]`, without the axes
    that the cache or a choice of one position leaves out. With `apply_ln`, components are what they are in the output
    of the norm that reads the stream there: centred (layer norm), over the norm's own scale in this run, times its
    weight. They sum to that output, less the norm's bias. With `return_labels`, a name for each component comes with
    the stack.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> _, cache = bridge.run_with_cache("import os", names_filter=lambda name: "hook_resid" in name)
        >>> cache["resid_pre", 3].shape == cache["blocks.3.hook_resid_pre"].shape == cache["resid_pre", -2].shape
        True
        >>> cache
        ActivationCache: 15 entries, 33.0 KiB kept; batch 1, pos 3
        name                        layers  axes
        blocks.{l}.hook_resid_pre   0-4     [batch 1, pos 3, d_model 256]
        blocks.{l}.hook_resid_mid   0-4     [batch 1, pos 3, d_model 256]
        blocks.{l}.hook_resid_post  0-4     [batch 1, pos 3, d_model 256]
    """

    def remove_batch_dim(self) -> Self:
        """Has look-ups leave out the batch axis; returns the cache.

        Raises:
            InvalidArgumentError: The run had more than one row.
        """
        if self.has_batch_dim:
            if self.n_rows != 1:
                raise InvalidArgumentError(
                    "cannot leave out the batch axis", expected="one row", got=f"{self.n_rows} rows"
                )
            self._row_choices = (*self._row_choices, 0)
            self.has_batch_dim = False
        return self

    def to(self, device: torch.device | str) -> Self:
        """Returns a cache of the same on a device; dtypes stay, and what shares storage does so there.

        Scores and patterns that were not looked up yet are computed where the model is when they are, and moved.
        """
        with Outbound() as outbound:
            return self._moved(Relocation(device_of(device), outbound=outbound))

    def _moved(self, there: Relocation) -> Self:
        new = copy.copy(self)
        new._recording = self._recording.moved(there)
        new._gradients = {name: there(gradient) for name, gradient in self._gradients.items()}
        new._given = {name: replace(given, value=there(given.value)) for name, given in self._given.items()}
        return new

    def __copy__(self) -> Self:
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns a cache with tensors of its own, of the same model."""
        self.check_unedited()
        return self._moved(Relocation(None))

    def __reduce__(self) -> Any:
        raise NotPicklableError(
            "a cache cannot be pickled",
            reason="it computes with its model, which would be written with it",
            fix="cache.save(path), and clearspan.ActivationCache.load(path, bridge)",
        )

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Has what this cache computes with the model's weights be on their graph (True), or off it.

        Entries stay detached from the run. torch's own global mode is not touched, and under `torch.no_grad` there is
        no graph.
        """
        check_flags(mode=mode)
        self.is_on_graph = mode

    def save(self, path: str | Path) -> None:
        """Writes the cache to one safetensors file; what shares storage is written once.

        Scores and patterns are not written: the queries and keys that they are computed from are. Those of a
        generation, and under flex attention, are computed and written. Of the model the file has the name, sizes, and
        checksums of the weights that the cache computes with. A cache of some rows or positions is written with all of
        them.

        Raises:
            EditedEntryError: An entry was written since it was kept.
            InvalidArgumentError: The cache is on the meta device, and has no values; or values were put into it.
        """
        self.check_unedited()
        if self._column_of_row is not None:
            raise InvalidArgumentError(
                "a cache of one position of each row cannot be saved", fix="save the whole cache"
            )
        if self._given:
            raise InvalidArgumentError(
                "a cache with values that were put into it cannot be saved",
                got=", ".join(list(self._given)[:3]) + ", ..." * (len(self._given) > 3),
                fix="safetensors.torch.save_file(dict(cache), path), and ActivationCache(values, bridge)",
            )
        rows, positions = self._row_choices, self._pos_choices
        stored = StoredCache(
            list(self._points),
            self._rows,
            places_left(self._rows, rows, "row").tolist() if rows else None,
            places_left(self._n_kept(), positions, "position").tolist() if positions else None,
            self._recording.contents(),
            self._gradients,
            self._run_weights.checksums(),
            self.batch,
        )
        cache_file.write(stored, path, self.model.cfg)

    @classmethod
    def load(cls, path: str | Path, model: Model, device: torch.device | str | None = None) -> Self:
        """Returns the cache of a file that `save` wrote.

        It does all that the saved one did. What is computed with weights that are not those of the cache's run raises.

        Args:
            path: The file.
            model: The model that was run.
            device: Where to put it; by default where the bridge's inputs are.

        Raises:
            InvalidArgumentError: The file is no cache, or one of a model of another architecture or size.
            FileNotFoundError: There is no such file.

        Example:
            >>> import clearspan, tempfile
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> _, cache = bridge.run_with_cache("import os")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     cache.save(f"{folder}/run.safetensors")
            ...     loaded = clearspan.ActivationCache.load(f"{folder}/run.safetensors", bridge)
            >>> torch.equal(loaded["pattern", 2], cache["pattern", 2])
            True
        """
        check_bridge(model)
        stored = cache_file.read(path, model.cfg, model.device if device is None else device_of(device))
        lacking = [name for name in stored.points if name not in model.hook_dict]
        if lacking:
            raise InvalidArgumentError(
                f"{Path(path).name} is of a model with other hook points than the bridge's",
                got=", ".join(lacking[:3]) + ", ..." * (len(lacking) > 3),
                where=model.cfg.architecture,
            )
        cache = cls.of_run(
            model,
            {name: model.hook_dict[name] for name in stored.points},
            Recording.of(stored.contents, stored.rows, model.hf_model),
            batch=stored.batch,
            gradients=stored.gradients,
            run_weights=RunWeights(model, stored.checksums),
        )
        cache = cache.apply_slice_to_batch_dim(stored.rows_shown)
        return cache.apply_slice_to_pos_dim(stored.positions_shown)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept, each storage counted once."""
        given = (one.value for one in self._given.values())
        return sum(storages([*self._recording.tensors(), *self._gradients.values(), *given]).values())

    def _summary(self) -> Summary:
        """Returns a table of its entries; layers that have the same are one row."""
        rows: dict[tuple[str, str], list[int]] = {}
        for name in self:
            address = Address.parse(name)
            shown = ", ".join(
                axis if size is None or axis == "1" else f"{axis} {size}" for axis, size in self.axes_of(name).items()
            )
            at = rows.setdefault((address.template, f"[{shown}]"), [])
            at.extend([] if address.layer is None else [address.layer])
        sizes = ", ".join(f"{axis} {size}" for axis, size in (self.sizes if rows else {}).items())
        heading = f"ActivationCache: {len(self)} entries, {bytes_as_text(self.nbytes)} kept"
        cells = [[path, layer_ranges(at), shape] for (path, shape), at in rows.items()]
        return Summary(f"{heading}; {sizes}" if sizes else heading, ["name", "layers", "axes"], cells)

    # --- the residual stream taken apart -----------------------------------------------------------------------------

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
            apply_ln: Whether each is read through the norm at `layer`. The last one takes each as the model's own last
                stream, by a scale of its own and with its bias, so that `@ W_U + b_U` gives the logits of
                `logit_lens`, before any scale or cap. Others have their scale in this run.
            pos_slice: Positions.
            mlp_input: Whether the stack ends at the input of the layer's MLP.
            return_labels: Whether labels come with it.
        """
        cache, depth = self.apply_slice_to_pos_dim(pos_slice), depth_of(self, layer)
        check_flags(incl_mid=incl_mid, mlp_input=mlp_input, apply_ln=apply_ln)
        stack = stacks.accumulated(cache, depth, incl_mid=incl_mid, mlp_input=mlp_input)
        last = final_norm(cache.model) if depth == cache.model.cfg.n_layers else None
        if apply_ln and last is not None:
            stack, apply_ln = replace(stack, values=normed(cache, last, stack.values)), False
        return cache._as_asked(stack, depth, mlp_input, apply_ln, return_labels)

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
        check_flags(mlp_input=mlp_input, incl_embeds=incl_embeds)
        stack = stacks.decomposed(cache, depth, mode=mode, mlp_input=mlp_input, incl_embeds=incl_embeds)
        return cache._as_asked(stack, depth, mlp_input, apply_ln, return_labels)

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
        layer: int | None = -1,
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
        check_flags(incl_remainder=incl_remainder)
        stack = stacks.heads(cache, depth)
        if incl_remainder:
            stack = stack.with_remainder(residual(cache, depth))
        return cache._as_asked(stack, depth, False, apply_ln, return_labels)

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
                to these, and no `[..., d_model]` is formed. With `apply_ln` it is projected behind the norm.
            mlp_input: Whether the stream, and the norm, are those of the layer's MLP.

        Raises:
            MissingWeightError: A layer's MLP is a mixture of experts.
            InvalidArgumentError: As `decompose_resid`.
        """
        cache, depth = self.apply_slice_to_pos_dim(pos_slice), depth_of(self, layer)
        directions = _directions(cache, project_output_onto, depth, mlp_input, apply_ln)
        check_flags(incl_remainder=incl_remainder, mlp_input=mlp_input)
        stack = stacks.neurons(cache, depth, neuron_slice, directions)
        if incl_remainder:
            whole = residual(cache, depth, mlp_input=mlp_input)
            stack = stack.with_remainder(whole if directions is None else whole @ directions.to(whole))
        return cache._as_asked(stack, depth, mlp_input, apply_ln, return_labels, project_output_onto)

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: NeuronSlice = None,
        pos_slice: PosSlice = None,
        project_output_onto: Float[Tensor, "d_model *direction"] | None = None,
    ) -> Float[Tensor, "*batch_pos neuron d_model"]:
        """Returns what each neuron of one layer added to the residual stream, `[batch, pos, neuron, d_model]`.

        The arguments are those of `stack_neuron_results`; of one neuron the axis goes. Projected, the last axis is the
        directions', or gone.
        """
        directions = _directions(self, project_output_onto)
        block = block_at(self, layer)
        if not block.of_kind("mlp"):
            check_layers(self.model, "mlp", [layer % len(self.model.blocks)])  # raises, naming those that have one
        cache = self.apply_slice_to_pos_dim(pos_slice)
        values, _ = neuron_results(cache, block.reader(mlp_input=True), neuron_slice, directions)
        values = values[0] if isinstance(plain(neuron_slice), int) else values.movedim(0, -2)
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
        directions = _directions(cache, project_output_onto, depth, mlp_input, apply_ln)
        check_flags(mlp_input=mlp_input, expand_neurons=expand_neurons)
        stack = stacks.full(cache, depth, mlp_input=mlp_input, expand_neurons=expand_neurons, directions=directions)
        return cache._as_asked(stack, depth, mlp_input, apply_ln, return_labels, project_output_onto)

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> Float[Tensor, "layer ..."]:
        """Returns an activation of all layers before one, `[layer, ...]`.

        Args:
            activation_name: Its short name, such as `"pattern"`.
            layer: Before which; by default all layers.
            sublayer_type: The part that it is in, where the name is in several: `"ln1"` for `"scale"`.
        """
        layers = range(depth_of(self, layer))
        if not layers:
            raise InvalidArgumentError(f"layer={layer} has no layers before it", expected="1 or more")
        if sublayer_type is None:
            return torch.stack([self[activation_name, index] for index in layers])
        return torch.stack([self[activation_name, index, sublayer_type] for index in layers])

    def compute_head_results(self) -> None:
        """Makes `hook_result` available in every layer where `hook_z` is cached, as TransformerLens does.

        A run that keeps everything shows it anyway. It is computed when it is looked up, and takes no memory.
        """
        check_layers(self.model, "attn", [])
        for attention in self.model.attentions:
            point = attention.hook_result
            if self.is_given(point.name):
                continue
            if self.is_given(attention.joined):
                result = by_head(self[attention.joined], self.weight(attention.o, attention.W_O))
                self[point.name] = result.movedim(0, -2)
            elif self._recording.has(point):
                self._points = {**self._points, point.name: point}

    def _as_asked(
        self,
        stack: Stack,
        depth: int,
        mlp_input: bool,
        apply_ln: bool,
        return_labels: bool,
        project_output_onto: Tensor | None = None,
    ) -> Components | Labelled:
        """Returns a stack as it was asked for."""
        check_flags(apply_ln=apply_ln, return_labels=return_labels)
        values = stack.values
        if apply_ln:
            through = through_norm if project_output_onto is None else over_scale
            values = through(self, values, depth, mlp_input=mlp_input)
        if project_output_onto is not None and project_output_onto.ndim == 1:
            values = values[..., 0]
        return (values, stack.labels) if return_labels else values

    # --- read by norms and in logits ---------------------------------------------------------------------------------

    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "*component_batch_pos d_model"],
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: PosSlice = None,
        batch_slice: BatchSlice = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "*component_batch_pos d_model"]:
        """Returns components of the residual stream as they are in the output of the norm that reads it at a layer.

        `(component - mean) / scale * weight` (an RMS norm has no mean). Where no norm reads the stream, it is returned.

        Args:
            residual_stack: `[component, batch, pos, d_model]`, with all of the cache's rows and positions, or those
                chosen: it is picked only where it was not. There may be no axis of components, or several.
            layer: Whose norm; by default that before the unembedding.
            mlp_input: Whether it is the norm of the layer's MLP.
            pos_slice: Positions, of the scale and of a stack that still has them all.
            batch_slice: Rows, in the same way.
            has_batch_dim: Whether the stack has a batch axis. Without one it is of the only row, or of that which
                `batch_slice` names.
            recompute_ln: Whether each component is a whole stream: normed as the model does, by a scale of its own and
                with the norm's bias, and not by the scale of the run.

        Raises:
            InvalidArgumentError: The stack is of another shape, or of one that could be either.
        """
        cache, picks = self._at(pos_slice, batch_slice, has_batch_dim)
        check_flags(mlp_input=mlp_input, recompute_ln=recompute_ln)
        stack, depth = picks.made_of_stack(residual_stack), depth_of(self, layer)
        norm = norm_at(self.model, depth, mlp_input=mlp_input)
        if norm is None:
            return stack
        return normed(cache, norm, stack) if recompute_ln else frozen(cache, norm)(stack)

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "*component_batch_pos d_model"],
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: PosSlice = None,
        batch_slice: BatchSlice = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "*component_batch_pos"]:
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
        direction = reading_of(cache, laid_out(token_ids(self.model, tokens), picks)).direction
        if incorrect_tokens is not None:
            others = laid_out(token_ids(self.model, incorrect_tokens), picks)
            direction = direction - reading_of(cache, others).direction
        return attributions(cache, picks.made_of_stack(residual_stack), direction)

    def logit_constant(self, tokens: Tokens, incorrect_tokens: Tokens | None = None) -> Float[Tensor, "*batch_pos"]:
        """Returns what biases of the last norm and the unembedding add to tokens' logits, whatever the input.

        Args:
            tokens: As in `logit_attrs`. The result has their shape; for one by position, make `[batch]` `[:, None]`.
            incorrect_tokens: Tokens whose logits are subtracted.
        """
        ids = token_ids(self.model, tokens)
        if incorrect_tokens is None:
            return reading_of(self, ids).constant
        others = token_ids(self.model, incorrect_tokens)
        if {ids.ndim, others.ndim} == {1, 2}:  # [batch] and [batch, pos]
            ids, others = (one[:, None] if one.ndim == 1 else one for one in (ids, others))
        return reading_of(self, ids).constant - reading_of(self, others).constant

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
        and divergences there is `clearspan.analysis.lens_readings`.

        Args:
            incl_mid: Whether the stream between the sublayers is read too.
            pos_slice: Positions.
            return_labels: Whether labels come with it.
        """
        cache = self.apply_slice_to_pos_dim(pos_slice)
        check_flags(incl_mid=incl_mid, return_labels=return_labels)
        stack = stacks.accumulated(cache, depth_of(self, None), incl_mid=incl_mid, mlp_input=False)
        logits = lens(cache, stack.values)
        return (logits, stack.labels) if return_labels else logits

    def _at(self, pos_slice: PosSlice, batch_slice: BatchSlice, has_batch_dim: bool) -> tuple[Self, Picks]:
        """Returns the cache at chosen places, and the same choice for stacks of the cache."""
        check_flags(has_batch_dim=has_batch_dim)
        pos_slice, batch_slice = plain(pos_slice), plain(batch_slice)
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

    # --- names that TransformerLens has ------------------------------------------------------------------------------

    @property
    def cache_dict(self) -> Self:
        """The cache itself, which is a mapping: `cache.cache_dict[name] = value`."""
        return self

    @property
    def has_embed(self) -> bool:
        """Whether it has `hook_embed`."""
        return "hook_embed" in self

    @property
    def has_pos_embed(self) -> bool:
        """Whether it has `hook_pos_embed`."""
        return "hook_pos_embed" in self


def _directions(
    cache: ActivationCache,
    project_output_onto: Tensor | None,
    depth: int = 0,
    mlp_input: bool = False,
    apply_ln: bool = False,
) -> Float[Tensor, "d_model direction"] | None:
    """Returns directions of the residual stream; with `apply_ln`, for those of the norm's output, without its scale."""
    check_flags(mlp_input=mlp_input, apply_ln=apply_ln)
    if project_output_onto is None:
        return None
    check_kind(Tensor, project_output_onto=project_output_onto)
    shape, d_model = list(project_output_onto.shape), cache.model.cfg.d_model
    if not 1 <= len(shape) <= 2 or shape[0] != d_model:
        raise InvalidArgumentError(
            "project_output_onto is a direction, or several",
            expected=f"[d_model={d_model}], or [d_model={d_model}, direction]",
            got=str(shape),
        )
    directions = project_output_onto[:, None] if project_output_onto.ndim == 1 else project_output_onto
    return before_norm(cache, directions, depth, mlp_input=mlp_input) if apply_ln else directions
