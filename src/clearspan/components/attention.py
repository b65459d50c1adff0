"""Attention: queries, keys, values, scores, patterns and what each head adds."""

import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clearspan.components.base import Binding, GeneralizedComponent, causal_mask
from clearspan.components.linear import LinearBridge
from clearspan.components.normalization import NormalizationBridge
from clearspan.components.weights import LinearMap, Weight, write_through
from clearspan.conversions import (
    GateActivation,
    GateConversion,
    HeadPartConversion,
    HeadsConversion,
    QKVConversionRule,
    QKVPartConversion,
    RearrangeTensorConversion,
)
from clearspan.errors import ConflictingWritesError
from clearspan.points import Access, Converted, Derivation, Derived, HookPoint, Layout, Place, Side, Whole, read
from clearspan.tree import module_at

Projection = Literal["q", "k", "v"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


@dataclass(eq=False, repr=False)
class GeneralAttentionBridge(GeneralizedComponent):
    """What all kinds of attention have: projections, heads, and an output projection `o`.

    Its parts are the projections, `o`, and, where the model has them, `q_norm` and `k_norm`, and `o_norm` for a norm of
    z before the output projection (BitNet).

    Attributes:
        has_rotary: Whether positions are rotated into queries and keys.
        gate_activation: The function of a gate that multiplies z before the output projection, or None without a gate.
            The gate comes from a part `gate`, a linear map of attention's input.
        gate_is_of_head: Whether the gate is one number for each head, not one for each channel (LaGuna).
        gate_in_queries: Whether the gate has no map of its own, but is the second half of each head's channels in the
            query map's output (Qwen3-Next).
        norms_rotated: Whether norms on queries and keys come after the rotation (nanochat, LLaMA 4), not before it.
        requires_attention_mask: Whether the module masks causally only when it is given a mask.
        attention_mask_4d: Whether that mask must be the additive `[batch, 1, q_pos, k_pos]`.
        repeats_keys: Whether the model repeats keys for all heads before the product.
        has_sinks: Whether a sink, which is no key, takes a share of each query's attention.
        has_alibi: Whether positions are a bias on scores that grows with the distance.
        joins_heads: Whether rows and heads share an axis where queries and keys are multiplied, so that scores and
            pattern are `[batch*head, q_pos, k_pos]` (XGLM, MVP).
        d_head_v: Channels of a head's value, and of z, where they are not those of queries and keys (MiMo); None where
            they are.
        value_scale: What the model multiplies values by after projecting them: `hook_v` and `W_V` are without it.
        kv_heads: Key and value heads of this layer, where layers differ; None where the config says it for all.
        d_head: Channels of a head's query and key in this layer, where layers differ (Gemma 4); None where the config
            says it for all.
        sink_scales_z: Whether the sink's share is taken from the product of pattern and values, and not from the
            pattern: rows of the pattern then sum to one, and z is the product times one number for each query and head
            (Granite SWA).
        scales_queries: Whether the model multiplies queries by a number of their position (LLaMA 4): `hook_rot_q` has
            it, and `hook_q` does not.
        bounds_values: Whether what heads find does not grow with values: they are clamped (DBRX), or a mask is made of
            them (Doge).
        joins_operands: Whether they share an axis in queries and keys alone, and not in scores and pattern
            (GPT-NeoX-Japanese).
        core: Path, in attention's module, of the module that multiplies queries and keys (BERT: `self`, with `o` at
            `output.dense`); empty where attention's module does it.
        d_input: Width of what it reads, where that is not the residual stream's: two vectors side by side (Zamba).
        norms_input: Whether the norm before attention is inside its module, so that the projections read the norm's
            output, and attention's own input is the residual stream (MegatronBERT).
    """

    _: KW_ONLY
    has_rotary: bool = False
    gate_activation: GateActivation | None = None
    gate_is_of_head: bool = False
    gate_in_queries: bool = False
    norms_rotated: bool = False
    requires_attention_mask: bool = False
    attention_mask_4d: bool = False
    repeats_keys: bool = False
    has_sinks: bool = False
    has_alibi: bool = False
    d_head_v: int | None = None
    value_scale: float = 1.0
    kv_heads: int | None = None
    d_head: int | None = None
    sink_scales_z: bool = False
    scales_queries: bool = False
    bounds_values: bool = False
    joins_heads: bool = False
    joins_operands: bool = False
    core: str = ""
    d_input: int | None = None
    norms_input: bool = False

    hook_q: HookPoint = field(init=False)
    hook_k: HookPoint = field(init=False)
    hook_v: HookPoint = field(init=False)
    hook_rot_q: HookPoint = field(init=False)
    hook_rot_k: HookPoint = field(init=False)
    hook_attn_scores: HookPoint = field(init=False)
    hook_pattern: HookPoint = field(init=False)
    hook_z: HookPoint = field(init=False)
    hook_gate: HookPoint = field(init=False)
    hook_o_in: HookPoint = field(init=False)
    hook_result: HookPoint = field(init=False)
    o: LinearBridge = field(init=False)
    _shown = ("has_rotary", "has_sinks", "n_heads", "n_kv_heads")
    _query_axes = "batch pos head d_head"
    _key_axes = "batch pos kv_head d_head"
    _value_axes = "batch pos head d_head"

    def claims(self) -> Iterator[str]:
        """Yields the sinks, a parameter of attention's own module."""
        yield from super().claims()
        if self.has_sinks:
            yield f"{self.core_path}.sinks"

    @property
    def core_path(self) -> str:
        """Path, in the model, of the module that multiplies queries and keys."""
        return f"{self.module_path}.{self.core}" if self.core else self.module_path

    @property
    def core_module(self) -> nn.Module:
        """The Hugging Face module that multiplies queries and keys."""
        return module_at(self._bound.model, self.core_path)

    def reader(self, projection: Projection) -> GeneralizedComponent:
        """Returns the part whose input a projection reads: attention itself, unless a norm lies in it before them."""
        return self.first_map(projection) if self.norms_input else self

    @abstractmethod
    def first_map(self, projection: Projection) -> LinearBridge:
        """Returns the first linear map that queries, keys or values pass."""

    def __post_init__(self) -> None:
        if self.d_head_v is not None:
            self._value_axes = "batch pos head d_head_v"
        if self.d_input is not None:
            self.input_axes = "batch pos width"

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, with this layer's own heads."""
        own = {"kv_head": self.n_kv_heads, "d_head": self.head_width, "d_head_v": self.d_head_v, "width": self.d_input}
        return {**super().sizes(), **{axis: size for axis, size in own.items() if size is not None}}

    def bind(self, binding: Binding, path: str, parent: str = "") -> Self:
        """Returns the live attention, whose norms know its heads."""
        live = super().bind(binding, path, parent)
        for part in live.submodules.values():
            if isinstance(part, NormalizationBridge):
                part.of_heads = {"kv_head": live.n_kv_heads, "d_head": live.head_width}
        return live

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return self._fixed.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self._fixed.n_key_value_heads or self._fixed.n_heads

    @property
    def head_width(self) -> int:
        """Channels of a head's query and key."""
        return self.d_head or self._fixed.d_head

    @Weight
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """The output weight `[head, d_head, d_model]`, a view of the live parameter."""
        return self._converted("o", self.o.matrix)

    @Weight
    def b_O(self) -> Float[Tensor, "d_model"]:
        """The output bias `[d_model]`, the live parameter."""
        return self.o.weight("bias")

    def _converted(self, key: str, weight: Tensor) -> Tensor:
        if self.kv_heads is not None and key in ("k", "v"):
            own = RearrangeTensorConversion("(n h) m -> n m h", n=self.kv_heads)
            return write_through(own.handle_conversion(weight), weight, own.revert)
        layer = self.path.split(".")[1]
        template = self.path.replace(f".{layer}.", ".{i}.", 1)
        known = self._bound.weight_conversions
        conversion = known.get(f"{self.path}.{key}.weight") or known[f"{template}.{key}.weight"]
        return write_through(conversion.convert(weight), weight, conversion.revert)

    @property
    @abstractmethod
    def path_projections(self) -> tuple[Projection, ...]:
        """The projections that read the residual stream each on its own, so that one can be given another input."""

    @abstractmethod
    def projected(self, projection: Projection) -> tuple[Place, Access]:
        """Returns where a projection's values are, and how to read them by head."""

    def projection_weights(self) -> tuple[Tensor, ...]:
        """Returns the live weights of all linear maps except the output projection."""
        parts = (part for part in self.walk() if isinstance(part, LinearBridge) and part is not self.o)
        return tuple(part.checked_parameter("weight") for part in parts)

    def reads(self) -> Iterator[LinearMap]:
        """Yields the maps that read attention's input."""
        for part in self.submodules.values():
            if isinstance(part, LinearBridge) and part is not self.o:
                yield part.map

    def adds(self) -> Iterator[LinearMap]:
        """Yields the output projection."""
        yield self.o.map

    @abstractmethod
    def project(self, value: Tensor, projection: Projection) -> Tensor:
        """Returns queries, keys or values by head for an input by head, `[batch, pos, head, d_model]`."""

    def before_heads(self, value: Tensor, projection: Projection) -> Tensor:
        """Returns the input of a projection's last linear map, for an input of attention."""
        return value

    def call_arguments(self, value: Tensor) -> dict[str, Any]:
        """Returns the causal mask that the adapter declares, or else all that the model itself would pass."""
        if not self.requires_attention_mask:
            return self._bound.arguments_of(self.module, value)
        if not self.attention_mask_4d:
            return {"attention_mask": torch.ones(value.shape[:2], dtype=torch.long, device=value.device)}
        return {"attention_mask": causal_mask(value.shape[1], value.dtype, value.device)}

    def inside(self, side: Side) -> Place:
        """Returns a place inside attention."""
        by_head = side in (Side.QUERY, Side.KEY, Side.VALUE)
        apart = Layout.HEADS_FIRST if by_head else Layout.ROWS_BY_ROWS
        joined = Layout.JOINED_HEADS if by_head else Layout.JOINED_SQUARE
        is_joined = self.joins_heads or (self.joins_operands and side in (Side.QUERY, Side.KEY))
        rows_of = self.module_path if is_joined else ""
        return Place(self.core_path, side, layout=joined if is_joined else apart, rows_of=rows_of, call=self.call)

    def points(self) -> Iterator[HookPoint]:
        """Yields the points from the projections to the heads' results."""
        yield from self._projection_points()
        yield from self._rotary_points()
        yield self.point("hook_attn_scores", self.inside(Side.SCORES))
        yield self.point("hook_pattern", self.inside(Side.PATTERN))
        joined, by_head = self.o.place(Side.INPUT), Converted(HeadsConversion(self.n_heads))
        if self.gate_activation is not None:
            yield self.point("hook_z", Place(self.core_path, Side.Z, call=self.call), dimensions=self._value_axes)
            yield self._gate_point(self.gate_activation)
        else:
            first = self.submodules.get("o_norm", self.o).place(Side.INPUT)
            yield self.point("hook_z", first, by_head, dimensions=self._value_axes)
        if self.changes_z:
            yield self.point("hook_o_in", joined, by_head, dimensions=self._value_axes)
        yield self.point("hook_result", joined, Derived(HeadResults(self), "result"))

    @property
    def joined(self) -> str:
        """Name of the point that shows what the output projection reads, by head: z, or z after a gate or norm."""
        return f"{self.path}.{'hook_o_in' if self.changes_z else 'hook_z'}"

    @property
    def changes_z(self) -> bool:
        """Whether a gate or norm lies between z and the output projection."""
        return self.gate_activation is not None or "o_norm" in self.submodules

    def _gate_point(self, activation: GateActivation) -> HookPoint:
        flags = self.gate_is_of_head, self.gate_in_queries
        conversion = GateConversion(self.n_heads, activation, *flags, self._gate_width)
        place = (self._query_map if self.gate_in_queries else self.submodules["gate"]).place(Side.OUTPUT)
        axes = "batch pos head" if self.gate_is_of_head else self._value_axes
        return self.point("hook_gate", place, Converted(conversion), dimensions=axes)

    @property
    def _gate_width(self) -> int | None:
        """Channels of a gate in the query map's output, where these are not half of a head's there."""
        return None

    @property
    def _query_map(self) -> GeneralizedComponent:
        """The map that gives queries, and the gate too where it has one."""
        return self.submodules["q"]

    def _projection_points(self) -> Iterator[HookPoint]:
        values = None if self.d_head_v is None else "batch pos kv_head d_head_v"
        for projection in PROJECTIONS:
            place, access = self.projected(projection)
            axes = values if projection == "v" else None
            yield self.point(f"hook_{projection}", place, access, dimensions=axes)

    def _rotary_points(self) -> Iterator[HookPoint]:
        if self.has_rotary or self.scales_queries or "q_norm" in self.submodules:
            yield self.point("hook_rot_q", self.inside(Side.QUERY), dimensions=self._query_axes)
        if self.has_rotary or "k_norm" in self.submodules:
            axes = self._query_axes if self.repeats_keys else self._key_axes
            yield self.point("hook_rot_k", self.inside(Side.KEY), dimensions=axes)


class HeadAttentionBridge(GeneralAttentionBridge):
    """Attention whose queries, keys and values are each one linear map of what it reads."""

    _shown = ("has_bias",)

    @abstractmethod
    def _rows(self, projection: Projection, name: Literal["weight", "bias"]) -> Tensor:
        """Returns a projection's part of a parameter, its own axis first."""

    def first_map(self, projection: Projection) -> LinearBridge:
        """Returns the projection's one map."""
        return self.holder(projection)

    @abstractmethod
    def holder(self, projection: Projection) -> LinearBridge:
        """Returns the linear map that holds a projection's parameters."""

    def has_bias(self, projection: Projection) -> bool:
        """Returns whether a projection has a bias."""
        return self.holder(projection).bias_or_none() is not None

    @Weight
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """The query weight `[head, d_model, d_head]`: a view, or a copy that writes through if heads lie in groups."""
        return self._weight("q")

    @Weight
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """The key weight `[kv_head, d_model, d_head]`, a view of the live parameter."""
        return self._weight("k")

    @Weight
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """The value weight `[kv_head, d_model, d_head]`, a view of the live parameter."""
        return self._weight("v")

    @Weight
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """The query bias `[head, d_head]`: a view, or a copy that writes through if heads lie in groups."""
        return self._bias("q")

    @Weight
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        """The key bias `[kv_head, d_head]`, a view of the live parameter."""
        return self._bias("k")

    @Weight
    def b_V(self) -> Float[Tensor, "kv_head d_head"]:
        """The value bias `[kv_head, d_head]`, a view of the live parameter."""
        return self._bias("v")

    def _weight(self, projection: Projection) -> Tensor:
        return self._converted(projection, self._rows(projection, "weight"))

    def _bias(self, projection: Projection) -> Tensor:
        rows = self._rows(projection, "bias")
        heads = self.n_heads if projection == "q" else self.n_kv_heads
        return write_through(rows.reshape(heads, -1), rows, lambda bias: bias.reshape(rows.shape))

    @property
    def path_projections(self) -> tuple[Projection, ...]:
        """All three."""
        return PROJECTIONS

    @abstractmethod
    def _mapped(self, projection: Projection) -> tuple[Place, Access]:
        """Returns the output of a projection's map, and how to read it by head."""

    def projected(self, projection: Projection) -> tuple[Place, Access]:
        """Returns the map's output, or values after their norm, and how to read them by head."""
        if projection == "v" and "v_norm" in self.submodules:
            return self._at_norm("v_norm", Side.OUTPUT)
        return self._mapped(projection)

    def _at_norm(self, key: str, side: Side) -> tuple[Place, Access]:
        """Returns an end of a norm of keys or values, and how to read it by head."""
        norm = self.submodules[key]
        return norm.place(side), Converted(HeadsConversion(self.n_kv_heads)) if _is_flat(norm) else Whole()

    def before_heads(self, value: Tensor, projection: Projection) -> Tensor:
        """Returns what is read by the module at which a projection shows, for an input of attention.

        That is the input itself where this is the projection's map, and what the map makes of it where it is a norm.
        """
        place, _ = self.projected(projection)
        norm = next((part for part in self.submodules.values() if part.module_path == place.module), None)
        if not isinstance(norm, NormalizationBridge):
            return value
        _, access = self._mapped(projection)
        made = read(access, self.holder(projection).module.forward(value), None, {})
        return made.flatten(2) if _is_flat(norm) else made

    def project(self, value: Tensor, projection: Projection) -> Tensor:
        """Returns queries, keys or values by head for an input by head, `[batch, pos, head, d_model]`."""
        made = torch.einsum("bphm,hmd->bphd", value, self._weight(projection))
        made = made + self._bias(projection) if self.has_bias(projection) else made
        norm = self.submodules.get("v_norm")
        if projection != "v" or norm is None:
            return made
        if _is_flat(norm):
            return norm.module.forward(made.flatten(2)).unflatten(-1, made.shape[2:])
        return norm.module.forward(made)


def _is_flat(norm: GeneralizedComponent) -> bool:
    """Whether a norm is of all heads together."""
    return norm.input_axes == "batch pos width"


class AttentionBridge(HeadAttentionBridge):
    """Attention with a linear map each for queries, keys and values: submodules `q`, `k`, `v` and `o`.

    A part `v_norm` is a norm that values pass (Gemma 4): `hook_v` is its output, which the pattern multiplies. With it
    and `k_norm`, values may have no map of their own, and be the map of keys through another norm.
    """

    def required(self) -> Mapping[str, type[GeneralizedComponent]]:
        """Returns the four maps, or three and the two norms that tell keys and values apart."""
        has_map = self.gate_activation is not None and not self.gate_in_queries
        maps: dict[str, type[GeneralizedComponent]] = dict.fromkeys((*PROJECTIONS, "o"), LinearBridge)
        maps |= {"gate": LinearBridge} if has_map else {}
        if "v_norm" in self.submodules and "v" not in self.submodules:
            del maps["v"]
            maps["k_norm"] = NormalizationBridge
        return maps

    def projected(self, projection: Projection) -> tuple[Place, Access]:
        """Returns the linear map's output, or values after their norm, and how to read them by head."""
        if projection == "k" and "v" not in self.submodules:
            return self._at_norm("k_norm", Side.INPUT)  # a write into the map's output would change values too
        return super().projected(projection)

    def _mapped(self, projection: Projection) -> tuple[Place, Access]:
        place = self.holder(projection).place(Side.OUTPUT)
        if projection == "q" and self.gate_in_queries:
            return place, Converted(HeadPartConversion(self.n_heads, 0, self.head_width))
        return place, Converted(HeadsConversion(self.n_heads if projection == "q" else self.n_kv_heads))

    def _weight(self, projection: Projection) -> Tensor:
        if projection == "q" and self.gate_in_queries:
            return self._queries(self.holder("q").matrix).transpose(1, 2)
        return super()._weight(projection)

    def _bias(self, projection: Projection) -> Tensor:
        if projection == "q" and self.gate_in_queries:
            return self._queries(self.holder("q").weight("bias"))
        return super()._bias(projection)

    def _queries(self, rows: Tensor) -> Tensor:
        """Returns the rows of queries `[head, d_head, ...]` of those of queries and gates, a view."""
        return rows.unflatten(0, (self.n_heads, -1))[:, : self.head_width]

    def holder(self, projection: Projection) -> LinearBridge:
        """Returns the projection's own map; of values without one, that of keys."""
        part = self.submodules["k" if projection == "v" and "v" not in self.submodules else projection]
        assert isinstance(part, LinearBridge), f"{projection} is a linear map"
        return part

    def _rows(self, projection: Projection, name: Literal["weight", "bias"]) -> Tensor:
        linear = self.holder(projection)
        return linear.matrix if name == "weight" else linear.weight("bias")


@dataclass(eq=False, repr=False)
class JointQKVAttentionBridge(HeadAttentionBridge):
    """Attention whose queries, keys and values come from one linear map: submodules `qkv` and `o`.

    Attributes:
        qkv_conversion_rule: How the fused axis holds queries, keys and values, and their heads.
        split_qkv_matrix: Returns three linear maps for a Hugging Face attention module, or None.
    """

    _: KW_ONLY
    qkv_conversion_rule: QKVConversionRule
    split_qkv_matrix: Callable[[nn.Module], tuple[nn.Linear, nn.Linear, nn.Linear]] | None = None

    qkv: LinearBridge = field(init=False)

    def required(self) -> Mapping[str, type[GeneralizedComponent]]:
        """Returns the two maps."""
        return dict.fromkeys(("qkv", "o"), LinearBridge)

    def _mapped(self, projection: Projection) -> tuple[Place, Access]:
        return self.qkv.place(Side.OUTPUT), Converted(QKVPartConversion(self.qkv_conversion_rule, projection))

    def _rows(self, projection: Projection, name: Literal["weight", "bias"]) -> Tensor:
        fused = self.qkv.matrix if name == "weight" else self.qkv.weight("bias")
        return self.qkv_conversion_rule.part(fused, 0, projection)

    def holder(self, projection: Projection) -> LinearBridge:
        """Returns the fused map."""
        return self.qkv


class HeadResults(Derivation):
    """Each head's own contribution, `z @ W_O[head]`; a write acts on the output projection's output."""

    def __init__(self, attention: GeneralAttentionBridge) -> None:
        self.attention = weakref.proxy(attention)  # which has the points that have this
        self.targets: tuple[Place, ...] = (attention.o.place(Side.OUTPUT),)

    def sources(self) -> Sequence[Any]:
        """Returns what the output weight is made of."""
        return self.attention.o.sources("weight")

    def weights_to_write(self) -> tuple[Tensor, ...]:
        """Returns the output weight."""
        return (self.attention.o.checked_parameter("weight"),)

    def read(self, part: str, source: Tensor, edits: Mapping[str, Tensor]) -> Tensor:
        """Returns `[batch, pos, head, d_model]`."""
        z = source.unflatten(-1, (self.attention.n_heads, -1))
        return torch.einsum("bphd,hdm->bphm", z, self.attention.W_O.to(z))

    def write(self, target: Place, raw: Tensor, source: Tensor, edits: Mapping[str, Tensor], entered: Tensor) -> Tensor:
        """Returns the sum of the edited results, plus the output bias that the map itself adds."""
        total = edits["result"].sum(-2)
        bias = self.attention.o.module_bias
        return total if bias is None else total + bias


class PathInputs(Derivation):
    """The residual stream as read by groups of heads and by single projections; a write acts on those projections.

    Parts, in order: `attn_in` by key/value group, then `q_input`, `k_input`, `v_input`, which see its edits.

    Args:
        attention: The attention that reads.
        norm: The norm before it, or None.
    """

    is_in_series = False

    def __init__(self, attention: GeneralAttentionBridge, norm: Callable[[Tensor], Tensor] | None) -> None:
        self.attention = weakref.proxy(attention)
        self.norm = norm
        self._at: dict[Place, list[tuple[Projection, Access]]] = {}
        for projection in attention.path_projections:
            place, access = attention.projected(projection)
            self._at.setdefault(place, []).append((projection, access))
        self.targets: tuple[Place, ...] = tuple(self._at)

    @property
    def parts(self) -> Sequence[str]:
        """The parts, in order."""
        inputs = [f"{projection}_input" for projection in self.attention.path_projections]
        return ["attn_in", *inputs] if len(inputs) == len(PROJECTIONS) else inputs

    def reached_by(self, part: str) -> tuple[Place, ...]:
        """Returns the outputs of the projections that read the part."""
        return tuple(
            place
            for place, projections in self._at.items()
            if part == "attn_in" or any(part == f"{projection}_input" for projection, _ in projections)
        )

    def weights_to_write(self) -> tuple[Tensor, ...]:
        """Returns the projections' weights."""
        return self.attention.projection_weights()

    def read(self, part: str, source: Tensor, edits: Mapping[str, Tensor]) -> Tensor:
        """Returns `[batch, pos, kv_head, d_model]`, for queries `[batch, pos, head, d_model]`: an expanded view."""
        group = edits.get("attn_in")
        heads = self.attention.n_heads if part == "q_input" else self.attention.n_kv_heads
        if group is None:
            return source.unsqueeze(2).expand(-1, -1, heads, -1)
        return group.repeat_interleave(heads // group.shape[2], dim=2)

    def write(self, target: Place, raw: Tensor, source: Tensor, edits: Mapping[str, Tensor], entered: Tensor) -> Tensor:
        """Returns the output of a projection (or of the fused one), computed again where its input was edited.

        Raises:
            ConflictingWritesError: The norm or attention's input was written in the same run: this would undo it.
        """
        for projection, access in self._at[target]:
            part = f"{projection}_input"
            if part in edits or "attn_in" in edits:
                self._check(self.attention.before_heads(self._normalized(source), projection), entered)
                value = edits[part] if part in edits else self.read(part, source, edits)
                made = self.attention.project(self._normalized(value), projection)
                raw = access.conversion.revert(made, raw) if isinstance(access, Converted) else made
        return raw

    def _check(self, expected: Tensor, entered: Tensor) -> None:
        if not torch.allclose(entered, expected, rtol=0, atol=0, equal_nan=True):
            raise ConflictingWritesError(
                "a head's or projection's own input was written, and what all of them read after the norm as well",
                where=self.attention.path,
                fix="write the inputs alone, or hook_q, hook_k, hook_v, which come after both",
            )

    def _normalized(self, value: Tensor) -> Tensor:
        return value if self.norm is None else self.norm(value)
