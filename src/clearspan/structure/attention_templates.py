"""Templates of attention, made of the modules that were found."""

from collections.abc import Iterator, Mapping
from typing import Required, TypedDict

from clearspan.components import (
    AttentionBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    JointQKVAttentionBridge,
    LatentAttentionBridge,
    NormalizationBridge,
    SharedKeysAttentionBridge,
)
from clearspan.conversions import GateActivation
from clearspan.points import Layout
from clearspan.structure.algebra import norm_kind
from clearspan.structure.attention import Attention
from clearspan.structure.finding import Findings, MissingStructureError
from clearspan.structure.fused import check_order, fused_rule
from clearspan.structure.gate import Gate
from clearspan.structure.latent import gives_rest
from clearspan.structure.scores import has_distance_bias, sink_scales_z
from clearspan.structure.shared_keys import values_are_keys
from clearspan.structure.templates import call_number, linear_template
from clearspan.structure.trace import Trace, Visit


class _GateOptions(TypedDict, total=False):
    gate_activation: GateActivation | None
    gate_is_of_head: bool
    gate_in_queries: bool


class _Options(_GateOptions, total=False):
    """Attributes of attention that were found, of whichever class its template is."""

    has_rotary: Required[bool]
    core: str
    joins_heads: bool
    joins_operands: bool
    norms_rotated: bool
    sink_scales_z: bool
    scales_queries: bool
    has_alibi: bool
    repeats_keys: bool
    has_sinks: bool
    output_is_overwritten: bool


def attention_template(
    found: Attention, trace: Trace, block: Visit, findings: Findings, where: str, *, overwritten: bool = False
) -> GeneralAttentionBridge:
    """Returns the template of an attention.

    Args:
        found: Its modules.
        trace: The traced forward.
        block: The block's call.
        findings: Where to say what was found.
        where: The block's canonical path.
        overwritten: Whether the model, or a write of the stream, writes into its output's storage.

    Raises:
        MissingStructureError: Its projections are laid out in no way that components know.
    """
    q, k, v = found.query, found.key, found.value
    findings.add(f"{where}.attn.o", f"{found.output.path} reads what the heads found")
    name = _within(found.path, block.path)
    parts = {"o": _linear(found, found.output), **dict(_norms(found, block, trace)), **dict(_between(found))}
    options = _options(found, block, overwritten=overwritten)
    if found.source is not None:
        findings.add(f"{where}.attn", f"queries are {q.map.path}, keys and values those of layer {found.source}")
        return _sharing(found, parts, name, options)
    if k.others:
        return _latent(found, parts, name, has_rotary=options["has_rotary"], has_sinks=options.get("has_sinks", False))
    if len({q.map, k.map, v.map}) == 3 or values_are_keys(k, v):
        separate = _separate(found, parts, name, options)
        findings.add(f"{where}.attn", f"queries, keys and values are {q.map.path}, {k.map.path}, {v.map.path}")
        return separate
    if q.map is k.map is v.map:
        rule = fused_rule(q, k, v)
        findings.add(f"{where}.attn", f"queries, keys and values are {q.map.path}, {type(rule).__name__}")
        parts = {"qkv": _linear(found, q.map), **parts}
        return JointQKVAttentionBridge(name, submodules=parts, **options, qkv_conversion_rule=rule)
    names = ", ".join(dict.fromkeys(one.map.path for one in (q, k, v)))
    raise MissingStructureError(f"queries, keys and values come from {names}, each neither alone nor together")


def _options(found: Attention, block: Visit, *, overwritten: bool) -> _Options:
    """Returns the attributes that do not depend on how the projections are laid out."""
    q, k, attended = found.query, found.key, found.attended
    core = block.module.get_submodule(_within(attended.path, block.path))
    return {
        "has_rotary": q.is_turned or k.is_turned,
        "scales_queries": q.is_scaled,
        "has_alibi": has_distance_bias(attended),
        "repeats_keys": attended.key.shape[1] > k.n_heads,
        "has_sinks": "sinks" in core._parameters,
        "core": _within(attended.path, found.path) if attended.path != found.path else "",
        "joins_heads": attended.joins_heads,
        "joins_operands": attended.joins_operands,
        "output_is_overwritten": overwritten,
        "norms_rotated": q.is_turned_first or k.is_turned_first,
        "sink_scales_z": sink_scales_z(attended),
        **_gate_options(found.gate),
    }


def _separate(
    found: Attention, parts: Mapping[str, GeneralizedComponent], name: str, options: _Options
) -> AttentionBridge:
    """Returns attention whose queries, keys and values have a map each."""
    q, v, gate = found.query, found.value, found.gate
    maps = {}
    own = [("q", q), ("k", found.key), *([] if v.map is found.key.map else [("v", v)])]
    for letter, one in own:
        step = 2 * one.d_head if letter == "q" and gate is not None and gate.is_in_queries else one.d_head
        check_order(letter, one, step, exact=letter == "v")
        maps[letter] = _linear(found, one.map)
    return AttentionBridge(
        name,
        submodules={**parts, **maps},
        **options,
        d_head=q.d_head,
        d_head_v=None if v.d_head == q.d_head else v.d_head,
        value_scale=v.ratio,
        kv_heads=found.key.n_heads,
    )


