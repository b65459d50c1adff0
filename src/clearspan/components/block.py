"""Transformer blocks: stages of sublayers on the residual stream."""

import itertools
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor

from clearspan.components.attention import GeneralAttentionBridge, HeadAttentionBridge, PathInputs
from clearspan.components.base import Binding, GeneralizedComponent
from clearspan.components.beside import MLPBesideMixtureBridge, MLPBesideMixtureInput
from clearspan.components.factors import BlockParameter, Factor, Offset, Scale, Terms, is_one, value_of
from clearspan.components.mlp import MLPBridge
from clearspan.components.normalization import NormalizationBridge
from clearspan.components.opaque_attention import OpaqueAttentionBridge
from clearspan.components.remainder import RemainderBridge
from clearspan.components.sublayer import (
    Sublayer,
    SublayerInput,
    SublayerKind,
    part_kind,
    projection_input,
    required_kind,
    stream_at,
)
from clearspan.components.weights import LinearMap
from clearspan.conversions import ScaledConversion
from clearspan.errors import AdapterError, MissingPartError
from clearspan.points import VOCABULARY, Converted, Derived, HookPoint, InPlace, Place, Side

Stages = tuple[tuple[str, ...], ...]
"""Names of sublayers: those of one stage read the same residual stream."""
SEQUENTIAL: Stages = (("attn",), ("mlp",))
PARALLEL: Stages = (("attn", "mlp"),)


@dataclass(frozen=True)
class Identity:
    """A sum of points that equals another point, by the model's own arithmetic.

    Attributes:
        terms: Names of the points that are added.
        total: Name of the point that equals their sum.
        scale: What the first term is multiplied by.
    """

    terms: tuple[str, ...]
    total: str
    scale: Scale = 1.0

    def added(self, values: Mapping[str, Tensor]) -> Tensor:
        """Returns the sum of the terms' values."""
        first, *others = (values[name] for name in self.terms)
        return sum(others, first if is_one(self.scale) else first * value_of(self.scale))

    def __str__(self) -> str:
        first, *others = self.terms
        scaled = first if is_one(self.scale) else f"{first} * {_written(self.scale)}"
        return f"{' + '.join([scaled, *others])} == {self.total}"


def _written(scale: Scale) -> str:
    return scale.path if isinstance(scale, BlockParameter) else f"{scale:g}"


