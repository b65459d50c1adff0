"""Attention's parts: which modules make queries, keys and values, and what becomes of what the heads found."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from clearspan.components import (
    AttentionBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    JointQKVAttentionBridge,
    LatentAttentionBridge,
    NormalizationBridge,
)
from clearspan.conversions import (
    BlockedQKVConversionRule,
    GateActivation,
    GateConversion,
    GroupedQKVConversionRule,
    QKVConversionRule,
    SlicedQKVConversionRule,
)
from clearspan.points import Layout
from clearspan.structure.algebra import as_tokens, factor, linear_kind, norm_kind, origins, rounded, same
from clearspan.structure.finding import Findings, MissingStructureError
from clearspan.structure.templates import call_number, linear_template
from clearspan.structure.trace import Attended, Trace, Visit


@dataclass(eq=False)
class Projected:
    """Where queries, keys or values come from.

    Attributes:
        map: The linear map's call; of several, that of the first channel.
        channels: For each head's channel, which channel of the map's output it is.
        others: The calls of further maps that give a part of the channels.
        norm: The norm that they pass, or None.
        is_turned: Whether positions change them after map and norm.
        n_heads: How many heads differ.
        d_head: Channels of a head.
        is_turned_first: Whether positions change them before the norm.
        ratio: What the map's output is multiplied by.
        is_scaled: Whether they are multiplied by a number of their position besides.
    """

    map: Visit
    channels: list[int]
    others: list[Visit]
    norm: Visit | None
    is_turned: bool
    n_heads: int
    d_head: int
    is_turned_first: bool = False
    ratio: float = 1.0
    is_scaled: bool = False

    def heads(self) -> list[tuple[int, ...]]:
        """Returns the channels of each head that differs from those before."""
        split = [tuple(self.channels[i : i + self.d_head]) for i in range(0, len(self.channels), self.d_head)]
        return list(dict.fromkeys(split))


@dataclass(frozen=True)
class Gate:
    """What multiplies z before the output projection.

    Attributes:
        map: The call of the linear map that it comes from.
        activation: The function that makes it of the map's output.
        is_of_head: Whether it is one number for each head.
        is_in_queries: Whether it is the second half of each head's channels in the query map's output.
    """

    map: Visit
    activation: GateActivation
    is_of_head: bool = False
    is_in_queries: bool = False


@dataclass(frozen=True)
class Low:
    """A latent that a linear map reads.

    Attributes:
        reader: The call of the map.
        norm: The call of the norm that gives it.
        map: The call of the map that the norm reads.
        multiplier: What the norm's output is multiplied by before that.
    """

    reader: Visit
    norm: Visit
    map: Visit
    multiplier: float = 1.0


@dataclass(eq=False)
class Attention:
    """What was found of a layer's attention.

    Attributes:
        attended: The product of queries and keys.
        query: Where queries come from.
        key: Where keys come from.
        value: Where values come from.
        output: The output projection's call.
        gate: What multiplies z before it, or None.
        o_norm: The call of the norm of z before it, or None.
        path: Path of the module with all of these.
        lows: The maps and norms before a projection's own map, where that reads a latent.
    """

    attended: Attended
    query: Projected
    key: Projected
    value: Projected
    output: Visit
    path: str
    gate: "Gate | None" = None
    o_norm: Visit | None = None
    lows: tuple["Low", ...] = ()

    @property
    def reader(self) -> Visit:
        """The call of the first map of queries."""
        return next((one.map for one in self.lows if one.reader is self.query.map), self.query.map)


def find_attention(trace: Trace, block: Visit, attended: Attended) -> Attention:
    """Returns the modules of one attention in a block.

    Raises:
        MissingStructureError: Heads' outputs reach the output projection changed, or projections are no linear maps.
    """
    rows, positions, _ = _shape(block)
    inside = trace.inside(block)
    output, gate, o_norm = _output(inside, attended, rows, positions)
    earlier = [one for one in inside if one.order < output.order]
    found = [
        _projected(letter, heads, earlier, rows, positions)
        for letter, heads in (("queries", attended.query), ("keys", attended.key), ("values", attended.value))
    ]
    if found[2].is_turned or found[2].is_scaled:
        raise MissingStructureError(f"positions change the values of {attended.path}")
    paths = [attended.path, output.path, *(one.map.path for one in found)]
    paths += [] if gate is None else [gate.map.path]
    lows = tuple(one for one in (_low(one.map, earlier) for one in (found[0], found[2])) if one is not None)
    return Attention(attended, *found, output, _around(paths, block.path), gate, o_norm, lows)


def _low(reader: Visit, earlier: Sequence[Visit]) -> Low | None:
    """Returns the latent that a map reads, or None where it reads no norm of a part of another map's output."""
    for norm in earlier:
        multiplier = _multiplier(norm, reader) if norm_kind(norm) else None
        inward = None if multiplier is None else next((one for one in earlier if _gives_latent(one, norm)), None)
        if multiplier is not None and inward is not None:
            return Low(reader, norm, inward, multiplier)
    return None


