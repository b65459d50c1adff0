"""Which calls of the builders of mixers may make a mixer's template."""

from collections.abc import Iterator, Mapping

from clearspan.architectures import mixers
from clearspan.components import MixerBridge, MixerKind
from clearspan.components.mixer_kinds import (
    CHANNEL_DELTA,
    GATED_DELTA,
    GATED_RECURRENCE,
    INLINE,
    MATRIX_MEMORY,
    SELECTIVE_BY_HEAD,
    SELECTIVE_SCAN,
    SHORT_CONV,
    STATE_SPACE_HEADS,
    WEIGHTED_AVERAGE,
)
from clearspan.structure.entries import Entries
from clearspan.structure.expression import Call, Expression

_HEADS = {"heads": "head", "d_head_qk": "d_head_qk", "d_head_v": "d_head_v"}
_WIDTH = {"d_inner": "d_inner"}
_FUNCTIONS: Mapping[MixerKind, tuple[mixers.Builder, Mapping[str, str]]] = {
    SELECTIVE_SCAN: (mixers.selective_scan, {**_WIDTH, "state": "state"}),
    SELECTIVE_BY_HEAD: (mixers.selective_scan_by_head, _WIDTH),
    STATE_SPACE_HEADS: (
        mixers.state_space_heads,
        {"heads": "head", "d_head": "d_head", "groups": "group", "state": "state"},
    ),
    GATED_DELTA: (mixers.gated_delta, {"heads": "head", "qk_heads": "qk_head", **_HEADS}),
    CHANNEL_DELTA: (mixers.channel_delta, {"heads": "head", "d_head": "d_head_v"}),
    SHORT_CONV: (mixers.short_conv, _WIDTH),
    GATED_RECURRENCE: (mixers.gated_recurrence, _WIDTH),
    WEIGHTED_AVERAGE: (mixers.weighted_average, _WIDTH),
    MATRIX_MEMORY: (mixers.matrix_memory, _HEADS),
    INLINE: (mixers.lightning, {"heads": "head", "d_head": "d_head_v"}),
}
"""Builders by kind, with the axis that each of their keywords is the size of."""


def mixer_calls(part: MixerBridge, entries: Entries) -> Iterator[Call]:
    """Yields a call that may make a mixer."""
    function, keywords = _FUNCTIONS.get(part.kind, (None, {}))
    if function is not None and all(axis in part.dims for axis in keywords.values()):
        sizes = {keyword: entries.count(keyword, part.dims[axis]) for keyword, axis in keywords.items()}
        yield Call(function, [part.name], {**sizes, **_further(part)})


def _further(part: MixerBridge) -> dict[str, Expression]:
    """Returns what a kind's builder takes besides sizes."""
    names = {key: one.name for key, one in part.submodules.items() if key not in ("conv1d", "forget_gate")}
    if part.kind is SELECTIVE_SCAN and "dt_layernorm" in names:
        return {"has_norms": True}
    if part.kind is STATE_SPACE_HEADS and names.get("norm") != "norm":
        return {"norm": names.get("norm")}
    if part.kind is GATED_DELTA:
        return {"submodules": names}
    if part.kind is CHANNEL_DELTA:
        rows = {"gate": ("z_a", "z_b", "z"), "decay": ("f_a", "f_b", "f")}
        return {name: [names[key] for key in keys if key in names] for name, keys in rows.items()}
    return {}
