"""Which call makes a component template: of a builder where one can, else of the component's own class."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from clearspan.architectures import parts
from clearspan.components import (
    ActivationBridge,
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    ExpertsBridge,
    GatedMLPBridge,
    GeneralizedComponent,
    JointGateMLPBridge,
    JointQKVAttentionBridge,
    LatentAttentionBridge,
    LinearBridge,
    MixerBridge,
    MixerKind,
    MLPBridge,
    MoEBridge,
    NormalizationBridge,
    PosEmbedBridge,
    RouterBridge,
    TransposedLinearBridge,
    UnembeddingBridge,
    mixer_kinds,
)
from clearspan.components.block import PARALLEL
from clearspan.conversions import BlockedQKVConversionRule, GroupedQKVConversionRule, QKVConversionRule
from clearspan.points import Layout
from clearspan.structure.entries import Entries
from clearspan.structure.expression import Call, Code, Expression, value_of
from clearspan.structure.mixer_builders import mixer_calls

AXES = {axes: name for name in ("HEADS", "KV_HEADS", "WIDTH") if (axes := getattr(parts, name))}


@dataclass(frozen=True)
class _Builder:
    """A builder, and what of a template it takes.

    Attributes:
        function: The builder.
        keywords: Attributes of the template that it takes, each with the keyword.
        parts: Parts that it takes, each with the keyword, in the order in which they are written.
        takes_others: Whether it takes further parts.
    """

    function: Callable[..., GeneralizedComponent]
    keywords: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    takes_others: bool = False


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_LAYOUT = {"layout": "layout"}
_OVERWRITTEN = {"output_is_overwritten": "overwritten"}
_ATTENTION = {
    "has_rotary": "rotary",
    "has_alibi": "alibi",
    "has_sinks": "sinks",
    "repeats_keys": "repeats_keys",
    **_OVERWRITTEN,
    **_same(*parts.AttentionOptions.__annotations__),
}
_LATENT = parts.LatentOptions.__annotations__
_BRANCH = _same(*parts.BranchOptions.__annotations__)
_NORMED = _same("q_norm", "k_norm", "gate", "o_norm")
_VALUES = _same("v_norm")
_BUILDERS: Mapping[type[GeneralizedComponent], _Builder] = {
    LinearBridge: _Builder(parts.linear, _LAYOUT | _OVERWRITTEN),
    TransposedLinearBridge: _Builder(parts.linear, _LAYOUT | _OVERWRITTEN),
    NormalizationBridge: _Builder(
        parts.norm,
        {"uses_rms_norm": "rms", "weight_offset": "offset", "axes": "axes", **_LAYOUT, **_OVERWRITTEN, "call": "call"},
    ),
    AttentionBridge: _Builder(
        parts.attention, _ATTENTION, _same("q", "k", "v", "o") | _NORMED | _VALUES, takes_others=True
    ),
    JointQKVAttentionBridge: _Builder(
        parts.fused_attention,
        {"qkv_conversion_rule": "rule", **_ATTENTION},
        _same("qkv", "o") | _NORMED,
        takes_others=True,
    ),
    LatentAttentionBridge: _Builder(
        parts.latent_attention,
        {**_same(*_LATENT, "d_head_nope", "d_head_rope", "d_head_v"), "has_rotary": "rotary"},
        _same("q", "q_a", "q_a_norm", "q_b", "kv_a", "kv_a_norm", "kv_b", "o"),
        takes_others=True,
    ),
    MLPBridge: _Builder(parts.mlp, _LAYOUT | _OVERWRITTEN, {"in": "in_", **_same("act", "norm", "out")}, True),
    GatedMLPBridge: _Builder(
        parts.gated_mlp, {**_LAYOUT, **_BRANCH}, {"gate": "gate", "in": "in_", **_same("norm", "out")}
    ),
    JointGateMLPBridge: _Builder(
        parts.fused_gated_mlp, {**_BRANCH, "gate_is_second": "gate_is_second"}, _same("gate_up", "out")
    ),
    MoEBridge: _Builder(
        parts.mixture,
        {"runs_all": "runs_all", **_LAYOUT, **_same(*parts.MixtureOptions.__annotations__)},
        _same("router", "experts", "shared", "shared_gate"),
        takes_others=True,
    ),
    BlockBridge: _Builder(
        parts.block,
        _same("stages", "norms", "residual_multiplier", "stream_multiplier", "input_multipliers", "norms_the_sum")
        | _same("residual_is_normed"),
        _same("ln1", "attn", "mixer", "ln1_post", "ln2", "mlp", "ln2_post"),
        takes_others=True,
    ),
    EmbeddingBridge: _Builder(parts.embedding, {**_same("multiplier", "ends_at"), **_OVERWRITTEN}),
    PosEmbedBridge: _Builder(
        parts.pos_embedding,
        {"offset": "offset", "input_is_positions": "from_mask"}
        | _same("table", "padding_id", "ends_in_embed", "layout"),
    ),
    UnembeddingBridge: _Builder(parts.unembedding, _same("scale", "softcap", "input_scale", "n_logits")),
}
_NOT = "input_is_positions"
_COUNTS = ("d_head_nope", "d_head_rope", "d_head_v", "padding_id", "n_logits")


class Builders:
    """Writes templates as calls.

    A call is used only if what it returns is the template, so what is written never says more or less.

    Args:
        entries: The config's entries.
    """

    def __init__(self, entries: Entries) -> None:
        self._entries = entries

    def call(self, part: GeneralizedComponent) -> Expression:
        """Returns the call that makes a template."""
        calls = mixer_calls(part, self._entries) if isinstance(part, MixerBridge) else self._calls(part)
        for one in calls:
            if is_alike(value_of(one), part):
                return one
        return self._direct(part)

    def map(self, part: GeneralizedComponent) -> Expression:
        """Returns a part as it is handed to a builder: a linear map of the usual kind, or the like, by its name."""
        is_plain = list(_changed(part)) == ["name"] and not part.submodules
        usual = (LinearBridge, RouterBridge, ActivationBridge, ExpertsBridge)
        return part.name if is_plain and type(part) in usual else self.call(part)

    def value(self, name: str, value: object) -> Expression:
        """Returns an attribute's value."""
        match value:
            case QKVConversionRule():
                return self._rule(value)
            case MixerKind(name=kind):
                return Code(kind, value, mixer_kinds.__name__)
            case float():
                return self._entries.factor(name, value)
            case int() if name in _COUNTS:
                return self._entries.count(name, value)
            case str() if name == "axes" and value in AXES:
                return Code(AXES[value], value, parts.__name__)
            case Mapping():
                return {key: self.value(name, one) for key, one in value.items()}
            case None | str() | int() | Enum():
                return value
            case Sequence():
                each = [self.value(name, one) for one in value]
                return tuple(each) if isinstance(value, tuple) else each
            case _:
                return self._plain(value)

    def _rule(self, rule: QKVConversionRule) -> Call:
        match rule:
            case BlockedQKVConversionRule(n_heads=n_heads):
                pass
            case GroupedQKVConversionRule(group=group):
                n_heads = group * rule.n_kv_heads
            case _:
                raise AssertionError(f"{rule!r} is one of the two that are derived")
        sizes = self._entries.size("n_heads", n_heads), self._entries.size("d_head", rule.d_head)
        return Call(type(rule), [*sizes, self._entries.kv_heads(rule.n_kv_heads)])

    def _plain(self, value: object) -> Expression:
        assert dataclasses.is_dataclass(value), f"{value!r} is made of fields"
        assert not isinstance(value, type), "an object"
        names = [one.name for one in dataclasses.fields(value) if one.init and getattr(value, one.name) != one.default]
        return Call(type(value), (), {name: self.value(name, getattr(value, name)) for name in names})

    def _direct(self, part: GeneralizedComponent) -> Expression:
        """Returns a call of a component's own class."""
        changed = _changed(part)
        name = [changed.pop("name")] if "name" in changed else []
        inner = {key: self.call(one) for key, one in part.submodules.items()}
        kwargs: dict[str, Expression] = {"submodules": inner} if inner else {}
        kwargs |= {key: self.value(key, value) for key, value in changed.items()}
        return Call(type(part), [str(one) for one in name], kwargs)

    def _calls(self, part: GeneralizedComponent) -> Iterator[Call]:
        """Yields calls of a part's builder that may make it, short ones first."""
        builder = _BUILDERS.get(type(part))
        if builder is None:
            return
        changed = {name: value for name, value in _changed(part).items() if name != "name"}
        options = self._block(part, changed) if isinstance(part, BlockBridge) else {}
        if changed.keys() - builder.keywords.keys():
            return
        options |= {
            keyword: True if name == _NOT else self.value(name, changed[name])
            for name, keyword in builder.keywords.items()
            if name in changed and (name != "uses_rms_norm" or changed[name])
        }
        if type(part) is TransposedLinearBridge:
            options = {"transposed": True, **options}
        others = {key: self.call(one) for key, one in part.submodules.items() if key not in builder.parts}
        if others:
            options["others"] = others
        for inner, more in ((self._by_name(part), _laid(part)), (self._by_name(part), {}), (self._each(part), {})):
            kwargs = {keyword: inner[key] for key, keyword in builder.parts.items() if key in inner}
            if isinstance(part, MoEBridge):
                kwargs |= self._experts(part, kwargs.pop("experts"))
            if builder.takes_others or not others:
                yield Call(builder.function, [part.name], {**kwargs, **options, **more})

    def _each(self, part: GeneralizedComponent) -> dict[str, Expression]:
        return {key: self.map(one) for key, one in part.submodules.items()}

    def _by_name(self, part: GeneralizedComponent) -> dict[str, Expression]:
        """Returns parts, of an MLP by name alone, for a builder that gives all of them the MLP's layout."""
        short = (LinearBridge, ActivationBridge) if isinstance(part, MLPBridge) else ()
        return {key: one.name if type(one) in short else self.map(one) for key, one in part.submodules.items()}

    def _experts(self, part: GeneralizedComponent, whole: Expression) -> dict[str, Expression]:
        experts = part.submodules["experts"]
        changed = _changed(experts)
        if changed.keys() - {"name", "is_transposed"}:
            return {"experts": whole}
        named: dict[str, Expression] = {} if experts.name == "experts" else {"experts": experts.name}
        return {**named, "transposed": True} if "is_transposed" in changed else named

    def _block(self, part: BlockBridge, changed: dict[str, object]) -> dict[str, Expression]:
        """Takes out of a block's attributes what its builder takes in other words."""
        options: dict[str, Expression] = {}
        for name in ("is_parallel", "attn_out", "mlp_out"):
            changed.pop(name, None)
        if part.stages == PARALLEL:
            options["parallel"] = True
        else:
            there = tuple((name,) for name in ("attn", "mixer", "mlp") if name in part.submodules)
            options |= {} if part.stages == there else {"stages": part.stages}
        changed.pop("stages", None)
        outs = dict(part.outs)
        changed.pop("outs", None)
        options |= {f"{name}_out": outs.pop(name) for name in ("attn", "mlp") if name in outs}
        return options | ({"outs": outs} if outs else {})


