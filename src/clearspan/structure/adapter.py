"""The adapter of a derived structure."""

import copy
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from clearspan.architectures import ADAPTERS, ArchitectureAdapter
from clearspan.architectures.adapter import AdapterSource, Size, Sizes
from clearspan.components import (
    AttentionBridge,
    BlockBridge,
    GeneralizedComponent,
    MLPBridge,
    NormalizationBridge,
    PerLayer,
    PosEmbedBridge,
    SharedKeysAttentionBridge,
    StreamBlockBridge,
)
from clearspan.components.starts import reads_tokens
from clearspan.config import TransformerBridgeConfig
from clearspan.errors import UnsupportedArchitectureError
from clearspan.hf.turns import turns_of
from clearspan.points import Layout, nearest
from clearspan.structure import reversible
from clearspan.structure.algebra import eps_of
from clearspan.structure.block import block_template
from clearspan.structure.continued import why_whole_sequences
from clearspan.structure.finding import Finding, Findings, MissingInBlockError, MissingStructureError
from clearspan.structure.frame import Blocks, find_blocks, with_entry
from clearspan.structure.inward import Inward, find_inward
from clearspan.structure.leftover import account_for_all
from clearspan.structure.needs import note_needs
from clearspan.structure.outward import find_outward
from clearspan.structure.positions import generates_on, has_table, numbers_positions, takes_embeddings
from clearspan.structure.stream_layout import NO_HEADS, StreamLayout, lay_out, lay_out_block, layout_of
from clearspan.structure.tokens import POSITIONS, ROWS, tokens_for
from clearspan.structure.trace import Trace, traced
from clearspan.structure.unshown import Unshown, unshown
from clearspan.structure.woven import FIRST_SEAM, SEAM, blocks_of, place_in_weave

if TYPE_CHECKING:
    from clearspan.hf.types import PreTrainedModel


@dataclass(frozen=True)
class Structure:
    """What was derived of a model: called with its sizes, it makes the model's adapter.

    Attributes:
        architecture: Class name of the model.
        parts: Component templates by canonical name, in the order of the forward.
        sizes: The sizes that were measured.
        numbers_positions: Whether the model numbers positions by the padding mask or the ids.
        has_table: Whether rotations or biases lie in a table of `n_ctx` positions.
        irrelevant: Parameters and buffers that no component accounts for, as patterns, each with the reason.
        refused: Points that the parts would have and that do not hold, each with the reason.
        whole_forwards: Why no block can be run apart from the whole forward, or None if they can.
        no_generation: Why points cannot be followed through a generation, or None if they can.
        whole_sequences: Why a run cannot go on from the keys and values of an earlier one, or None if it can.
        findings: What was found, and how it is known.
    """

    architecture: str
    parts: Mapping[str, GeneralizedComponent]
    sizes: Sizes
    numbers_positions: bool = False
    has_table: bool = False
    irrelevant: Mapping[str, str] = field(default_factory=dict, repr=False)
    refused: Mapping[str, str] = field(default_factory=dict, repr=False)
    whole_forwards: str | None = None
    no_generation: str | None = None
    whole_sequences: str | None = None
    findings: tuple[Finding, ...] = field(default=(), repr=False)

    def __call__(self, cfg: TransformerBridgeConfig) -> ArchitectureAdapter:
        """Returns an adapter for these sizes."""
        return DerivedAdapter(cfg, self)

    def without(self, points: Mapping[str, str], layers: Mapping[int, str]) -> "Structure":
        """Returns the structure without points, and without all that is inside of some blocks.

        Args:
            points: The points, each with the reason.
            layers: The blocks of which only the stream is left, each with the reason.
        """
        blocks = self.parts["blocks"]
        assert isinstance(blocks, PerLayer), "each layer has a template of its own"
        templates = [
            _stream_alone(one, layers[layer]) if layer in layers else one for layer, one in enumerate(blocks.templates)
        ]
        parts = {**self.parts, "blocks": PerLayer(templates)}
        return replace(self, parts=parts, refused={**self.refused, **points})

    def unshown(self) -> list[Unshown]:
        """Returns the parts of which only the ends are known, each with the reason."""
        return unshown(self.parts, self.findings)

    def report(self) -> str:
        """Returns what was found, a line each, with how it is known."""
        return "\n".join(map(str, self.findings))

    def __repr__(self) -> str:
        return f"the structure derived of {self.architecture}"


