"""The model: a Hugging Face model with its components, hook points, taps and weights. State; it runs nothing."""

import copy
import functools
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import Tensor, nn

from clearspan.architectures import AdapterSource, ArchitectureAdapter
from clearspan.checks import check_flags, check_kind, device_of, dtype_of, number_of
from clearspan.components import (
    Binding,
    BlockBridge,
    EmbeddingBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    NormalizationBridge,
    PosEmbedBridge,
    UnembeddingBridge,
    check_parts,
    hook_points,
    logits_point,
)
from clearspan.components.starts import first_of, reads_tokens, sources_of
from clearspan.config import TransformerBridgeConfig
from clearspan.errors import InvalidArgumentError, MissingPartError, TokenizerWarning
from clearspan.hf.adapted import adapted
from clearspan.hf.adapters import acting, sources
from clearspan.hf.loading import bridge_config, current
from clearspan.hf.modules import dequantised, execution_device, score_divisor
from clearspan.hf.segments import ArgumentsOf
from clearspan.hf.sequence import keeps_more
from clearspan.hf.taps import Taps
from clearspan.hf.tokenizers import NO_TOKENIZER, OwnTokenizer, check_tokenizer, tokenizer_doubt, tokenizer_fault
from clearspan.hf.torch_hooks import take_off_copied
from clearspan.index import HookPoints, PointIndex, PointTable
from clearspan.inputs import Batch, Input, Reader, batch_of
from clearspan.points import HookPoint, NamesFilter
from clearspan.results import Summarised, Summary
from clearspan.text import Chat, Messages, PaddingSide, Text
from clearspan.weights import ModelWeights
from clearspan.weights.model_weights import sharing
from clearspan.weights.processing import Step

if TYPE_CHECKING:
    from clearspan.hf.types import PreTrainedModel, PreTrainedTokenizerBase


Kind = TypeVar("Kind", bound="Model")


def check_bridge(bridge: object) -> None:
    """Raises InvalidArgumentError unless something is a bridge, such as where the model itself was given.

    Example:
        >>> check_bridge("gpt2")
        Traceback (most recent call last):
        clearspan.errors.InvalidArgumentError: this needs a bridge
          expected: a clearspan.TransformerBridge
          got: str
          fix: bridge = clearspan.boot(model)
    """
    if not isinstance(bridge, Model):
        raise InvalidArgumentError(
            "this needs a bridge",
            expected="a clearspan.TransformerBridge",
            got=type(bridge).__name__,
            fix="bridge = clearspan.boot(model)",
        )


_FRAME = {
    "embed": EmbeddingBridge,
    "pos_embed": PosEmbedBridge,
    "blocks": BlockBridge,
    "ln_final": NormalizationBridge,
    "unembed": UnembeddingBridge,
}
"""The kinds of the parts of an adapter's mapping that have a name of their own."""
_NEEDED = ("embed", "blocks", "unembed")
"""Those that every mapping has."""


def _blocks(template: GeneralizedComponent, n_layers: int, binding: Binding) -> Iterator[BlockBridge]:
    """Yields the live blocks of a template."""
    for layer in range(n_layers):
        block = template.at_layer(layer).bind(binding, f"blocks.{layer}")
        assert isinstance(block, BlockBridge), "a template of blocks"
        yield block


def _listed(layers: Sequence[int], most: int = 5) -> str:
    shown = ", ".join(map(str, layers[:most]))
    return shown if len(layers) <= most else f"{shown} and {len(layers) - most} more"


def check_layers(model: "Model", part: str, layers: Iterable[int]) -> None:
    """Raises unless some layers have a sublayer, and the model has one at all.

    Args:
        model: The model.
        part: Its name, such as `"attn"`.
        layers: The layers.

    Raises:
        MissingPartError: A layer lacks it; the error names those that have it.
    """
    have = model.layers_with(part)
    lacking = [layer for layer in layers if layer not in have]
    if not have or lacking:
        raise MissingPartError(
            f"no layer has {part!r}" if not have else f"layer {_listed(lacking)} has no {part!r}",
            expected=f"a layer with it: {_listed(have, most=100)}" if have else None,
            where=f"{model.cfg.architecture}, layers of {' and '.join(dict.fromkeys(model.layer_types()))!r}"
            if not have
            else model.cfg.architecture,
            reason=model.blocks[lacking[0]].why_without(part) if have else None,
            fix="bridge.layer_types() lists what each layer has",
        )