def _gives_latent(one: Visit, norm: Visit) -> bool:
    """Whether a norm reads the first channels of a map's output."""
    if norm.entered is None or one.left is None or one.order > norm.order or not linear_kind(one):
        return False
    width = norm.entered.shape[-1]
    return one.left.shape[-1] >= width and same(one.left[..., :width], norm.entered)


def _multiplier(norm: Visit, reader: Visit) -> float | None:
    """Returns what a norm's output is multiplied by before a map reads it, or None where the map reads another."""
    return None if norm.left is None or reader.entered is None else factor(norm.left, reader.entered)


def _shape(block: Visit) -> tuple[int, int, int]:
    assert block.entered is not None, "a block reads the stream"
    rows, positions, width = block.entered.shape
    return rows, positions, width


def _around(paths: Sequence[str], outermost: str) -> str:
    """Returns the path of the innermost module that has all of these in it."""
    parts = [path.split(".") for path in paths]
    common = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    path = ".".join(common)
    if path == outermost or not path.startswith(outermost):
        raise MissingStructureError(f"attention in {outermost} has no module of its own")
    return path


def _output(
    inside: Sequence[Visit], attended: Attended, rows: int, positions: int
) -> tuple[Visit, Gate | None, Visit | None]:
    """Returns the output projection's call, and the gate or the norm between z and it."""
    z = attended.result.reshape(rows, positions, -1)
    later = [one for one in inside if one.order > attended.order and linear_kind(one)]
    norms = [one for one in inside if norm_kind(one) and same(_tokens(one.entered, rows, positions), z)]
    for call in later:
        entered = _tokens(call.entered, rows, positions)
        if entered is None or entered.shape != z.shape:
            continue
        if same(entered, z):
            return call, None, None
        norm = next((one for one in norms if same(call.entered, one.left)), None)
        if norm is not None:
            return call, None, norm
    for call in later:
        entered = _tokens(call.entered, rows, positions)
        if entered is not None and entered.shape == z.shape:
            gate = _gate(inside, entered, attended, rows, positions)
            if gate is not None:
                return call, gate, None
    raise MissingStructureError(
        f"what the heads of {attended.path} found reaches no linear map as it is, gated, or normed"
    )


def _tokens(value: Tensor | None, rows: int, positions: int) -> Tensor | None:
    return None if value is None else as_tokens(value, rows, positions)


def _gate(inside: Sequence[Visit], gated: Tensor, attended: Attended, rows: int, positions: int) -> Gate | None:
    """Returns the linear map whose output, through an activation function, multiplies z."""
    z = attended.result.reshape(rows, positions, attended.result.shape[2], -1)
    heads, width = z.shape[2:]
    for call in inside:
        left = _tokens(call.left, rows, positions) if linear_kind(call) else None
        if left is None:
            continue
        ways = {heads * width: (False, False), heads: (True, False), 2 * heads * width: (False, True)}
        if left.shape[-1] not in ways:
            continue
        is_of_head, is_in_queries = ways[left.shape[-1]]
        by_head = left.unflatten(-1, (heads, -1))
        before = by_head[..., width:] if is_in_queries else by_head
        for activation in get_args(GateActivation):
            number = GateConversion(heads, activation).activate(before)
            if same((z * number).flatten(2), gated):
                return Gate(call, activation, is_of_head, is_in_queries)
    return None