def _sharing(
    found: Attention, parts: Mapping[str, GeneralizedComponent], name: str, options: _Options
) -> SharedKeysAttentionBridge:
    """Returns attention that uses an earlier layer's keys and values."""
    q, v = found.query, found.value
    assert found.source is not None, "found so"
    check_order("q", q, q.d_head, exact=False)
    return SharedKeysAttentionBridge(
        name,
        submodules={**parts, "q": _linear(found, q.map)},
        **options,
        source=found.source,
        kv_heads=found.key.n_heads,
        d_head=q.d_head,
        d_head_v=None if v.d_head == q.d_head else v.d_head,
    )


def _within(path: str, around: str) -> str:
    return path.removeprefix(f"{around}.")


def _linear(found: Attention, visit: Visit) -> GeneralizedComponent:
    return linear_template(visit, _within(visit.path, found.path), _layout(visit))


def _layout(visit: Visit) -> Layout:
    left = visit.left
    assert left is not None, "calls without an output are left out"
    return Layout.HEADS_FIRST if left.ndim == 4 else Layout.TOKENS


def _gate_options(gate: Gate | None) -> _GateOptions:
    if gate is None:
        return {}
    return {
        "gate_activation": gate.activation,
        "gate_is_of_head": gate.is_of_head,
        "gate_in_queries": gate.is_in_queries,
    }


def _between(found: Attention) -> Iterator[tuple[str, GeneralizedComponent]]:
    """Yields the map of a gate, and the norm of z."""
    if found.gate is not None and not found.gate.is_in_queries:
        yield "gate", _linear(found, found.gate.map)
    if found.o_norm is not None:
        yield "o_norm", _latent_norm(found, found.o_norm)


def _norms(found: Attention, block: Visit, trace: Trace) -> Iterator[tuple[str, GeneralizedComponent]]:
    assert block.entered is not None, "a block reads the stream"
    positions = block.entered.shape[1]
    own = (("q_norm", found.query, "head"), ("k_norm", found.key, "kv_head"), ("v_norm", found.value, "kv_head"))
    for name, one, head in own[: None if found.source is None else 1]:
        if one.norm is None:
            continue
        kind, left = norm_kind(one.norm), one.norm.left
        assert kind is not None, "found as a norm"
        assert left is not None, "a norm has an output"
        first = left.ndim == 4 and left.shape[2] == positions and left.shape[1] != positions
        yield (
            name,
            NormalizationBridge(
                name=_within(one.norm.path, found.path),
                uses_rms_norm=kind.is_rms,
                weight_offset=kind.offset,
                axes=f"batch pos {head} d_head" if left.ndim == 4 else "batch pos width",
                layout=Layout.HEADS_FIRST if first else Layout.TOKENS,
                call=call_number(trace, one.norm),
            ),
        )


def _latent(
    found: Attention, parts: dict[str, GeneralizedComponent], name: str, *, has_rotary: bool, has_sinks: bool
) -> LatentAttentionBridge:
    """Returns attention whose keys come partly from values' map and partly from one that all heads share."""
    q, k, v = found.query, found.key, found.value
    if v.norm is not None:
        raise MissingStructureError(f"values of latents are normed by {v.norm.path}")
    up = v.map
    assert up.left is not None, "calls without an output are left out"
    nope = up.left.shape[-1] // q.n_heads - v.d_head
    if up.left.shape[-1] % q.n_heads or not 0 < nope < k.d_head:
        raise MissingStructureError(f"{up.path} gives no keys and values of {q.n_heads} heads")
    by_reader = {one.reader: one for one in found.lows}
    if up not in by_reader:
        raise MissingStructureError(f"{up.path} reads no norm of a latent")
    low, own = by_reader[up].map, by_reader.get(q.map)
    shared = [one for one in (k.map, *k.others) if one not in (up, low)]
    if len(shared) > 1 or any(not gives_rest(low, one) for one in shared):
        raise MissingStructureError(f"keys come from {', '.join(one.path for one in shared)} too")
    queries = {"q": q.map} if own is None else {"q_a": own.map, "q_b": q.map}
    return LatentAttentionBridge(
        name=name,
        submodules={
            **{key: _linear(found, one) for key, one in queries.items()},
            **({} if own is None else {"q_a_norm": _latent_norm(found, own.norm)}),
            **({"k_rope_norm": _latent_norm(found, shared[0])} if shared else {}),
            "kv_a": _linear(found, low),
            "kv_a_norm": _latent_norm(found, by_reader[up].norm),
            "kv_b": _linear(found, up),
            **parts,
        },
        d_head_nope=nope,
        d_head_rope=k.d_head - nope,
        d_head_v=v.d_head,
        has_rotary=has_rotary,
        has_sinks=has_sinks,
        **_gate_options(found.gate),
        latent_multiplier=by_reader[up].multiplier,
        query_multiplier=1.0 if own is None else own.multiplier,
        joins_query_latent=own is not None and own.is_joined,
    )


def _latent_norm(found: Attention, norm: Visit) -> NormalizationBridge:
    kind = norm_kind(norm)
    assert kind is not None, "found as a norm"
    is_one_head = norm.left is not None and norm.left.ndim == 4
    return NormalizationBridge(
        name=_within(norm.path, found.path),
        uses_rms_norm=kind.is_rms,
        weight_offset=kind.offset,
        axes="batch pos 1 width" if is_one_head else "batch pos width",
        layout=Layout.HEADS_FIRST if is_one_head else Layout.TOKENS,
    )