def handed_over(model: "Model", tokenizer: "PreTrainedTokenizerBase | None") -> OwnTokenizer:
    """Returns a tokenizer that a user hands over for a model; warns the caller's caller where it may be another's.

    Raises:
        InvalidArgumentError: It is no tokenizer of transformers, or cannot turn text into the model's ids.
    """
    check_tokenizer(tokenizer)
    if tokenizer is None:
        return NO_TOKENIZER
    d_vocab = model.embed.n_tokens
    where = f"{type(tokenizer).__name__} for {model.cfg.model_name or model.cfg.architecture}"
    fault = tokenizer_fault(tokenizer, d_vocab)
    if fault is not None:
        raise InvalidArgumentError(
            "this tokenizer cannot turn text into the model's ids",
            where=where,
            reason=fault,
            fix="the tokenizer that the model was trained with; or none, and token ids in place of text",
        )
    doubt = tokenizer_doubt(tokenizer, d_vocab)
    if doubt is not None:
        warnings.warn(f"{doubt} ({where})", TokenizerWarning, stacklevel=3)
    return OwnTokenizer(tokenizer)


def of_model(
    kind: type[Kind],
    hf_model: "PreTrainedModel",
    source: AdapterSource,
    own: OwnTokenizer,
    default_prepend_bos: bool,
    processing: tuple[Step, ...],
) -> Kind:
    """Returns a model of a kind with settings of another."""
    take_off_copied(hf_model)
    cfg = bridge_config(hf_model, source)
    cfg.default_prepend_bos = default_prepend_bos
    new = kind(hf_model, source(cfg), own)
    new.processing = processing
    return new


def like(model: Kind, hf_model: "PreTrainedModel") -> Kind:
    """Returns what a bridge is, on another model of the same architecture."""
    return of_model(type(model), hf_model, *model._settings())


