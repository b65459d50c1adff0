"""Mixers as adapters describe them: one function a layout of Hugging Face's modules, with explicit sizes."""

from collections.abc import Callable, Mapping, Sequence

from clearspan.components import GeneralizedComponent, LinearBridge, MixerBridge, Part, WeightsBridge
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
from clearspan.conversions import ChainedConversion, ChannelsConversion, HeadsConversion, ScaledConversion
from clearspan.points import Side

Builder = Callable[..., MixerBridge]

_QUERIES, _VALUES = "batch pos qk_head d_head_qk", "batch pos head d_head_v"
_GATE = "batch pos d_inner"


def _linear(**names: str) -> dict[str, GeneralizedComponent]:
    return {key: LinearBridge(name) for key, name in names.items()}


def _conv(name: str) -> dict[str, GeneralizedComponent]:
    return {"conv1d": WeightsBridge(name)}


def selective_scan(name: str, *, d_inner: int, state: int, has_norms: bool = False) -> MixerBridge:
    """Returns Mamba's mixer.

    Args:
        name: Path of its module in the block.
        d_inner: Its width.
        state: Channels of each channel's state.
        has_norms: Whether step sizes, B and C are normed (Jamba, FalconMamba).
    """
    norms = ("dt_layernorm", "b_layernorm", "c_layernorm") if has_norms else ()
    parts = _linear(in_proj="in_proj", x_proj="x_proj", out_proj="out_proj") | _conv("conv1d")
    parts |= {"dt_proj": WeightsBridge("dt_proj")} | {norm: WeightsBridge(norm) for norm in norms}
    return MixerBridge(name, submodules=parts, kind=SELECTIVE_SCAN, dims={"d_inner": d_inner, "state": state})


def selective_scan_by_head(name: str, *, d_inner: int) -> MixerBridge:
    """Returns Zamba's mixer: Mamba in heads, each scanned by itself.

    Args:
        name: Path of its module in the block.
        d_inner: Its width.
    """
    parts = _linear(in_proj="in_proj", out_proj="out_proj") | _conv("conv1d")
    return MixerBridge(name, submodules=parts, kind=SELECTIVE_BY_HEAD, dims={"d_inner": d_inner})


def state_space_heads(
    name: str, *, heads: int, d_head: int, groups: int, state: int, gate_scale: float = 1.0, norm: str | None = "norm"
) -> MixerBridge:
    """Returns Mamba 2's mixer.

    Args:
        name: Path of its module in the block.
        heads: Its heads.
        d_head: Width of a head.
        groups: Groups of heads that share B and C.
        state: Channels of each channel's state.
        gate_scale: What the model multiplies the gate by before its activation function (Falcon-H1).
        norm: Name of the norm before the output projection, or None.
    """
    channels = ChannelsConversion(0, heads * d_head)
    gate = channels if gate_scale == 1 else ChainedConversion(channels, ScaledConversion(gate_scale))
    parts = _linear(in_proj="in_proj", out_proj="out_proj") | _conv("conv1d")
    if norm is not None:
        parts["norm"] = WeightsBridge(norm)
    return MixerBridge(
        name,
        submodules=parts,
        kind=STATE_SPACE_HEADS,
        dims={"head": heads, "d_head": d_head, "group": groups, "state": state, "d_inner": heads * d_head},
        parts={"hook_gate": Part("in_proj", _GATE, gate)},
    )


def _delta_dims(heads: int, qk_heads: int, d_head_qk: int, d_head_v: int) -> dict[str, int]:
    return {
        "head": heads,
        "qk_head": qk_heads,
        "d_head_qk": d_head_qk,
        "d_head_v": d_head_v,
        "d_inner": heads * d_head_v,
    }


def _joined(of: str, qk_heads: int, d_head_qk: int, heads: int, d_head_v: int) -> dict[str, Part]:
    """Returns queries, keys and values before a convolution, one after another in one projection."""
    keys = qk_heads * d_head_qk
    return {
        "hook_q_pre_conv": Part(of, _QUERIES, ChannelsConversion(0, keys, d_head=d_head_qk)),
        "hook_k_pre_conv": Part(of, _QUERIES, ChannelsConversion(keys, keys, d_head=d_head_qk)),
        "hook_v_pre_conv": Part(of, _VALUES, ChannelsConversion(2 * keys, heads * d_head_v, d_head=d_head_v)),
    }