def _stream_alone(block: GeneralizedComponent, reason: str) -> StreamBlockBridge:
    """Returns the template of a block with its stream alone."""
    assert isinstance(block, BlockBridge), "a template of a block"
    own = StreamBlockBridge(str(block.name), reason)
    own.index, own.call, own.seam = block.index, block.call, block.seam
    return own


class DerivedAdapter(ArchitectureAdapter):
    """The adapter of a derived structure.

    Args:
        cfg: The model's sizes.
        structure: The structure.
    """

    def __init__(self, cfg: TransformerBridgeConfig, structure: Structure) -> None:
        self._structure = structure
        self.makes_positions_from_mask = structure.numbers_positions
        self.config_values = {"has_table": structure.has_table}
        own = structure.sizes.get("eps", ())
        named = own if isinstance(own, tuple) else [name for name in cfg.hf if name.endswith(EPSILONS)]
        self.config_values |= {"eps_attr": named[0]} if named else {}
        self.refused = structure.refused
        self.whole_forwards = structure.whole_forwards
        self.no_generation = structure.no_generation
        self.whole_sequences = structure.whole_sequences
        self.irrelevant = {**ArchitectureAdapter.irrelevant, **structure.irrelevant}
        super().__init__(cfg)

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the structure's parts."""
        parts = copy.deepcopy(dict(self._structure.parts))
        table = parts.get("pos_embed")
        if isinstance(table, PosEmbedBridge) and table.padding_id is not None:
            cfg.n_ctx -= table.offset  # the size of the table counts its first rows too
        return parts

    @property
    def source(self) -> AdapterSource:
        """The structure."""
        return self._structure