def _projected(name: str, heads: Tensor, earlier: Sequence[Visit], rows: int, positions: int) -> Projected:
    """Returns where queries, keys or values come from: position 0, which no rotation turns, tells channels apart."""
    by_head = heads.transpose(1, 2)  # [row, pos, head, d_head]
    d_head, target = by_head.shape[-1], by_head.flatten(2)
    found = _origins(target[:, 0], earlier, rows, positions)
    norm, chosen, index = None, found, list[int]()
    if all(one is not None and norm_kind(one[0]) for one in found):
        norm = next(one[0] for one in found if one is not None)
        entered = None if norm.entered is None else as_tokens(norm.entered, rows, positions)
        assert entered is not None, "as its output has"
        before = [one for one in earlier if one.order < norm.order]
        index = [one[1] for one in found if one is not None]
        chosen = _origins(entered[:, 0][:, index], before, rows, positions)
    missing = sum(one is None for one in chosen)
    if missing:
        raise MissingStructureError(
            f"{missing} of {len(chosen)} channels of {name} come from no linear map as they are"
        )
    present = [one for one in chosen if one is not None]
    maps = list(dict.fromkeys(one[0] for one in present))
    channels = [one[1] for one in present]
    plain = _at_all_positions(found, rows, positions)
    lengths = [torch.linalg.vector_norm(one, dim=(0, 2), keepdim=True) for one in (target, plain)]
    scale = lengths[0] / lengths[1]  # of each position; a rotation keeps lengths
    is_scaled = not same(scale, torch.ones_like(scale))
    turned = not same(plain * scale if is_scaled else plain, target)
    rotated_first = False
    if norm is not None and not turned:
        entered = as_tokens(norm.entered, rows, positions) if norm.entered is not None else None
        assert entered is not None, "the norm was found by its input"
        rotated_first = not same(_at_all_positions(chosen, rows, positions), entered[..., index])
    is_turned = turned or rotated_first
    ratios = torch.tensor([one[2] for one in present], dtype=torch.float64)
    ratio = rounded(float(ratios.median()))
    projected = Projected(maps[0], channels, maps[1:], norm, is_turned, 0, d_head, rotated_first, ratio, is_scaled)
    projected.n_heads = len(projected.heads())
    return projected


Channel = tuple[Visit, int, float] | None


def _origins(target: Tensor, calls: Sequence[Visit], rows: int, positions: int) -> list[Channel]:
    given = []
    for call in calls:
        if call.left is not None and call.left.is_floating_point() and (linear_kind(call) or norm_kind(call)):
            tokens = as_tokens(call.left, rows, positions)
            if tokens is not None:
                given.append((call, tokens[:, 0]))
    return origins(target, given)


def _at_all_positions(found: Sequence[Channel], rows: int, positions: int) -> Tensor:
    """Returns the channels that were found at the first position, `[row, pos, channel]`."""
    outputs: dict[Visit, Tensor] = {}
    columns = []
    for one in found:
        assert one is not None, "checked by the caller"
        visit, index, ratio = one
        if visit not in outputs:
            assert visit.left is not None, "calls without an output are left out"
            tokens = as_tokens(visit.left, rows, positions)
            assert tokens is not None, "found by the caller"
            outputs[visit] = tokens
        columns.append(outputs[visit][..., index] * ratio)
    return torch.stack(columns, -1)


