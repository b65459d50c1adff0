"""The bridge: a thin front that names what its modules do. It is long by its documentation, not by what it does."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clearspan.architectures import ArchitectureAdapter
from clearspan.bridge import caching, forward, inputs
from clearspan.bridge.cache_run_methods import CacheRunMethods
from clearspan.bridge.forward import ReturnType
from clearspan.bridge.generation_methods import GenerationMethods
from clearspan.bridge.hook_methods import HookMethods
from clearspan.bridge.index import PointIndex, Segment
from clearspan.bridge.inputs import Input, ModelInput
from clearspan.bridge.module_methods import ModuleMethods
from clearspan.bridge.point_table import PointTable
from clearspan.bridge.processed import processed
from clearspan.bridge.read_out import read_out
from clearspan.bridge.run_weights import weight_slots
from clearspan.bridge.text import PaddingSide, Text
from clearspan.bridge.text_methods import TextMethods
from clearspan.bridge.verification import Verification, verify
from clearspan.bridge.verification.run import Level
from clearspan.components import (
    Binding,
    BlockBridge,
    EmbeddingBridge,
    NormalizationBridge,
    PosEmbedBridge,
    UnembeddingBridge,
    hook_points,
    logits_point,
)
from clearspan.hf.offload import execution_device
from clearspan.hf.quantised import dequantised
from clearspan.hf.standalone import arguments_of
from clearspan.hf.taps import Taps
from clearspan.points import HookPoint, NamesFilter
from clearspan.weights import WeightMethods
from clearspan.weights.processing import Step
from clearspan.weights.ties import sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TransformerBridge(HookMethods, CacheRunMethods, WeightMethods, TextMethods, GenerationMethods, ModuleMethods):
    """A Hugging Face model, seen and reached into under canonical names. `clearspan.boot` makes one.

    Attributes:
        hf_model: The model itself, untouched.
        adapter: What is known of its architecture.
        cfg: Its sizes.
        blocks: Its blocks as live components.
        components: Its live components in the order of the forward, blocks one by one.
        index: Its hook points.
        processing: What processing did to its weights; nothing, unless `processed` made it.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> tokens = bridge.to_tokens("def area(self):")
        >>> logits, cache = bridge.run_with_cache(tokens)
        >>> list(cache["pattern", 0].shape) == [1, 8, tokens.shape[1], tokens.shape[1]]
        True
    """

    embed: EmbeddingBridge
    pos_embed: PosEmbedBridge
    ln_final: NormalizationBridge
    unembed: UnembeddingBridge
    hook_embed: HookPoint
    hook_pos_embed: HookPoint
    hook_logits: HookPoint

    def __init__(
        self,
        hf_model: "PreTrainedModel",
        adapter: ArchitectureAdapter,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
    ) -> None:
        self.hf_model = hf_model
        self.adapter = adapter
        self.cfg = adapter.cfg
        self.text = Text(tokenizer, self.cfg)
        binding = Binding(
            hf_model,
            self.cfg,
            adapter.weight_processing_conversions,
            self._arguments_of,
            dequantised,
            lambda parameter: sharing(self.components, parameter),
        )
        self.blocks: tuple[BlockBridge, ...] = ()
        components = []
        for key, template in adapter.component_mapping.items():
            if isinstance(template, BlockBridge):
                layers = range(self.cfg.n_layers)
                self.blocks = tuple(template.at_layer(i).bind(binding, f"blocks.{i}") for i in layers)
                components += self.blocks
            else:
                setattr(self, key, template.bind(binding, key))
                components.append(getattr(self, key))
        points = hook_points(components)
        points["hook_logits"] = logits_point(self.cfg)
        for point in points.values():
            if "." not in point.name:
                setattr(self, point.name, point)
        self.components = tuple(components)
        self.index = PointIndex(points, components, adapter)
        self.taps = Taps(hf_model, self.index)
        self.processing: tuple[Step, ...] = ()
        self.choices: dict[object, caching.Choice] = {}
        self.weight_slots = weight_slots(self)

    def _arguments_of(self, module: nn.Module, value: Tensor) -> dict[str, Any]:
        """Returns what the model hands a module of a block beside its input; nobody hears the run that this takes."""
        with self.taps.suspended():
            return arguments_of(
                self.hf_model,
                [block.module for block in self.blocks],
                module,
                value,
                embedding_width=self.embed.width,
                returns_tuple=self.blocks[0].returns_tuple,
            )

    @property
    def device(self) -> torch.device:
        """Where the token embedding is, and inputs go."""
        return execution_device(self.embed.module)

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input: Input,
        return_type: ReturnType | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Runs the model.

        Args:
            input: Text, a list of texts, token ids `[batch, pos]`, embeddings `[batch, pos, d_model]`, or, with
                `start_at_layer`, the residual stream entering that layer. A token tensor is taken as it is: padding
                in it is only known by `attention_mask`.
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
            **model_kwargs: Further keywords of the model's own forward.

        Raises:
            InputError: Empty, longer than the context, of the wrong shape, or ids outside the vocabulary.
            NoTokenizerError: Text without a tokenizer.
            UnknownArgumentError: A keyword that neither this method nor the model's forward has.
            InvalidArgumentError: A layer that does not exist, or a loss without tokens.
            PointNotReachedError: Someone listens in a part of the model that is not run.
        """
        given, segment = self.prepare(
            input,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            start_at_layer=start_at_layer,
            stop_at_layer=stop_at_layer,
            **model_kwargs,
        )
        return forward.run(self, given, segment, return_type, loss_per_token)

    __call__ = forward

    def read_out(
        self, residual: Float[Tensor, "batch pos d_model"], tokens: Sequence[int] | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Returns the logits that the model makes of a residual stream after the last block.

        Its final norm, unembedding, and scale or cap. Gradients pass. Listeners do not hear of it.

        Args:
            residual: The stream.
            tokens: Ids whose logits are computed, `[batch, pos, token]` in their order; by default all.
        """
        return read_out(self, residual, tokens)

    def prepare(
        self,
        input: Input,
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        **model_kwargs: Any,
    ) -> tuple[ModelInput, Segment]:
        """Returns what a run hands the model, checked, and the part of the model that it runs.

        The arguments are those of `forward`.
        """
        given = inputs.prepare(
            self,
            input,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            model_kwargs=model_kwargs,
            is_residual=start_at_layer is not None,
        )
        return given, inputs.resolve_segment(self, start_at_layer, stop_at_layer)

    # --- hooks -------------------------------------------------------------------------------------------------------

    @property
    def hook_dict(self) -> Mapping[str, HookPoint]:
        """Every name, aliases included, to its hook point."""
        return MappingProxyType(self.index.by_name)

    def points(self, names: NamesFilter = None) -> PointTable:
        """Returns a table of hook points with their axes and sizes; nothing is run.

        Args:
            names: Which: all (None), a name, a list of names, or a predicate of names.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> print(bridge.points(["blocks.3.attn.hook_k", "blocks.3.attn.hook_pattern"]))
            blocks.3.attn.hook_k        [batch, pos, kv_head=1, d_head=32]   output of transformer.h.3.attn.c_attn
            blocks.3.attn.hook_pattern  [batch, head=8, q_pos, k_pos]        pattern of transformer.h.3.attn
        """
        return PointTable.of(self.index.select(names))

    def verify(self, level: Level = "quick", tokens: Tensor | None = None) -> Verification:
        """Checks on this very model that points show and do what they are said to, and returns what was found.

        Logits are compared with the unbridged model's; every point is read; the identities between points are computed;
        points are written and their effect is followed; padded rows are compared with rows alone. A model in half
        precision is compared with a copy in float32, so that rounding is not taken for a fault.

        Args:
            level: `"quick"` writes in one layer of each kind; `"full"` in every layer, returned and in place.
            tokens: Token ids `[batch, pos]`, at least two rows of four; by default random ones.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> found = bridge.verify()
            >>> found.passed, found.forwards <= 40
            (True, True)
        """
        return verify(self, level, tokens)

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
            fold_ln: Norms' weights and biases go into the linear maps that read them. A map that had no bias gets one
                where there is something to put in; Hugging Face's files of that architecture have no place for it.
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

    def why_absent(self, name: str) -> str | None:
        """Returns why this architecture lacks a hook point of the vocabulary; None where it has it.

        Raises:
            UnknownPointError: The name is not in the vocabulary.
        """
        reason = self.index.why_absent(name)
        if reason is None:
            self.index.find(name)
        return reason

    def __repr__(self) -> str:
        cfg = self.cfg
        return (
            f"TransformerBridge({cfg.model_name or cfg.architecture}: {cfg.n_layers} layers, d_model {cfg.d_model}, "
            f"{cfg.n_heads} heads, {len(self.index.by_name)} names of hook points)"
        )
