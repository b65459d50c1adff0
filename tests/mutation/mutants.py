"""Wrong adapters, made by program from a right one: each entry of it dropped or changed."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from clearspan.architectures import ADAPTERS, ArchitectureAdapter
from clearspan.components import (
    BlockBridge,
    GatedMLPBridge,
    GeneralizedComponent,
    JointGateMLPBridge,
    JointQKVAttentionBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PerLayer,
    TransposedLinearBridge,
)
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import (
    BlockedQKVConversionRule,
    GroupedQKVConversionRule,
    ParamProcessingConversion,
    RearrangeTensorConversion,
)
from clearspan.hf.loading import bridge_config
from clearspan.points import Layout

Change = Callable[[ArchitectureAdapter], None]
"""Changes an adapter that was just made."""


@dataclass(frozen=True)
class Mutant:
    """A wrong adapter.

    Attributes:
        what: What was changed.
        adapter: Its class.
    """

    what: str
    adapter: type[ArchitectureAdapter]


def mutants(right: type[ArchitectureAdapter], model: PreTrainedModel) -> Iterator[Mutant]:
    """Yields an adapter's mutants, for a model that the adapter serves."""
    adapter = right(bridge_config(model, right))
    for what, change in _changes(adapter):
        yield Mutant(what, _changed(right, change))
    yield from _of_class(right)
    for other in dict.fromkeys(ADAPTERS.values()):
        if other is not right:
            yield Mutant(f"the adapter of another family, {other.__name__}", other)


def _changed(right: type[ArchitectureAdapter], change: Change) -> type[ArchitectureAdapter]:
    def made(self: ArchitectureAdapter, cfg: TransformerBridgeConfig) -> None:
        right.__init__(self, cfg)
        change(self)

    return type(f"Mutant{right.__name__}", (right,), {"__init__": made})


def _of_class(right: type[ArchitectureAdapter]) -> Iterator[Mutant]:
    """Yields mutants by what the class says: an attribute changed, or left to the class above it."""
    name = f"Mutant{right.__name__}"
    yield Mutant(
        "makes_positions_from_mask",
        type(name, (right,), {"makes_positions_from_mask": not right.makes_positions_from_mask}),
    )
    yield Mutant("whole_sequences", type(name, (right,), {"whole_sequences": "a made-up reason"}))
    sizes = {**right.sizes, "eps": ("no_such_entry",)}
    yield Mutant("sizes: eps", type(name, (right,), {"sizes": sizes}))
    for method in [key for key, value in vars(right).items() if callable(value) or isinstance(value, property)]:
        above = next((vars(kind)[method] for kind in right.__mro__[1:] if method in vars(kind)), None)
        if above is not None:
            yield Mutant(f"{method} of {right.__mro__[1].__name__}", type(name, (right,), {method: above}))


def _changes(adapter: ArchitectureAdapter) -> Iterator[tuple[str, Change]]:
    yield from _of_cfg(adapter.cfg)
    yield from _of_conversions(adapter.weight_processing_conversions)
    yield from _of_mapping(adapter)


# --- sizes and settings ----------------------------------------------------------------------------------------------

_OTHERS: dict[str, tuple[Any, ...]] = {
    "normalization_type": ("LN", "RMS"),
    "positional_embedding_type": ("standard", "rotary", "alibi", "none"),
    "output_logits_soft_cap": (None, 3.0, 30.0),
    "n_key_value_heads": (None, 1, 2, 4),
    "act_fn": ("relu", "silu", "gelu"),
    "eps_attr": ("no_such_entry",),
}
_NOT_THE_ADAPTERS = ("hf", "architecture", "model_name", "dtype", "default_prepend_bos")


def _of_cfg(cfg: TransformerBridgeConfig) -> Iterator[tuple[str, Change]]:
    for field in dataclasses.fields(cfg):
        if field.name in _NOT_THE_ADAPTERS:
            continue
        old = getattr(cfg, field.name)
        for new in _OTHERS.get(field.name) or _other(old):
            if new != old:
                yield f"cfg.{field.name}: {old} to {new}", partial(_set_cfg, name=field.name, value=new)