# --- templates -------------------------------------------------------------------------------------------------------


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
    parts = {"o": _linear(found, found.output), **dict(_norms(found, block, trace)), **dict(_between(found))}
    options = {
        "name": _within(found.path, block.path),
        "has_rotary": q.is_turned or k.is_turned,
        "scales_queries": q.is_scaled,
        "has_alibi": _has_distance_bias(found.attended),
        "repeats_keys": found.attended.key.shape[1] > k.n_heads,
        "has_sinks": "sinks" in _core(found, block),
        "core": _within(found.attended.path, found.path) if found.attended.path != found.path else "",
        "joins_heads": found.attended.joins_heads,
        "joins_operands": found.attended.joins_operands,
        "output_is_overwritten": overwritten,
        "norms_rotated": q.is_turned_first or k.is_turned_first,
        "sink_scales_z": _sink_scales_z(found.attended),
        **_gate_options(found.gate),
    }
    if k.others:
        return _latent(found, parts, str(options["name"]), has_rotary=q.is_turned or k.is_turned)
    if len({q.map, k.map, v.map}) == 3:
        options |= {
            "d_head_v": None if v.d_head == q.d_head else v.d_head,
            "value_scale": v.ratio,
            "kv_heads": k.n_heads,
        }
        for name, one in (("q", q), ("k", k), ("v", v)):
            step = 2 * one.d_head if name == "q" and found.gate is not None and found.gate.is_in_queries else one.d_head
            _check_order(name, one, step, exact=name == "v")
            parts[name] = _linear(found, one.map)
        findings.add(f"{where}.attn", f"queries, keys and values are {q.map.path}, {k.map.path}, {v.map.path}")
        return AttentionBridge(**options, submodules=parts)
    if q.map is k.map is v.map:
        rule = _rule(q, k, v)
        findings.add(f"{where}.attn", f"queries, keys and values are {q.map.path}, {type(rule).__name__}")
        return JointQKVAttentionBridge(
            **options, qkv_conversion_rule=rule, submodules={"qkv": _linear(found, q.map), **parts}
        )
    names = ", ".join(dict.fromkeys(one.map.path for one in (q, k, v)))
    raise MissingStructureError(f"queries, keys and values come from {names}, each neither alone nor together")


def _has_distance_bias(attended: Attended) -> bool:
    """Whether scores have a share that is the same for all rows, and no mask: the last position sees all others."""
    if attended.scores is None or len(attended.query) < 2:
        return False
    query, key, scores = (one.double() for one in (attended.query, attended.key, attended.scores))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    products = (query @ key.transpose(-1, -2))[:, :, -1]
    last = scores[:, :, -1].expand_as(products)
    seen = (last > last.max() - 1e4).all(0)  # a window's mask is a bias too, and a much larger one
    slope, change = ((one[1] - one[0])[seen] for one in (products, last))
    bias = last[0] - (slope * change).sum() / slope.square().sum() * products[0]
    return any(float(row[there].std()) > 1e-3 for row, there in zip(bias, seen, strict=True) if int(there.sum()) > 1)


def _core(found: Attention, block: Visit) -> Sequence[str]:
    module = block.module.get_submodule(_within(found.attended.path, block.path))
    return list(module._parameters)


def _within(path: str, around: str) -> str:
    return path.removeprefix(f"{around}.")


def _linear(found: Attention, visit: Visit) -> GeneralizedComponent:
    return linear_template(visit, _within(visit.path, found.path), _layout(visit))


def _layout(visit: Visit) -> Layout:
    left = visit.left
    assert left is not None, "calls without an output are left out"
    return Layout.HEADS_FIRST if left.ndim == 4 else Layout.TOKENS


def _gate_options(gate: Gate | None) -> dict[str, object]:
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