def _apart(qk_heads: int, heads: int) -> dict[str, Part]:
    """Returns queries, keys and values before a convolution, each with a projection of its own."""
    return {
        "hook_q_pre_conv": Part("q", _QUERIES, HeadsConversion(qk_heads)),
        "hook_k_pre_conv": Part("k", _QUERIES, HeadsConversion(qk_heads)),
        "hook_v_pre_conv": Part("v", _VALUES, HeadsConversion(heads)),
    }


def gated_delta(
    name: str,
    *,
    heads: int,
    qk_heads: int,
    d_head_qk: int,
    d_head_v: int,
    submodules: Mapping[str, str],
    repeats_keys: bool = False,
) -> MixerBridge:
    """Returns a mixer by the gated delta rule.

    Args:
        name: Path of its module in the block.
        heads: Heads of its values.
        qk_heads: Heads of its queries and keys.
        d_head_qk: Width of a head's queries and keys.
        d_head_v: Width of a head's values.
        submodules: Names of its linear maps: `q`, `k`, `v` (OLMo-hybrid), `qkv` (Qwen3.5) or `qkvz` (Qwen3-Next), the
            gate `z` where it is apart, `a` and `b` or `ba`, and `out_proj`; and of its `norm`.
        repeats_keys: Whether its code repeats queries and keys for all heads before the recurrence.
    """
    parts = _linear(**{key: path for key, path in submodules.items() if key != "norm"}) | _conv("conv1d")
    parts["norm"] = WeightsBridge(submodules["norm"])
    if "qkvz" in submodules:
        per = heads // qk_heads * d_head_v
        places = {
            "hook_q_pre_conv": Part("qkvz", _QUERIES, ChannelsConversion(0, d_head_qk, qk_heads, d_head_qk)),
            "hook_k_pre_conv": Part("qkvz", _QUERIES, ChannelsConversion(d_head_qk, d_head_qk, qk_heads, d_head_qk)),
            "hook_v_pre_conv": Part("qkvz", _VALUES, ChannelsConversion(2 * d_head_qk, per, qk_heads, d_head_v)),
            "hook_gate": Part("qkvz", _GATE, ChannelsConversion(2 * d_head_qk + per, per, qk_heads)),
        }
    else:
        joined = "qkv" in submodules
        places = _joined("qkv", qk_heads, d_head_qk, heads, d_head_v) if joined else _apart(qk_heads, heads)
        places["hook_gate"] = Part("z", _GATE)
    return MixerBridge(
        name,
        submodules=parts,
        kind=GATED_DELTA,
        dims=_delta_dims(heads, qk_heads, d_head_qk, d_head_v),
        parts=places,
        repeats_keys=repeats_keys,
    )


def _in_a_row(key: str, names: Sequence[str]) -> dict[str, str]:
    """Returns one linear map as `key`, or two in a row as `key_a` and `key_b`."""
    return {key: names[0]} if len(names) == 1 else dict(zip((f"{key}_a", f"{key}_b"), names, strict=True))


def channel_delta(name: str, *, heads: int, d_head: int, gate: Sequence[str], decay: Sequence[str]) -> MixerBridge:
    """Returns Kimi's delta attention.

    Args:
        name: Path of its module in the block.
        heads: Its heads.
        d_head: Width of a head.
        gate: Names of the gate's linear maps, one or two in a row.
        decay: Names of the decay's.
    """
    gates = _in_a_row("z", gate)
    named = {**gates, **_in_a_row("f", decay)}
    parts = _linear(q="q_proj", k="k_proj", v="v_proj", b="b_proj", out_proj="o_proj", **named) | _conv("conv1d")
    parts |= {"forget_gate": WeightsBridge("forget_gate"), "norm": WeightsBridge("o_norm")}
    places = {**_apart(heads, heads), "hook_gate": Part(list(gates)[-1], _GATE)}
    return MixerBridge(
        name, submodules=parts, kind=CHANNEL_DELTA, dims=_delta_dims(heads, heads, d_head, d_head), parts=places
    )