def _set_cfg(adapter: ArchitectureAdapter, *, name: str, value: object) -> None:
    setattr(adapter.cfg, name, value)


def _other(value: object) -> tuple[Any, ...]:
    match value:
        case bool():
            return (not value,)
        case int():
            return (value * 2, max(1, value - 1)) if value else (1,)
        case float():
            return (value * 2, 0.0) if value else (1.0,)
        case None:
            return ()
        case _:
            return ("",)


# --- weights ---------------------------------------------------------------------------------------------------------


def _of_conversions(conversions: Mapping[str, ParamProcessingConversion]) -> Iterator[tuple[str, Change]]:
    for key, conversion in conversions.items():
        yield f"{key}: no conversion", partial(_drop_conversion, key=key)
        rearrange = conversion.tensor_conversion
        if isinstance(rearrange, RearrangeTensorConversion):
            left, right = (side.strip() for side in rearrange.pattern.split("->"))
            sizes = rearrange.axes_lengths
            yield (
                f"{key}: to n h m",
                _conversion(key, f"{left} -> n h m" if right == "n m h" else f"{left} -> n m h", sizes),
            )
            if "(n h)" in left:
                yield f"{key}: heads inside", _conversion(key, f"{left.replace('(n h)', '(h n)')} -> {right}", sizes)
            for name, size in sizes.items():
                for other in (size * 2, size // 2):
                    if other:
                        yield f"{key}: {name}={other}", _conversion(key, rearrange.pattern, {**sizes, name: other})


def _drop_conversion(adapter: ArchitectureAdapter, *, key: str) -> None:
    del adapter.weight_processing_conversions[key]


def _conversion(key: str, pattern: str, sizes: Mapping[str, int]) -> Change:
    def change(adapter: ArchitectureAdapter) -> None:
        new = RearrangeTensorConversion(pattern, **sizes)
        adapter.weight_processing_conversions[key] = ParamProcessingConversion(new)

    return change


# --- parts -----------------------------------------------------------------------------------------------------------

Way = tuple[str | int, ...]
"""Keys from an adapter's mapping to a template: a part's name, or the number of a layer's own template."""


def _ways(parts: Mapping[str, GeneralizedComponent], way: Way = ()) -> Iterator[tuple[Way, GeneralizedComponent]]:
    for key, part in parts.items():
        here = (*way, key)
        if isinstance(part, PerLayer):
            seen: list[GeneralizedComponent] = []
            for index, template in enumerate(part.templates):
                yield (*here, index), template
                if not any(template is one for one in seen):
                    yield from _ways(template.submodules, (*here, index))
                seen.append(template)
            continue
        yield here, part
        yield from _ways(part.submodules, here)


def _apply(
    adapter: ArchitectureAdapter, way: Way, change: Callable[[GeneralizedComponent], GeneralizedComponent]
) -> None:
    def within(parts: Mapping[str, GeneralizedComponent], rest: Way) -> dict[str, GeneralizedComponent]:
        key, *others = rest
        part = parts[key]
        if isinstance(part, PerLayer):
            index, *others = others
            templates = list(part.templates)
            templates[index] = inside(templates[index], tuple(others))
            return {**parts, key: PerLayer(templates)}
        return {**parts, key: inside(part, tuple(others))}

    def inside(part: GeneralizedComponent, rest: Way) -> GeneralizedComponent:
        own = copy.copy(part)
        if not rest:
            return change(own)
        own.submodules = within(part.submodules, rest)
        return own

    adapter.component_mapping = within(adapter.component_mapping, way)


def _at(way: Way, change: Callable[[GeneralizedComponent], GeneralizedComponent]) -> Change:
    return lambda adapter: _apply(adapter, way, change)


def _with(**values: object) -> Callable[[GeneralizedComponent], GeneralizedComponent]:
    def change(part: GeneralizedComponent) -> GeneralizedComponent:
        vars(part).update(values)
        return part

    return change


def _as(kind: type[GeneralizedComponent]) -> Callable[[GeneralizedComponent], GeneralizedComponent]:
    def change(part: GeneralizedComponent) -> GeneralizedComponent:
        part.__class__ = kind
        return part

    return change


def _of_mapping(adapter: ArchitectureAdapter) -> Iterator[tuple[str, Change]]:
    yield from _of_parts((), adapter.component_mapping)
    for way, part in _ways(adapter.component_mapping):
        where = ".".join(map(str, way))
        for what, change in _of_part(part):
            yield f"{where}: {what}", _at(way, change)
        yield from _of_parts(way, part.submodules)
    for key, part in adapter.component_mapping["blocks"].submodules.items():
        if isinstance(part, PerLayer):
            for index, template in enumerate(part.templates):
                yield (
                    f"blocks.{key}: layer {index}'s in all",
                    partial(_set_part, way=("blocks",), key=key, part=template),
                )
            turned = PerLayer([*part.templates[1:], part.templates[0]])
            yield f"blocks.{key}: layers turned", partial(_set_part, way=("blocks",), key=key, part=turned)


def _set_part(adapter: ArchitectureAdapter, *, way: Way, key: str, part: GeneralizedComponent) -> None:
    def change(around: GeneralizedComponent) -> GeneralizedComponent:
        around.submodules = {**around.submodules, key: part}
        return around

    _apply(adapter, way, change)


def _of_parts(way: Way, parts: Mapping[str, GeneralizedComponent]) -> Iterator[tuple[str, Change]]:
    """Yields a component without one of its parts, and with two of them in each other's place."""
    where = ".".join(map(str, way)) or "mapping"

    def put(new: dict[str, GeneralizedComponent]) -> Change:
        if not way:
            return lambda adapter: setattr(adapter, "component_mapping", new)
        return _at(way, _with(submodules=new))

    keys, pairs = list(parts), [*itertools.pairwise(parts)]
    for key in keys:
        yield f"{where}: no {key}", put({other: part for other, part in parts.items() if other != key})
    for first, second in pairs:
        turned = {**parts, first: parts[second], second: parts[first]}
        yield f"{where}: {first} and {second} swapped", put(turned)
    if "k" in parts and "q" in parts:
        for first, second in (("q", "v"), ("v", "o")):
            yield f"{where}: {first} and {second} swapped", put({**parts, first: parts[second], second: parts[first]})
    for first, second in (("ln1", "ln2"), ("ln1_post", "ln2_post"), ("ln1", "ln1_post"), ("gate", "out")):
        if first in parts and second in parts and (first, second) not in pairs:
            yield f"{where}: {first} and {second} swapped", put({**parts, first: parts[second], second: parts[first]})
    for first, second in (("ln1", "ln1_post"), ("ln2", "ln2_post")):
        if (first in parts) != (second in parts):
            old, new = (first, second) if first in parts else (second, first)
            yield f"{where}: {old} as {new}", put({(new if key == old else key): part for key, part in parts.items()})


def _of_part(
    part: GeneralizedComponent,
) -> Iterator[tuple[str, Callable[[GeneralizedComponent], GeneralizedComponent]]]:
    if part.name is not None:
        yield "a path that is not there", _with(name="no_such_module")
        yield "no path", _with(name=None)
        if "." in part.name:
            yield "a path one short", _with(name=part.name.rpartition(".")[0])
    for field in dataclasses.fields(part):
        if not field.init or field.name in ("name", "config", "submodules", *_REFUSALS):
            continue
        yield from _of_field(part, field.name, getattr(part, field.name))
    yield from _of_kind(part)
    siblings = list(part.submodules.values())
    for one in siblings:
        for other in siblings:
            if one is not other and one.name and other.name and one.name != other.name:
                key = next(key for key, value in part.submodules.items() if value is one)
                renamed = copy.copy(one)
                renamed.name = other.name
                yield f"{key} at {other.name}", _with(submodules={**part.submodules, key: renamed})


_REFUSALS = ("bounds_values", "reads_layer", "reads_tokens")
"""What these say has runs and steps refused, and changes no number."""
_NAMES = ("attn_out", "mlp_out", "ends_at")


def _of_field(part: GeneralizedComponent, name: str, old: Any) -> Iterator[tuple[str, Any]]:
    match old:
        case _ if name in _NAMES:
            if old is not None:
                yield f"{name} None", _with(**{name: None})
            new = [one.name for one in part.submodules.values() if one.name not in (None, old)]
            for other in [*new, "no_such_module"]:
                yield f"{name} {other}", _with(**{name: other})
        case bool():
            yield f"{name} {not old}", _with(**{name: not old})
        case Layout():
            for other in Layout:
                if other is not old:
                    yield f"{name} {other.name}", _with(**{name: other})
        case int() | float():
            for other in _other(old):
                yield f"{name} {other}", _with(**{name: other})
        case None if name == "uses_rms_norm":
            for other in (True, False):
                yield f"{name} {other}", _with(**{name: other})
        case str() if name == "axes":
            for axes in ("batch pos d_model", "batch pos width", "batch pos head d_head", "batch pos kv_head d_head"):
                if axes != old:
                    yield f"axes {axes}", _with(axes=axes, input_axes=axes, output_axes=axes)
        case _:
            pass


def _of_kind(part: GeneralizedComponent) -> Iterator[tuple[str, Any]]:
    match part:
        case JointQKVAttentionBridge(qkv_conversion_rule=rule):
            heads = getattr(rule, "n_heads", None) or rule.group * rule.n_kv_heads
            n_kv, d_head = rule.n_kv_heads, rule.d_head
            for kind in (BlockedQKVConversionRule, GroupedQKVConversionRule):
                for n_heads, kv, width in (
                    (heads, n_kv, d_head),
                    (heads, 1, d_head),
                    (heads, heads, d_head),
                    (heads // 2, max(1, n_kv // 2), 2 * d_head),
                    (heads * 2, n_kv * 2, d_head // 2),
                ):
                    if (kind, n_heads, kv) != (type(rule), heads, n_kv) and n_heads % kv == 0:
                        yield (
                            f"rule {kind.__name__}({n_heads}, {width}, {kv})",
                            _with(qkv_conversion_rule=kind(n_heads, width, kv)),
                        )
            if part.split_qkv_matrix is not None:
                yield "split_qkv_matrix None", _with(split_qkv_matrix=None)
        case TransposedLinearBridge():
            yield "as LinearBridge", _as(LinearBridge)
        case LinearBridge() if type(part) is LinearBridge:
            yield "as TransposedLinearBridge", _as(TransposedLinearBridge)
            yield "as NormalizationBridge", lambda old: NormalizationBridge(name=old.name)
        case NormalizationBridge():
            yield "as LinearBridge", lambda old: LinearBridge(name=old.name)
        case JointGateMLPBridge():
            yield (
                "as MLPBridge",
                lambda old: MLPBridge(
                    name=old.name, submodules={"in": old.submodules["gate_up"], "out": old.submodules["out"]}
                ),
            )
        case GatedMLPBridge():
            yield "as MLPBridge", _as(MLPBridge)
            for key in ("in", "gate"):
                yield (
                    f"as MLPBridge of {key}",
                    lambda old, key=key: MLPBridge(
                        name=old.name, submodules={"in": old.submodules[key], "out": old.submodules["out"]}
                    ),
                )
        case MLPBridge():
            yield (
                "as GatedMLPBridge",
                lambda old: GatedMLPBridge(name=old.name, submodules={**old.submodules, "gate": old.submodules["in"]}),
            )
        case BlockBridge():
            pass
        case _:
            pass