class Model(Summarised, ModelWeights):
    """A Hugging Face model under canonical names: what all runs take, and what they leave as it was.

    Attributes:
        hf_model: The model itself, untouched.
        adapter: What is known of its architecture.
        text: What turns text into tokens and back.
        blocks: Its blocks as live components.
        firsts: For each layer, and for what comes after the last one, the last layer at most that one from which a run
            needs nothing of the layers before it.
        reads_tokens: Whether blocks read something that the model makes of the tokens, besides the residual stream.
        components: Its live components in the order of the forward, blocks one by one.
        index: Its hook points.
        taps: What carries values to hook points and back.
        processing: What processing did to its weights; nothing, unless `processed` made it.
        remembered: What runs have worked out of this model and may use again, by what it depends on.
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
        own: OwnTokenizer = NO_TOKENIZER,
    ) -> None:
        self.hf_model = hf_model
        self.adapter = adapter
        # What is handed to components must not refer to this object: a model is to be free when its bridge is.
        this, arguments = weakref.ref(self), ArgumentsOf(hf_model)

        def sharing_weights(parameter: Tensor) -> Sequence[str]:
            model = this()
            return () if model is None else sharing(model.components, parameter)

        def follow() -> None:
            model = this()
            if model is not None:
                model.taps.follow()

        def expect(path: str, call: int) -> None:
            model = this()
            if model is not None:
                model.taps.expect(path, call)

        binding = Binding(
            hf_model,
            adapter.cfg,
            functools.partial(current, adapter.cfg, hf_model),
            adapter.weight_processing_conversions,
            arguments,
            dequantised,
            acting,
            adapted,
            sources,
            sharing_weights,
            follow,
            expect,
        )
        self.blocks: tuple[BlockBridge, ...] = ()
        components = []
        mapping = adapter.component_mapping
        check_parts("", mapping, {key: kind for key, kind in _FRAME.items() if key in mapping or key in _NEEDED})
        for key, template in adapter.component_mapping.items():
            if template.is_of(BlockBridge):
                self.blocks = tuple(_blocks(template, adapter.cfg.n_layers, binding))
                components += self.blocks
            else:
                setattr(self, key, template.bind(binding, key))
                components.append(getattr(self, key))
        self.text = Text(own, adapter.cfg, self.embed)
        self._reader = Reader(self.text)
        arguments.refused = adapter.whole_forwards
        arguments.blocks = [block.module_path for block in self.blocks]
        arguments.embedding_width = self.embed.width
        first = next(iter(self.blocks))
        arguments.stream_shape, arguments.raw_stream = first.stream_shape, first.raw_stream
        arguments.stream_dtype = first.stream_dtype
        self.firsts = tuple(first_of(self.blocks, layer) for layer in range(len(self.blocks) + 1))
        self.reads_tokens = reads_tokens(self.blocks)
        arguments.firsts, arguments.reads_tokens = self.firsts, self.reads_tokens
        points = {name: one for name, one in hook_points(components).items() if name not in adapter.refused}
        points["hook_logits"] = logits_point(adapter.cfg)
        for point in points.values():
            if "." not in point.name:
                setattr(self, point.name, point)
        self.components = tuple(components)
        weights = {id(one): one for block in self.blocks for one in block.module.parameters() if one.ndim > 1}
        adapter.cfg.n_params = sum(one.numel() for one in weights.values())
        adapter.cfg.attn_scale = next((score_divisor(one.module) for one in self.attentions), None)
        self.index = PointIndex(points, components, adapter)
        self._of_vocabulary = [point for point in self.index if "d_vocab" in point.sizes]
        shares_keys = any(sources_of(block) for block in self.blocks)
        self.taps = Taps(hf_model, self.index, drops_positions=shares_keys)
        self.processing: tuple[Step, ...] = ()
        self.remembered: dict[object, Any] = {}

    def _settings(self) -> tuple[Any, ...]:
        return self.adapter.source, self.text.own, self.cfg.default_prepend_bos, self.processing

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns a bridge to a deep copy of the model, without hooks."""
        return like(self, copy.deepcopy(self.hf_model, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        # Hooks are not written. A shallow copy is another bridge to the same model.
        return of_model, (type(self), self.hf_model, *self._settings())

    @property
    def cfg(self) -> TransformerBridgeConfig:
        """The model's sizes, as they are now: a vocabulary may have been resized, weights cast."""
        cfg = current(self.adapter.cfg, self.hf_model)
        cfg.device, cfg.tokenizer_name = str(self.device), getattr(self.tokenizer, "name_or_path", None) or None
        for point in self._of_vocabulary:
            if point.sizes["d_vocab"] != cfg.d_vocab:
                point.sizes = {**point.sizes, "d_vocab": cfg.d_vocab}
        return cfg

    @property
    def device(self) -> torch.device:
        """The device of the token embedding, to which inputs go."""
        return execution_device(self.embed.module)

    @property
    def patience(self) -> float:
        """Seconds that a run waits while another thread's run on this model is inside a hook function; it can be set.

        After them it raises `ModelBusyError`. All bridges to the model share it.
        """
        return self.taps.turns.patience

    @patience.setter
    def patience(self, seconds: float) -> None:
        found = number_of("patience", seconds)
        if not found > 0:
            raise InvalidArgumentError(f"patience={seconds!r}", expected="seconds, more than 0")
        self.taps.turns.patience = found

    # --- hook points -------------------------------------------------------------------------------------------------

    @property
    def hook_dict(self) -> Mapping[str, HookPoint]:
        """Every name, aliases included, to its hook point."""
        return HookPoints(self.index.by_name)

    def points(self, names: NamesFilter = None) -> PointTable:
        """Returns a table of hook points with their axes and sizes; nothing is run.

        Args:
            names: Which: all (None), a name, a list of names, a compiled pattern, or a predicate of names.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> print(bridge.points(["blocks.3.attn.hook_k", "blocks.3.attn.hook_pattern"]))
            blocks.3.attn.hook_k        [batch, pos, kv_head=1, d_head=32]   output of transformer.h.3.attn.c_attn
            blocks.3.attn.hook_pattern  [batch, head=8, q_pos, k_pos]        pattern of transformer.h.3.attn
        """
        return PointTable.of(self.index.select(names))

    def why_absent(self, name: str) -> str | None:
        """Returns why this architecture lacks a hook point of the vocabulary; None where it has it.

        Raises:
            UnknownPointError: The name is not in the vocabulary.
        """
        reason = self.index.why_absent(name)
        if reason is None:
            self.index.find(name)
        return reason

    # --- layers ------------------------------------------------------------------------------------------------------

    def layer_types(self) -> list[str]:
        """Returns what each layer has: names of its sublayers, in the order of the forward.

        `"attn, mlp"` is attention, then an MLP; `+` joins sublayers that read the same residual stream: `"attn+mlp"`,
        `"attn+mixer, mlp"`. The names are those of the parts: `bridge.blocks[3].mixer`, `blocks.3.hook_mixer_out`.

        Example:
            >>> import clearspan
            >>> clearspan.boot("tiny-bigcode").layer_types()[:2]
            ['attn, mlp', 'attn, mlp']
        """
        return [block.layer_type for block in self.blocks]

    @property
    def attentions(self) -> tuple[GeneralAttentionBridge, ...]:
        """All attentions with heads, in the order of the forward."""
        return tuple(attention for block in self.blocks for attention in block.attentions)

    @property
    def whole_sequences(self) -> str | None:
        """Why runs cannot continue from what an earlier run kept of its first positions, or None if they can.

        Keys and values of the first positions are the first ones of a longer run. A mixer's state is not: it is that
        after the last position.
        """
        mixing = [layer for layer, block in enumerate(self.blocks) if block.of_kind("mixer")]
        if self.adapter.whole_sequences is not None:
            return self.adapter.whole_sequences
        if not mixing:
            more = "layers keep more of earlier positions than keys and values, such as what keys are chosen by"
            return more if keeps_more(self.hf_model) else None
        which = f"layer {mixing[0]} has" if len(mixing) == 1 else f"layers {_listed(mixing)} have"
        return f"{which} a mixer, whose state after the first positions is not kept"

    def layers_with(self, part: str) -> list[int]:
        """Returns the layers that have a sublayer of some name, such as `"attn"`, `"mixer"` or `"mlp"`.

        Example:
            >>> import clearspan
            >>> clearspan.boot("tiny-bigcode").layers_with("attn")
            [0, 1, 2, 3, 4]
        """
        check_kind(str, part=part)
        return self._layers_with(part)

    # --- text and tokens ---------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """The tokenizer, or None; it can be set.

        Raises:
            InvalidArgumentError: It is set to something that is no tokenizer of transformers, or that cannot turn text
                into the model's ids: ordinary tokens are outside the vocabulary, or every text has the same ids.
            TokenizerWarning: A warning: it covers much less than the vocabulary, so it may be another model's.
        """
        return self.text.own.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        self.text.own = handed_over(self, tokenizer)

    def to_batch(
        self,
        input: Input,
        attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = False,
    ) -> Batch:
        """Returns an input as a batch: token ids with the mask of what is padded, on the model's device.

        Every function that takes an input makes a batch of it first, and takes a batch as well.

        Args:
            input: Text, a list of texts; token ids `[row, pos]` as a tensor, an array or lists, which may differ in
                length; a tokenizer's output or rows of a dataset (mappings with `input_ids`, or with `text`); chat
                messages, or a list of conversations; embeddings `[row, pos, d_model]`; or a batch.
            attention_mask: `[row, pos]`, 1 for real tokens: of token ids that are padded already.
            prepend_bos: Whether text gets one BOS first; by default as `cfg.default_prepend_bos` says, and for chat
                messages as their template does.
            padding_side: Where shorter rows are filled; by default on the tokenizer's side.
            add_generation_prompt: Whether the start of an answer follows chat messages; by default it does, except
                after a message of the assistant's.
            continue_final_message: Whether the last chat message is left open, to be continued; None for one of the
                assistant's.

        Raises:
            InputError: Nothing that can be run: an empty text, ids outside the vocabulary, a mask of another shape,
                chat messages that the tokenizer has no template for.
            NoTokenizerError: Text without a tokenizer.

        Example:
            >>> import clearspan
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> batch = bridge.to_batch(["import os", "x = 1, 2"])
            >>> batch.lengths.tolist(), batch.tokens.shape
            ([3, 8], torch.Size([2, 8]))
        """
        is_usual = prepend_bos is None and padding_side is None
        if is_usual and add_generation_prompt is None and continue_final_message is False:
            reader = self._reader
        else:
            chat = Chat(add_generation_prompt, continue_final_message)
            reader = Reader(self.text, prepend_bos, padding_side, chat)
        table = self.embed.module._parameters.get("weight")
        if table is None or table.is_meta:
            device, d_vocab = self.device, self.embed.n_tokens
        else:  # nearly always, and every run asks
            device, d_vocab = table.device, table.shape[0]
        return batch_of(input, reader, device, d_vocab=d_vocab, attention_mask=attention_mask)

    def to_tokens(
        self,
        input: str | Sequence[str] | Messages | Sequence[Messages],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
        *,
        truncate: bool = False,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = False,
    ) -> Tensor:
        """Returns token ids `[batch, pos]`.

        Texts of different lengths are padded, which the tensor alone does not tell: `to_batch` keeps the mask.

        Args:
            input: Text, or a list of texts; chat messages, or a list of conversations, as the tokenizer's template
                writes them.
            prepend_bos: Whether each row starts with one BOS; by default as `cfg.default_prepend_bos` says, and for
                chat messages as their template does.
            padding_side: Where shorter rows are filled; by default the tokenizer's side.
            move_to_device: Whether they go to the model's device, or stay on the CPU.
            truncate: Whether to cut a text at the end of the context.
            add_generation_prompt: As for `to_batch`.
            continue_final_message: As for `to_batch`.

        Raises:
            InputError: An empty string, no string, or messages that the tokenizer has no template for.
            NoTokenizerError: There is no tokenizer.
        """
        check_flags(move_to_device=move_to_device)
        chat = Chat(add_generation_prompt, continue_final_message)
        tokens = self.text.encode(input, prepend_bos, padding_side, truncate, chat).tokens
        return tokens.to(self.device) if move_to_device else tokens

    def to_string(self, tokens: Tensor | Sequence[int] | int) -> str | list[str]:
        """Returns the text of a row of ids or of one id, or a list of texts for `[batch, pos]`."""
        return self.text.decode(tokens)

    def to_str_tokens(
        self, input: str | Sequence[str] | Messages | Tensor, prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """Returns what each token adds to the text: a list for one row, a list of lists for several.

        Joined they are the row's text, but for tokens that are part of a character: each is the replacement character.
        """
        return self.text.str_tokens(input, prepend_bos)

    def to_single_token(self, string: str) -> int:
        """Returns the id of a text that is one token.

        A text that starts with a space is encoded as behind a word: some tokenizers put a space of their own first.

        Raises:
            InputError: It is none, or more than one, or the tokenizer's unknown token.
            NoTokenizerError: There is no tokenizer.
        """
        return self.text.single_token(string)

    def to_single_str_token(self, token: int) -> str:
        """Returns the text of one token id."""
        return str(self.text.decode(token))

    # --- the module's own methods ------------------------------------------------------------------------------------

    def to(
        self,
        where: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Self:
        """Moves the model to a device, or changes its dtype, in place.

        Args:
            where: A device or a dtype.
            dtype: A dtype.
            device: A device, in place of `where`.

        Raises:
            InvalidArgumentError: There is no such device or dtype, or none is given, or two.
        """
        is_dtype = isinstance(where, torch.dtype)
        devices = [device_of(one) for one in (None if is_dtype else where, device) if one is not None]
        dtypes = [dtype_of(one) for one in (where if is_dtype else None, dtype) if one is not None]
        if len(devices) > 1 or len(dtypes) > 1 or not (devices or dtypes):
            raise InvalidArgumentError(
                "the model is moved to one device, or one dtype, or one of each",
                got=f"where={where!r}, dtype={dtype!r}, device={device!r}",
            )
        for one in (*devices, *dtypes):
            nn.Module.to(self.hf_model, one)
        return self

    def eval(self) -> Self:
        """Sets the model to evaluation: no dropout."""
        self.hf_model.eval()
        return self

    def train(self, mode: bool = True) -> Self:
        """Sets the model to training, or to evaluation with `mode=False`."""
        check_flags(mode=mode)
        self.hf_model.train(mode)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Sets whether gradients are computed for the model's parameters."""
        check_flags(requires_grad=requires_grad)
        self.hf_model.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the parameters' gradients."""
        self.hf_model.zero_grad(set_to_none)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the model's parameters."""
        return self.hf_model.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the model's parameters with their Hugging Face names."""
        return self.hf_model.named_parameters()

    def _summary(self) -> Summary:
        """Returns its parts, blocks of the same kind in one row."""
        rows: dict[tuple[str, str], list[str]] = {}
        for component in self.components:
            path = "blocks[…]" if component.path.startswith("blocks.") else component.path
            parts = ", ".join(component.submodules)
            rows.setdefault((path, f"{type(component).__name__}: {parts}" if parts else type(component).__name__), [])
            rows[path, next(reversed(rows))[1]].append(component.module_path)
        cells = [
            [path, kind, modules[0] if len(modules) == 1 else f"{modules[0]} … {modules[-1]}"]
            for (path, kind), modules in rows.items()
        ]
        about = f"{self.cfg.architecture}, {self.cfg.dtype} on {self.device}, vocabulary {self.cfg.d_vocab}"
        notes = ["hook points: .points(); why one is not there: .why_absent(name); what holds: .verify()"]
        return Summary(repr(self), ["part", "kind", "module"], cells, [about], notes)

    def __repr__(self) -> str:
        cfg = self.cfg
        return (
            f"{type(self).__name__}({cfg.model_name or cfg.architecture}: {cfg.n_layers} layers, d_model "
            f"{cfg.d_model}, {cfg.n_heads} heads, {len(self.index.by_name)} names of hook points)"
        )