def _sink_scales_z(attended: Attended) -> bool:
    """Whether a sink takes its share of z, and not of the pattern; the first position sees itself alone."""
    if attended.call is None:
        return False
    value = attended.value[:, :, 0].repeat_interleave(attended.query.shape[1] // attended.value.shape[1], 1)
    if same(attended.result[:, 0], value):
        return False
    first = attended.call.inside()[1][:, :, 0, 0]
    return same(first, torch.ones_like(first))


def _norms(found: Attention, block: Visit, trace: Trace) -> Iterator[tuple[str, GeneralizedComponent]]:
    positions = _shape(block)[1]
    for name, one, head in (("q_norm", found.query, "head"), ("k_norm", found.key, "kv_head")):
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


def _check_order(name: str, one: Projected, step: int, *, exact: bool) -> None:
    """Raises unless a map's output is heads one after the other; rotation may have reordered the channels of a head."""
    heads = one.heads()
    wanted = [tuple(range(index * step, index * step + one.d_head)) for index in range(len(heads))]
    found = heads if exact else [tuple(sorted(head)) for head in heads]
    if found != wanted or one.others:
        raise MissingStructureError(f"the channels of {name} are not the output of {one.map.path} head by head")


def _rule(q: Projected, k: Projected, v: Projected) -> QKVConversionRule:
    assert q.map.left is not None, "calls without an output are left out"
    width = q.map.left.shape[-1]
    if (q.n_heads + 2 * v.n_heads) * q.d_head == width:
        for rule in _rules(q.n_heads, q.d_head, v.n_heads):
            parts = (part.flatten().tolist() for part in rule.split(torch.arange(width), 0))
            if all(_is_laid(one, part) for one, part in zip((q, k, v), parts, strict=True)):
                return rule
    raise MissingStructureError(f"{q.map.path} holds queries, keys and values neither in blocks nor in slices of heads")


def _rules(n_heads: int, d_head: int, n_kv_heads: int) -> Iterator[QKVConversionRule]:
    """Yields the ways in which queries, keys and values may share an axis."""
    yield BlockedQKVConversionRule(n_heads, d_head, n_kv_heads)
    yield GroupedQKVConversionRule(n_heads, d_head, n_kv_heads)
    for slices in range(1, n_kv_heads + 1):
        if n_kv_heads % slices == 0:
            for order in itertools.permutations("qkv"):
                yield SlicedQKVConversionRule(n_heads, d_head, n_kv_heads, slices, order)


def _is_laid(one: Projected, channels: Sequence[int]) -> bool:
    heads = [tuple(channels[i : i + one.d_head]) for i in range(0, len(channels), one.d_head)]
    return [tuple(sorted(head)) for head in one.heads()] == heads


def _latent(
    found: Attention, parts: dict[str, GeneralizedComponent], name: str, *, has_rotary: bool
) -> LatentAttentionBridge:
    """Returns attention whose keys come partly from values' map and partly from one that all heads share."""
    q, k, v = found.query, found.key, found.value
    up = v.map
    low = next(one for one in (k.map, *k.others) if one is not up)
    assert up.left is not None, "calls without an output are left out"
    nope = up.left.shape[-1] // q.n_heads - v.d_head
    if up.left.shape[-1] % q.n_heads or not 0 < nope < k.d_head:
        raise MissingStructureError(f"{up.path} gives no keys and values of {q.n_heads} heads")
    by_reader = {one.reader: one for one in found.lows}
    if up not in by_reader:
        raise MissingStructureError(f"{up.path} reads no norm of a latent")
    own = by_reader.get(q.map)
    queries = {"q": q.map} if own is None else {"q_a": own.map, "q_b": q.map}
    return LatentAttentionBridge(
        name=name,
        submodules={
            **{key: _linear(found, one) for key, one in queries.items()},
            **({} if own is None else {"q_a_norm": _latent_norm(found, own.norm)}),
            "kv_a": _linear(found, low),
            "kv_a_norm": _latent_norm(found, by_reader[up].norm),
            "kv_b": _linear(found, up),
            **parts,
        },
        d_head_nope=nope,
        d_head_rope=k.d_head - nope,
        d_head_v=v.d_head,
        has_rotary=has_rotary,
        **_gate_options(found.gate),
        latent_multiplier=by_reader[up].multiplier,
    )


def _latent_norm(found: Attention, norm: Visit) -> NormalizationBridge:
    kind = norm_kind(norm)
    assert kind is not None, "found as a norm"
    return NormalizationBridge(
        name=_within(norm.path, found.path),
        uses_rms_norm=kind.is_rms,
        weight_offset=kind.offset,
        axes="batch pos width",
    )