def derive(model: "PreTrainedModel", *, partial: bool = False) -> Structure:
    """Returns a model's structure, found in one traced forward of a few tokens and a few calls of its parts.

    Args:
        model: A loaded Hugging Face model. It is run in eval mode, and left as it was.
        partial: Whether a block whose inside was not found is left with its residual stream alone, instead of an error.

    Raises:
        UnsupportedArchitectureError: Something that an adapter needs was not found.

    Example:
        >>> import clearspan
        >>> from clearspan.structure import derive
        >>> structure = derive(clearspan.boot("tiny-bigcode").hf_model)
        >>> print(structure.findings[0])
        hook_embed: transformer.wte + transformer.wpe is the stream that enters the blocks
    """
    _check_one_stack(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with turns_of(model).unseen():
            return _derived(model, partial=partial)
    except (MissingStructureError, *FAULTS) as error:
        raise UnsupportedArchitectureError(
            f"no adapter for {type(model).__name__}, and its structure was not found",
            reason=_said(error),
            nearest=nearest(type(model).__name__, ADAPTERS),
            fix=f"{_PARTIAL if isinstance(error, MissingInBlockError) else ''}boot(model, adapter=...) with an adapter "
            "of your own: CONTRIBUTING.md shows how, step by step",
        ) from error
    finally:
        for module, was_training in modes.items():
            module.training = was_training


def _check_one_stack(model: "PreTrainedModel") -> None:
    """Raises if the model is an encoder and a decoder: a forward of theirs has two inputs, a run here has one."""
    if model.config.is_encoder_decoder:
        raise UnsupportedArchitectureError(
            f"no adapter for {type(model).__name__}, which is an encoder and a decoder",
            reason="its forward takes two inputs, and points and runs here are those of one stack of blocks",
            fix="the decoder alone, where transformers has its class (BartForCausalLM.from_pretrained); or "
            "boot(model, adapter=...) with an adapter of your own",
        )


_PARTIAL = "boot(model, partial=True) for what was found; or "
FAULTS = (AssertionError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError)
"""What a model may raise that is called in parts, or on tokens alone."""


def _said(error: Exception) -> str:
    """Returns what could not be found, or what a model raised when it was called in parts, and where."""
    if isinstance(error, MissingStructureError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {frame.name}: {error}".rstrip(": ")


def _derived(model: "PreTrainedModel", *, partial: bool) -> Structure:
    """Returns a model's structure.

    Raises:
        MissingStructureError: Something that an adapter needs was not found.
    """
    ids = tokens_for(model)
    _check_rows(model)
    trace = traced(model, lambda: model(input_ids=ids, use_cache=False))
    findings = Findings()
    blocks = with_entry(blocks_of(model, trace, ids), trace)
    _say_passed_by(model, blocks, findings)
    way = layout_of(trace, blocks, ids)
    if way is not None:
        trace.hides_heads, trace.turns = NO_HEADS[way.layout], way.layout is Layout.POS_FIRST
    seen, shown = (trace, blocks) if way is None else (way.seen(trace), way.blocks(blocks))
    inward = find_inward(seen, shown, ids, findings)
    outward = find_outward(seen, shown, trace.output.logits, findings)
    layers = [_layer(trace, blocks, layer, findings, partial=partial) for layer in range(len(blocks.visits))]
    _say_heads_once(layers)
    note_needs(trace, blocks.visits, layers)
    unused = _unused(model, trace, blocks)
    _mark_seams(layers, blocks, inward)
    if way is not None:
        lay_out({**inward.parts, **outward}, trace, way)
        for visit, layer in zip(blocks.visits, layers, strict=True):
            lay_out_block(layer, trace, way, visit)
    lists = {f"blocks{number or ''}": GeneralizedComponent(path) for number, path in enumerate(blocks.lists)}
    frame = GeneralizedComponent(submodules={**inward.parts, **lists, **outward})
    account_for_all(model, frame, trace.visits, irrelevant={name.removesuffix(".*") for name in unused})
    kept = {key: part for key, part in frame.submodules.items() if key not in lists or key == "blocks"}
    parts = {**kept, "blocks": PerLayer(layers)}
    numbers = numbers_positions(model, inward)
    return Structure(
        type(model).__name__,
        parts,
        _sizes(model, trace, blocks, inward, layers),
        numbers,
        has_table=has_table(model, blocks, inward),
        irrelevant=unused,
        whole_forwards=_why_whole(model, blocks, trace, way, layers),
        no_generation=_why_not_generated(model, ids, way),
        whole_sequences=why_whole_sequences(model, trace, ids),
        findings=tuple(findings.found),
    )


def _say_passed_by(model: nn.Module, blocks: Blocks, findings: Findings) -> None:
    """Notes the modules of the blocks' list that a text passes by."""
    called = {one.path for one in blocks.visits}
    for path in blocks.lists:
        for name in model.get_submodule(path)._modules:
            if f"{path}.{name}" not in called:
                findings.add("blocks", f"a text passes by {path}.{name}, so that no layer is counted for it")


def _check_rows(model: "PreTrainedModel") -> None:
    """Raises where several rows of token ids, those of codebooks, make one row of the residual stream (MusicGen)."""
    entries = model.config.get_text_config(decoder=True).to_dict()
    books = entries.get("num_codebooks")
    if not isinstance(books, int) or books == 1:
        return
    ids = tokens_for(model)[:1].expand(books, -1)
    try:
        trace = traced(model, lambda: model(input_ids=ids, use_cache=False))
        rows = len(find_blocks(model, trace).first)
    except (MissingStructureError, *FAULTS):
        return
    if rows != books:
        raise MissingStructureError(f"{books} rows of token ids, one of each codebook, make one row of the stream")


def _layer(trace: Trace, blocks: Blocks, layer: int, findings: Findings, *, partial: bool) -> BlockBridge:
    """Returns the template of a layer's block; if part of a structure is enough, of its stream alone if need be."""
    visit, path = blocks.visits[layer], blocks.list_of(layer)
    if blocks.is_reversible:
        findings.add(f"blocks.{layer}", reversible.REASON)
        return StreamBlockBridge(path, reversible.REASON)
    try:
        whole = trace.of(visit) if blocks.is_woven else trace
        by = blocks.multipliers[layer] if blocks.multipliers else 1.0
        entry = blocks.entry if layer == 0 else None
        found = block_template(
            whole, visit, path, findings, f"blocks.{layer}", blocks.streams, multiplier=by, entry=entry
        )
        if blocks.is_woven:
            place_in_weave(found, trace, blocks, layer)
        else:
            found.index = blocks.index_of(layer)
    except (MissingStructureError, *FAULTS) as error:
        if blocks.streams is not None:
            raise
        if not partial:
            raise MissingInBlockError(_said(error)) from error
        found = StreamBlockBridge(path, f"the structure of the block was not found: {_said(error)}")
        found.index = blocks.index_of(layer)
        if blocks.is_woven:
            place_in_weave(found, trace, blocks, layer)
    return found


def _why_whole(
    model: "PreTrainedModel", blocks: Blocks, trace: Trace, way: StreamLayout | None, layers: Sequence[BlockBridge]
) -> str | None:
    """Returns why no block can be run apart from the whole forward, or None if they can."""
    if len({one.path for one in blocks.visits}) < len(blocks.visits):
        return "blocks are called several times in a forward, and such a run could not tell their calls apart"
    if way is not None:
        return f"the stream lies as {way.layout} in the model's own tensors"
    if not reads_tokens(layers) and not takes_embeddings(model, blocks, trace):
        return "the model's forward takes token ids, and no embeddings in their place"
    if blocks.multipliers or blocks.entry is not None:
        return "the model changes the residual stream between blocks, or in the first one before it is added to"
    return None


def _why_not_generated(model: "PreTrainedModel", ids: Tensor, way: StreamLayout | None) -> str | None:
    """Returns why points cannot be followed through a generation, or None if they can."""
    if way is not None and way.layout is Layout.LAST:
        return "its KV cache holds positions before the tokens too, and each step is given the whole sequence"
    if not generates_on(model, ids[:1]):
        return "`generate` runs it on other tokens than those of the sequence"
    return None


def _mark_seams(layers: Sequence[BlockBridge], blocks: Blocks, inward: Inward) -> None:
    """Tells blocks which something else than the block before, or than the embeddings, hands its stream to."""
    for layer, block in enumerate(layers):
        if layer and not blocks.follows(layer):  # in the model's own tensors
            block.seam = SEAM
        elif not layer and not inward.is_all:
            block.seam = FIRST_SEAM


def _sizes(
    model: "PreTrainedModel", trace: Trace, blocks: Blocks, inward: Inward, layers: Sequence[BlockBridge]
) -> Sizes:
    """Returns the sizes that were measured."""
    d_vocab = trace.output.logits.shape[-1]
    found: dict[str, Size] = {"d_model": blocks.first.shape[-1], "n_layers": len(layers), "d_vocab": d_vocab}
    if trace.attended:
        first = trace.attended[0]
        found |= {"n_heads": first.query.shape[1], "d_head": first.query.shape[-1]}
        found |= _n_kv_heads(trace, blocks, layers, first.query.shape[-1])
    found |= _d_mlp(trace, blocks, layers)
    if not _names_activation(trace, layers):
        found["act_fn"] = ()
    found |= _eps(model, trace, blocks, layers)
    embed = inward.parts.get("pos_embed")
    if inward.table is not None and isinstance(embed, PosEmbedBridge) and embed.table is not None:
        rows = inward.table.module.get_parameter(embed.table).shape[0]
        found["n_ctx"] = rows if embed.padding_id is not None else rows - embed.offset
    return found


def _say_heads_once(layers: Sequence[BlockBridge]) -> None:
    """Leaves the number of key and value heads, and heads' width, to the config where all layers have the same."""
    kinds = (AttentionBridge, SharedKeysAttentionBridge)
    attentions = [part for layer in layers for part in layer.submodules.values() if isinstance(part, kinds)]
    for name in ("kv_heads", "d_head"):
        if len({vars(one)[name] for one in attentions}) == 1:
            for one in attentions:
                vars(one)[name] = None


def _unused(model: nn.Module, trace: Trace, blocks: Blocks) -> Mapping[str, str]:
    """Returns parameters and buffers of modules that the forward of a text does not call, and buffers of indices."""
    called = {visit.path for visit in trace.visits}
    within = called | {*blocks.lists}
    found = {}
    for path, module in model.named_modules():
        start = f"{path}." if path else ""
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_floating_point():
                found[start + name] = "indices, which the config fixes"
        parent = path.rpartition(".")[0]
        is_empty = next(iter(module.state_dict()), None) is None
        if not is_empty and parent in within and not any(f"{one}.".startswith(start) for one in called):
            found[f"{start}*"] = "the forward of a text does not call it"
    return found


def _n_kv_heads(trace: Trace, blocks: Blocks, layers: Sequence[BlockBridge], d_head: int) -> dict[str, int]:
    """Returns how many key and value heads the first attention with a map to keys has, if there is one."""
    for visit, layer in zip(blocks.visits, layers, strict=True):
        attn = layer.submodules.get("attn")
        if isinstance(attn, AttentionBridge):
            keys = trace.at(f"{visit.path}.{attn.name}.{attn.submodules['k'].name}")[0].left
            assert keys is not None, "a linear map gives a tensor"
            return {"n_key_value_heads": keys.numel() // (ROWS * POSITIONS * d_head)}
    return {}


def _d_mlp(trace: Trace, blocks: Blocks, layers: Sequence[BlockBridge]) -> dict[str, int]:
    """Returns how many neurons the first dense MLP has, if there is one."""
    for visit, layer in zip(blocks.visits, layers, strict=True):
        mlp = layer.submodules.get("mlp")
        if isinstance(mlp, MLPBridge):
            path = ".".join(name for name in (visit.path, mlp.name, mlp.submodules["out"].name) if name)
            hidden = trace.at(path)[0].entered
            assert hidden is not None, "a linear map takes a tensor"
            return {"d_mlp": hidden.shape[-1]}
    return {}


def _names_activation(trace: Trace, layers: Sequence[BlockBridge]) -> bool:
    """Whether an MLP or experts have the activation function that the config may name."""
    if any(isinstance(layer.submodules.get("mlp"), MLPBridge) for layer in layers):
        return True
    return any("act_fn" in vars(visit.module) or "act_fn" in visit.module._modules for visit in trace.visits)


def _eps(model: "PreTrainedModel", trace: Trace, blocks: Blocks, layers: Sequence[BlockBridge]) -> dict[str, Size]:
    """Returns what the first norm of the stream adds to the variance: the config's entry for it, or the number."""
    config = model.config.get_text_config(decoder=True).to_dict()
    for key, part in layers[0].submodules.items():
        if key.startswith("ln") and isinstance(part, NormalizationBridge):
            inner = part.submodules.get("norm")  # of a gated norm
            path = ".".join(str(one.name) for one in (part, inner) if one is not None)
            eps = eps_of(trace.at(f"{blocks.visits[0].path}.{path}")[0].module)
            names = [name for name, value in config.items() if name.endswith(EPSILONS) and value == eps]
            return {"eps": (names[0],) if names else eps}
    return {}


EPSILONS = ("eps", "epsilon")
"""Ends of the names of entries that say what norms add to the variance."""