@dataclass(eq=False, repr=False)
class BlockBridge(GeneralizedComponent):
    """A block: stages of sublayers, its submodules `attn`, `mlp`, `mixer`, `attn2`, ..., and norms around them.

    In a mapping it stands for all blocks, and its name is the path of their list. Sublayers of one stage read the same
    residual stream, and their contributions are added to it; `hook_resid_mid`, `hook_resid_mid2`, ... lie between the
    stages. The first sublayer of a stage is the one that the model runs first.

    Norms before sublayers are `ln1`, `ln2`, ...: one for each stage, or, where there are more of them than stages, one
    for each sublayer. `ln1_post`, `ln2_post`, ... are norms on the sublayers' outputs, one for each sublayer.

    Attributes:
        stages: Names of the sublayers, stage by stage.
        is_parallel: Whether all sublayers read the same residual stream. `is_parallel=True` stands for
            `stages=(("attn", "mlp"),)`.
        norms: Sublayers whose norm has another name than the rule says, each with the norm's.
        outs: Sublayers whose contribution is another module's output, each with that module's path in the block.
        attn_out: Short for `outs={"attn": ...}`.
        mlp_out: Short for `outs={"mlp": ...}`.
        added_with: Sublayers that are added after a later stage than the one that they read, each with a sublayer that
            is added there: a shortcut past the stages between.
        residual_multiplier: What the block multiplies contributions by: all, or each by its sublayer's name. A number,
            or the path in the block of a parameter `[d_model]`.
        stream_multiplier: What the block multiplies the stream by before it adds, for all stages or each.
        residual_offset: Sublayers to whose contribution the block adds a vector, after the multiplier, each with its
            terms: sums of products of parameters `[d_model]`, by their paths in the block. What it adds to the stream
            outside of contributions is among these, so that the stream is a sum (ZAYA).
        stream_dtype: The stream's dtype, where it is not the model's (ZAYA keeps it in float32), or None.
        stream_outs: Paths in the block of the modules whose outputs are the stream before the second stage and those
            after it, where norms read a copy of it in another precision; none where they read the stream itself.
        input_multipliers: Sublayers whose input the block multiplies, after the norm, each with the number.
        fed_by: Sublayers that read a sum of the stream and of what further parts of the block make (Zamba's shared
            transformer), each with those parts in the order of the forward: the output of the last one is added. They
            add nothing to the stream.
        begins_at: Path in the block of the norm whose output is the stream that enters, where the block's own input is
            what that norms (RWKV's first block); None where the input is the stream.
        post_multiplier: What the model multiplies the block's output by, which then is the stream that leaves (RWKV).
            The last stage's multipliers say it too.
        norms_the_sum: Whether `ln1`, `ln2`, ... come after a stage, on its sum with the residual stream.
        residual_is_normed: Whether the residual branch takes the norm's output.
        reads_copies: Sublayers that are given a copy of the stream, where norms come after stages (X-MOD gives an
            adapter the rows of its language): the stream is written at the norm's output then.
        index: Its place in the list at `name`, where that is not its layer: a block is called several times in a
            forward, or blocks are in several lists.
        seam: Why the stream that enters is not the one that left the block before, or, of the first block, not the sum
            of the embeddings; empty where it is.
    """

    _: KW_ONLY
    stages: Stages = SEQUENTIAL
    is_parallel: bool = False
    norms: Mapping[str, str] = field(default_factory=dict)
    outs: Mapping[str, str] = field(default_factory=dict)
    attn_out: str | None = None
    mlp_out: str | None = None
    added_with: Mapping[str, str] = field(default_factory=dict)
    residual_multiplier: Factor | Mapping[str, Factor] = 1.0
    stream_multiplier: Factor | Sequence[Factor] = 1.0
    residual_offset: Mapping[str, Terms] = field(default_factory=dict)
    stream_dtype: torch.dtype | None = None
    stream_outs: Sequence[str] = ()
    input_multipliers: Mapping[str, float] = field(default_factory=dict)
    fed_by: Mapping[str, Sequence[str]] = field(default_factory=dict)
    begins_at: str | None = None
    post_multiplier: float = 1.0
    norms_the_sum: bool = False
    residual_is_normed: bool = False
    reads_copies: tuple[str, ...] = ()
    index: int | None = None
    seam: str = ""

    sublayers: tuple[Sublayer, ...] = field(init=False, default=())
    """Those of a live block, stage by stage."""
    _made_parallel: bool = field(init=False, default=False)
    ln1: NormalizationBridge = field(init=False)
    attn: HeadAttentionBridge = field(init=False)
    ln2: NormalizationBridge = field(init=False)
    mlp: MLPBridge = field(init=False)
    hook_resid_pre: HookPoint = field(init=False)
    hook_attn_in: HookPoint = field(init=False)
    hook_q_input: HookPoint = field(init=False)
    hook_k_input: HookPoint = field(init=False)
    hook_v_input: HookPoint = field(init=False)
    hook_attn_out: HookPoint = field(init=False)
    hook_resid_mid: HookPoint = field(init=False)
    hook_mlp_in: HookPoint = field(init=False)
    hook_mlp_out: HookPoint = field(init=False)
    hook_resid_post: HookPoint = field(init=False)
    _shown = ("identities", "is_parallel", "layer_type", "stages", "sublayers")

    def __post_init__(self) -> None:
        if self.is_parallel and self.stages == SEQUENTIAL:
            self.stages = PARALLEL
        self.is_parallel = self._made_parallel = self._is_one_stage
        short = {"attn": self.attn_out, "mlp": self.mlp_out}
        self.outs = {**{name: path for name, path in short.items() if path}, **self.outs}
        named = {
            *self.norms,
            *self.outs,
            *self.reads_copies,
            *self.added_with,
            *self.added_with.values(),
            *self.residual_offset,
            *self.input_multipliers,
            *self.fed_by,
        }
        if isinstance(self.residual_multiplier, Mapping):
            named |= {*self.residual_multiplier}
        unknown, flat = named - {*self.sublayer_names}, self.sublayer_names
        if not all(self.stages) or len({*flat}) != len(flat) or not flat or unknown:
            raise AdapterError(
                f"no block has the stages {self.stages!r}"
                if not unknown
                else f"the block has no sublayer {', '.join(sorted(unknown))}",
                expected="names of sublayers, each once, in stages that are not empty"
                if not unknown
                else ", ".join(flat),
                fix='BlockBridge(stages=(("attn",), ("mlp",)), ...)',
            )

    @property
    def _is_one_stage(self) -> bool:
        return len(self.stages) == 1 and len(self.stages[0]) > 1

    @property
    def sublayer_names(self) -> tuple[str, ...]:
        """Names of the sublayers, stage by stage."""
        return tuple(itertools.chain.from_iterable(self.stages))

    @property
    def layer_type(self) -> str:
        """Names of the sublayers: `+` joins those of a stage, and stages follow one another: `"attn+mixer, mlp"`.

        Before a sublayer that other parts feed stand their names: `"attn > mlp > mixer"`.
        """
        return ", ".join("+".join(map(self._with_feeders, stage)) for stage in self.stages)

    def _with_feeders(self, name: str) -> str:
        feeders = (one for one in self.fed_by.get(name, ()) if part_kind(one) != "mixer")
        return " > ".join([*feeders, name])

    # --- template and life -------------------------------------------------------------------------------------------

    def at_layer(self, layer: int) -> Self:
        """Returns the template of one layer."""
        own = cast("Self", super().at_layer(layer))
        own.name = f"{self.name}.{layer if self.index is None else self.index}"
        return own

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, with the key and value heads of this block's attention."""
        first = next(iter(self.attentions), None)
        return {**super().sizes(), **({} if first is None else {"kv_head": first.n_kv_heads})}

    def required(self) -> Mapping[str, type[GeneralizedComponent]]:
        """Returns the sublayers, and the norms that are there."""
        norms = {key for key in self.submodules if _NORM.fullmatch(key) or key in self.norms.values()}
        parts = {name: required_kind(name, self.submodules.get(name)) for name in self.sublayer_names}
        parts |= dict.fromkeys(self._feeders, GeneralizedComponent)
        return {**parts, **dict.fromkeys(sorted({*norms, *self.norms.values()}), NormalizationBridge)}

    def bind(self, binding: Binding, path: str, parent: str = "") -> Self:
        """Returns the live block.

        Raises:
            AdapterError: A part is not where the template says, or `is_parallel` was set on a finished block.
        """
        if self.is_parallel != self._made_parallel:
            raise AdapterError(
                f"is_parallel={self.is_parallel} was set on a block with the stages {self.stages!r}",
                where=path,
                reason="stages say which sublayers read the same stream, and follow from is_parallel only at first",
                fix='BlockBridge(is_parallel=True, ...), or stages=(("attn", "mlp"),)',
            )
        live = super().bind(binding, path, parent)
        live.is_parallel = self._is_one_stage  # stages may have been set
        live.sublayers = tuple(live._sublayers())
        return live

    def _sublayers(self) -> Iterator[Sublayer]:
        stage_of = {name: number for number, stage in enumerate(self.stages) for name in stage}
        before = {} if self.norms_the_sum else {name: self._norm_name(name) for name in stage_of}
        for index, name in enumerate(self.sublayer_names):
            norm, stage = before.get(name), self.stages[stage_of[name]]
            yield Sublayer(
                name,
                self.submodules[name],
                self.path,
                stage_of[name],
                stage_of[self.added_with.get(name, name)],
                self._norm(norm),
                self._norm(self._norm_after(index, name)),
                norm in self.submodules and any(before.get(other) == norm for other in stage if other != name),
                self.input_multipliers.get(name, 1.0),
                self._scale(self._contribution_factor(name)),
                self._known(self.outs[name]) if name in self.outs else None,
                Offset.of(self._bound.model, self.residual_offset.get(name, ()), f"{self.module_path}."),
            )

    def _norm_after(self, index: int, name: str) -> str:
        """Returns the name of the norm on a sublayer's output, whether the block has it or not."""
        return f"ln{index + 1}_post"

    def _norm_name(self, name: str) -> str:
        """Returns the name of the norm before a sublayer, whether the block has it or not."""
        if name in self.norms:
            return self.norms[name]
        numbers = [int(found[1]) for key in self.submodules if (found := _NORM.fullmatch(key)) and not found[2]]
        if max(numbers, default=0) > len(self.stages):
            return f"ln{self.sublayer_names.index(name) + 1}"
        return f"ln{next(number for number, stage in enumerate(self.stages) if name in stage) + 1}"

    def _norm(self, name: str | None) -> NormalizationBridge | None:
        return cast("NormalizationBridge | None", self.submodules.get(name or ""))

    def _contribution_factor(self, name: str) -> Factor:
        factor = self.residual_multiplier
        return factor.get(name, 1.0) if isinstance(factor, Mapping) else factor

    def _stream_scale(self, stage: int) -> Scale:
        factor = self.stream_multiplier
        return self._scale(factor if isinstance(factor, float | int | str) else factor[stage])

    def _scale(self, factor: Factor) -> Scale:
        if not isinstance(factor, str):
            return float(factor)
        return BlockParameter(weakref.ref(self._bound.model), f"{self.module_path}.{factor}")

    def _known(self, path: str) -> Place:
        """Returns a module's output as the component of that module describes it, if there is one."""
        named = Place(f"{self.module_path}.{path}", Side.OUTPUT, layout=self.layout, call=self.call)
        parts = {part.module_path: part for part in self.walk() if part.name is not None}
        return parts[named.module].place(Side.OUTPUT) if named.module in parts else named

    def claims(self) -> Iterator[str]:
        """Yields the parameters by which the block multiplies, and those that it adds."""
        yield from super().claims()
        scales = [*(sub.scale for sub in self.sublayers), *map(self._stream_scale, range(len(self.stages)))]
        factors = (scale.path for scale in scales if isinstance(scale, BlockParameter))
        added = (path for sublayer in self.sublayers if sublayer.offset for path in sublayer.offset.paths)
        yield from dict.fromkeys((*factors, *added))

    def __getattr__(self, name: str) -> NoReturn:
        """Raises for a sublayer that other blocks have, with the reason."""
        reason = None if name.startswith("_") or self._binding is None else self.why_without(name)
        if reason is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise MissingPartError(
            f"{self.path} has no {name}",
            got=", ".join(self.submodules),
            reason=reason,
            fix="bridge.layer_types() lists what each layer has",
        )

    # --- sublayers ---------------------------------------------------------------------------------------------------

    def sublayer(self, name: str) -> Sublayer:
        """Returns a sublayer.

        Raises:
            MissingPartError: The block has no such sublayer.
        """
        for sublayer in self.sublayers:
            if sublayer.name == name:
                return sublayer
        raise MissingPartError(
            f"{self.path} has no {name}",
            got=", ".join(self.sublayer_names),
            reason=self.why_without(name),
            fix="bridge.layer_types() lists what each layer has",
        )

    def reader(self, *, mlp_input: bool) -> Sublayer:
        """Returns the sublayer that reads the stream first, or the block's first MLP.

        Raises:
            MissingPartError: The block has no MLP.
        """
        if not mlp_input:
            return self.sublayers[0]
        return next(iter(self.of_kind("mlp")), None) or self.sublayer("mlp")

    def of_kind(self, kind: SublayerKind) -> tuple[Sublayer, ...]:
        """Returns the sublayers of a kind."""
        return tuple(sublayer for sublayer in self.sublayers if sublayer.kind == kind)

    @property
    def attentions(self) -> tuple[GeneralAttentionBridge, ...]:
        """Its attentions, in the order of the forward; none in a block without heads."""
        parts = (sublayer.part for sublayer in self.sublayers)
        return tuple(part for part in parts if isinstance(part, GeneralAttentionBridge))

    @property
    def _feeders(self) -> tuple[str, ...]:
        """Names of the parts that feed sublayers, and add nothing to the stream."""
        return tuple(itertools.chain.from_iterable(self.fed_by.values()))

    @property
    def feeders(self) -> tuple[GeneralizedComponent, ...]:
        """The parts that feed sublayers, and add nothing to the stream, in the order of the forward."""
        return tuple(self.submodules[name] for name in self._feeders)

    @property
    def in_order_of_adding(self) -> tuple[Sublayer, ...]:
        """Its sublayers in the order in which they are added to the stream."""
        return tuple(sorted(self.sublayers, key=lambda sublayer: sublayer.adds_at))

    def stream_before(self, stage: int) -> str:
        """Returns the name of the point with the stream that a stage reads; of the stream that leaves the last one."""
        return f"{self.path}.{'hook_resid_post' if stage == len(self.stages) else stream_at(stage)}"

    @property
    def enters(self) -> str:
        """Name of the point with the residual that enters the block."""
        return f"{self.path}.hook_resid_pre"

    @property
    def leaves(self) -> str:
        """Name of the point with the residual that leaves the block."""
        return f"{self.path}.hook_resid_post"

    @property
    def is_sum(self) -> bool:
        """Whether the stream after the block is the one that left the block before plus what the sublayers add."""
        scales = map(self._stream_scale, range(len(self.stages)))
        return not self.seam and not self.norms_the_sum and not self.residual_is_normed and all(map(is_one, scales))

    @property
    def keeps_directions(self) -> bool:
        """Whether the stream after the block is a number times the one before plus what the sublayers add."""
        if self.seam or self.norms_the_sum or self.residual_is_normed:
            return False
        factors = (value_of(self._stream_scale(stage)) for stage in range(len(self.stages)))
        return all(not isinstance(factor, Tensor) or factor.numel() == 1 for factor in factors)

    @property
    def stream_shape(self) -> tuple[int, ...]:
        """The sizes of the residual behind rows and positions."""
        return (self._fixed.d_model,)

    @property
    def raw_stream(self) -> Callable[[Tensor], Tensor]:
        """Makes of a residual `[batch, pos, ...]` what the block takes; it does not refer to the block."""
        return _as_it_is

    @property
    def shown_stream(self) -> Callable[[Tensor], Tensor]:
        """Makes of what the block takes or gives a residual `[batch, pos, ...]`."""
        return _as_it_is

    def call_arguments(self, value: Tensor) -> dict[str, Any]:
        """Returns what its attention needs."""
        for attention in self.attentions:
            if attention.requires_attention_mask:
                return attention.call_arguments(value)
        return self._bound.arguments_of(self.module, value)

    # --- points ------------------------------------------------------------------------------------------------------

    def points(self) -> Iterator[HookPoint]:
        """Yields the points of the residual stream, and what each sublayer reads from it and adds to it."""
        entering = self.place(Side.INPUT) if self.begins_at is None else self._known(self.begins_at)
        yield self.point("hook_resid_pre", entering)
        for stage, here in itertools.groupby(self.sublayers, lambda sublayer: sublayer.stage):
            for number, sublayer in enumerate(here):
                if stage and not number:
                    yield self._stream_point(stage, sublayer)
                yield from self._inputs(sublayer)
                yield self.point(_leaf(sublayer.hook_out), sublayer.adds, sublayer.added)
        leaving = None if self.post_multiplier == 1 else Converted(ScaledConversion(self.post_multiplier))
        yield self.point("hook_resid_post", self.place(Side.OUTPUT), leaving)

    def _stream_point(self, stage: int, first: Sublayer) -> HookPoint:
        """Returns the point of the stream before a stage, whose first sublayer is `first`."""
        name = _leaf(self.stream_before(stage))
        if first.name in self.reads_copies:
            return self.point(name, self.submodules[f"ln{stage}"].place(Side.OUTPUT))
        if self.stream_outs:
            return self.point(name, self._known(self.stream_outs[stage - 1]))
        return self.point(name, first.reads, InPlace())

    def _inputs(self, sublayer: Sublayer) -> Iterator[HookPoint]:
        """Yields the points of what a sublayer reads."""
        name = _leaf(sublayer.hook_in)
        if isinstance(sublayer.part, OpaqueAttentionBridge):
            return  # what its heads read is not known
        if isinstance(sublayer.part, GeneralAttentionBridge):
            inputs = PathInputs(sublayer.part, sublayer.entering())
            for part in inputs.parts:
                own = name if part == "attn_in" else projection_input(sublayer.name, part.removesuffix("_input"))
                yield self.point(own, sublayer.reads, Derived(inputs, part))
        elif isinstance(sublayer.part, MLPBesideMixtureBridge) and sublayer.norm is not None:
            yield self.point(
                name, sublayer.reads, Derived(own := MLPBesideMixtureInput(sublayer.part, sublayer.norm), own.PART)
            )
        elif sublayer.shares_norm:
            yield self.point(name, sublayer.reads, Derived(SublayerInput(sublayer), SublayerInput.PART))
        elif sublayer.norm is None and sublayer.input_factor != 1:
            yield self.point(name, sublayer.reads, Converted(ScaledConversion(1 / sublayer.input_factor)))
        else:
            yield self.point(name, sublayer.reads)

    # --- what processing asks ----------------------------------------------------------------------------------------

    def folds(self) -> Iterator[tuple[NormalizationBridge, list[LinearMap]]]:
        """Yields the norms that only linear maps read, each with these maps.

        A norm whose output is the residual stream, or is added to it, is left out.
        """
        if self.residual_is_normed:
            return
        readers: dict[NormalizationBridge, list[list[LinearMap]]] = {}
        for sublayer in self.sublayers:
            if sublayer.norm is not None:
                others = any(isinstance(part, RemainderBridge) and part.reads_stream for part in sublayer.part.walk())
                readers.setdefault(sublayer.norm, []).append([] if others else list(sublayer.part.reads()))
        for norm, maps in readers.items():
            if all(maps) and norm.is_linear_at_scale:
                yield norm, list(itertools.chain.from_iterable(maps))

    def unfolded(self) -> Iterator[NormalizationBridge]:
        """Yields the norms that stay as they are because of a part of which it is not known what reads its input."""
        if self.residual_is_normed:
            return
        folded = [norm for norm, _ in self.folds()]
        norms = (sublayer.norm for sublayer in self.sublayers)
        yield from (norm for norm in dict.fromkeys(norms) if norm is not None and norm not in folded)

    @property
    def centres(self) -> bool:
        """Whether every reader of the residual stream in the block subtracts its mean first."""
        if self.residual_is_normed or self.norms_the_sum or self.fed_by:
            return False
        return all(
            sublayer.norm is not None and not sublayer.norm.uses_rms_norm and sublayer.norm_after is None
            for sublayer in self.sublayers
        )

    # --- what is absent, and what holds ------------------------------------------------------------------------------

    def why_without(self, name: str) -> str | None:
        """Returns why the block lacks a sublayer, or None where it has it or no block has such a part."""
        if name in self.submodules or name.rstrip("0123456789") not in ("attn", "mlp", "mixer", "moe", "ple", "laurel"):
            return None
        layer, names = self.path.rpartition(".")[2], self.sublayer_names
        kind, kinds = part_kind(name), {part_kind(other) for other in names}
        has = " and ".join(dict.fromkeys(_NOUNS[part_kind(other)] for other in names))
        if kind in kinds:
            there = [other for other in names if part_kind(other) == kind]
            return f"layer {layer} has {' and '.join(there)}, and no {name}"
        if kind == "attn" and "mixer" in kinds:
            return f"layer {layer} has a mixer in place of attention"
        return f"layer {layer} has {has}{' alone' if len(names) == 1 else ''}, and no {name}"

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields the points of sublayers and norms that other blocks have."""
        if self.is_parallel and "ln2" not in self.submodules and "ln1" in self.submodules:
            who = "attention and MLP" if self.stages == PARALLEL else " and ".join(self.sublayer_names)
            for name in ("hook_scale", "hook_normalized"):
                yield f"{self.path}.ln2.{name}", f"{who} share the norm ln1"
        if len(self.sublayers) == 1:
            only = f"{self.sublayer_names[0]} is all that the block has: no residual stream lies inside it"
            yield f"{self.path}.hook_resid_mid", only
        for fed, feeders in self.fed_by.items():
            for name in feeders:
                ends = [f"hook_{name}_in", f"hook_{name}_out"]
                ends += [projection_input(name, one) for one in "qkv"] if part_kind(name) == "attn" else []
                reason = f"{name} adds nothing to the residual stream: what it gives becomes a part of what {fed} reads"
                yield from ((f"{self.path}.{leaf}", reason) for leaf in ends)
        for kind in ("attn", "mlp", "mixer"):
            is_usual = kind == "mixer" and self.of_kind("attn")  # which the vocabulary says
            if kind not in self._feeders and kind not in self.sublayer_names and not is_usual:
                reason = self.why_without(kind)
                assert reason is not None, "the block lacks it"
                yield from ((name, reason) for name in _points_of(kind, self.path))

    def identities(self) -> Iterator[Identity]:
        """Yields the sums that make up the residual stream in this block."""
        for stage in range(len(self.stages)):
            before, after = self.stream_before(stage), self.stream_before(stage + 1)
            for sublayer in self.sublayers:
                fed = [f"{self.path}.{name}.hook_out" for name in self.fed_by.get(sublayer.name, ())[-1:]]
                if sublayer.stage == stage and sublayer.reads_at != before:
                    yield Identity((before, *fed), sublayer.reads_at)
            added = [sublayer.hook_out for sublayer in self.sublayers if sublayer.adds_at == stage]
            for sublayer in self.sublayers:
                if (
                    isinstance(sublayer.part, MLPBesideMixtureBridge)
                    and sublayer.norm_after
                    and sublayer.stage == stage
                ):
                    yield Identity(sublayer.part.summands, f"{sublayer.norm_after.path}.hook_in")
            norm, scale = f"{self.path}.ln{stage + 1}", self._stream_scale(stage)
            if self.norms_the_sum:
                yield Identity((before, *added), f"{norm}.hook_in", scale)
                yield Identity((f"{norm}.hook_out",), after)
            elif self.residual_is_normed:
                yield Identity((f"{norm}.hook_out", *added), after, scale)
            else:
                yield Identity((before, *added), after, scale)


_NORM = re.compile(r"ln(\d+)(_post)?")
_NOUNS: Mapping[SublayerKind, str] = {"attn": "attention", "mlp": "an MLP", "mixer": "a mixer"}


def _as_it_is(residual: Tensor) -> Tensor:
    return residual


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _points_of(kind: SublayerKind, block: str) -> Iterator[str]:
    """Yields the names of the vocabulary that only a sublayer of a kind has, in some block."""
    inputs = ("hook_q_input", "hook_k_input", "hook_v_input") if kind == "attn" else ()
    own = (f"hook_{kind}_in", f"hook_{kind}_out", *inputs)
    for entry in VOCABULARY:
        address = entry.name.removeprefix("blocks.{l}.")
        if address in own or address.startswith(f"{kind}."):
            yield f"{block}.{address}"