def short_conv(name: str, *, d_inner: int) -> MixerBridge:
    """Returns LFM2's short convolution between two gates.

    Args:
        name: Path of its module in the block.
        d_inner: Its width.
    """

    def third(place: int) -> Part:
        return Part("in_proj", _GATE, ChannelsConversion(place * d_inner, d_inner))

    return MixerBridge(
        name,
        submodules=_linear(in_proj="in_proj", out_proj="out_proj") | _conv("conv"),
        kind=SHORT_CONV,
        dims={"d_inner": d_inner},
        parts={"hook_input_gate": third(0), "hook_gate": third(1), "hook_conv_in": third(2)},
    )


def gated_recurrence(name: str, *, d_inner: int) -> MixerBridge:
    """Returns RecurrentGemma's recurrent block.

    Args:
        name: Path of its module in the block.
        d_inner: Its width.
    """
    parts = _linear(in_proj="linear_x", gate="linear_y", out_proj="linear_out") | _conv("conv_1d")
    return MixerBridge(
        name,
        submodules={**parts, "rg_lru": WeightsBridge("rg_lru")},
        kind=GATED_RECURRENCE,
        dims={"d_inner": d_inner},
        parts={"hook_conv": Part("rg_lru", _GATE, None, Side.INPUT), "hook_gate": Part("gate", _GATE)},
    )


def weighted_average(name: str, *, d_inner: int) -> MixerBridge:
    """Returns RWKV's attention.

    Args:
        name: Path of its module in the block.
        d_inner: Its width.
    """
    return MixerBridge(
        name,
        submodules=_linear(k="key", v="value", gate="receptance", out_proj="output"),
        kind=WEIGHTED_AVERAGE,
        dims={"d_inner": d_inner},
        parts={"hook_gate": Part("gate", _GATE)},
    )


def matrix_memory(name: str, *, heads: int, d_head_qk: int, d_head_v: int) -> MixerBridge:
    """Returns xLSTM's layer.

    Args:
        name: Path of its module in the block.
        heads: Its heads.
        d_head_qk: Width of a head's queries and keys.
        d_head_v: Width of a head's values.
    """
    linear = _linear(q="q", k="k", v="v", gate="ogate_preact", i="igate_preact", f="fgate_preact", out_proj="out_proj")
    return MixerBridge(
        name,
        submodules={**linear, "norm": WeightsBridge("multihead_norm")},
        kind=MATRIX_MEMORY,
        dims={"head": heads, "d_head_qk": d_head_qk, "d_head_v": d_head_v, "d_inner": heads * d_head_v},
        parts={"hook_gate": Part("gate", _GATE)},
    )


def lightning(name: str, *, heads: int, d_head: int) -> MixerBridge:
    """Returns MiniMax's lightning attention, whose recurrence is in its own forward.

    Args:
        name: Path of its module in the block.
        heads: Its heads.
        d_head: Width of a head.
    """

    def third(place: int, axes: str) -> Part:
        channels = ChannelsConversion(place * d_head, d_head, groups=heads, d_head=d_head)
        return Part("act", axes, channels)

    linear = _linear(in_proj="qkv_proj", gate="output_gate", out_proj="out_proj")
    return MixerBridge(
        name,
        submodules={**linear, "act": WeightsBridge("act_fn"), "norm": WeightsBridge("norm")},
        kind=INLINE,
        dims=_delta_dims(heads, heads, d_head, d_head),
        parts={
            "hook_q": third(0, _QUERIES),
            "hook_k": third(1, _QUERIES),
            "hook_v": third(2, _VALUES),
            "hook_recurrence_out": Part("norm", _VALUES, HeadsConversion(heads), Side.INPUT),
            "hook_gate": Part("gate", _GATE),
        },
    )
