"""Which calls of the builders of mixers may make a mixer's template."""

from collections.abc import Iterator, Mapping

from clearspan.architectures import mixers
from clearspan.components import MixerBridge
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
_FUNCTIONS: Mapping[str, tuple[mixers.Builder, Mapping[str, str]]] = {
    SELECTIVE_SCAN.name: (mixers.selective_scan, {**_WIDTH, "state": "state"}),
    SELECTIVE_BY_HEAD.name: (mixers.selective_scan_by_head, _WIDTH),
    STATE_SPACE_HEADS.name: (
        mixers.state_space_heads,
        {"heads": "head", "d_head": "d_head", "groups": "group", "state": "state"},
    ),
    GATED_DELTA.name: (mixers.gated_delta, {"heads": "head", "qk_heads": "qk_head", **_HEADS}),
    CHANNEL_DELTA.name: (mixers.channel_delta, {"heads": "head", "d_head": "d_head_v"}),
    SHORT_CONV.name: (mixers.short_conv, _WIDTH),
    GATED_RECURRENCE.name: (mixers.gated_recurrence, _WIDTH),
    WEIGHTED_AVERAGE.name: (mixers.weighted_average, _WIDTH),
    MATRIX_MEMORY.name: (mixers.matrix_memory, _HEADS),
    INLINE.name: (mixers.lightning, {"heads": "head", "d_head": "d_head_v"}),
}
"""Builders by the name of the kind, with the axis that each of their keywords is the size of."""


def mixer_calls(part: MixerBridge, entries: Entries) -> Iterator[Call]:
    """Yields a call that may make a mixer."""
    function, keywords = _FUNCTIONS.get(part.kind.name, (None, {}))
    if function is not None and all(axis in part.dims for axis in keywords.values()):
        sizes = {keyword: entries.count(keyword, part.dims[axis]) for keyword, axis in keywords.items()}
        yield Call(function, [part.name], {**sizes, **_further(part)})


def _further(part: MixerBridge) -> dict[str, Expression]:
    """Returns what a kind's builder takes besides sizes."""
    names = {key: one.name for key, one in part.submodules.items() if key not in ("conv1d", "forget_gate")}
    if part.kind.name == SELECTIVE_SCAN.name and "dt_layernorm" in names:
        return {"has_norms": True}
    if part.kind.name == STATE_SPACE_HEADS.name and names.get("norm") != "norm":
        return {"norm": names.get("norm")}
    if part.kind.name == GATED_DELTA.name:
        return {"submodules": names, **({"repeats_keys": True} if part.repeats_keys else {})}
    if part.kind.name == CHANNEL_DELTA.name:
        rows = {"gate": ("z_a", "z_b", "z"), "decay": ("f_a", "f_b", "f")}
        return {name: [names[key] for key in keys if key in names] for name, keys in rows.items()}
    return {}