def _laid(part: GeneralizedComponent) -> dict[str, Expression]:
    """Returns the layout of an MLP's maps, where the block itself calls them."""
    out = part.submodules.get("out")
    is_loose = type(part) is MLPBridge and part.name is None
    return {"layout": out.layout} if is_loose and out is not None and out.layout is not Layout.TOKENS else {}


def _changed(part: GeneralizedComponent) -> dict[str, object]:
    """Returns the attributes of a template that are not as its class has them; not its parts."""
    found = {}
    for one in dataclasses.fields(part):
        if one.init and one.name not in ("submodules", "config"):
            default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
            value = vars(part).get(one.name, default)
            if value != default:
                found[one.name] = value
    return found


def is_alike(one: object, other: object) -> bool:
    """Whether two templates, or values in them, are the same; numbers as exactly as a regression gives them."""
    match one, other:
        case GeneralizedComponent(), GeneralizedComponent():
            inner = one.submodules.keys() == other.submodules.keys() and all(
                is_alike(part, other.submodules[key]) for key, part in one.submodules.items()
            )
            return type(one) is type(other) and inner and is_alike(_changed(one), _changed(other))
        case Mapping(), Mapping():
            return one.keys() == other.keys() and all(is_alike(value, other[key]) for key, value in one.items())
        case float(), float():
            return math.isclose(one, other, rel_tol=1e-5)
        case QKVConversionRule(), QKVConversionRule():
            return type(one) is type(other) and vars(one) == vars(other)
        case _:
            return one == other
