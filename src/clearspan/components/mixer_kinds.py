"""Kinds of mixers, as data: which functions their code calls, and which of their values are which hook points.

A new type of model whose mixer calls one of these functions needs nothing here: `KINDS` finds its kind by their names.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from clearspan.points import Argument, Function, Role


@dataclass(frozen=True, eq=False)
class MixerKind:
    """A kind of mixer.

    Attributes:
        name: Its name, as of the constant in this module.
        roles: What it calls functions for.
        points: Its hook points by name: the role, and the value.
        later: Its parts that do not read the mixer's input, but what another part made of it.
        reads_linearly: Whether the parts that read its input do so as linear maps of one token.
        absent: Points of other kinds that it lacks, with the reason.
    """

    name: str
    roles: tuple[Role, ...]
    points: Mapping[str, tuple[str, str]]
    later: frozenset[str] = frozenset({"out_proj"})
    reads_linearly: bool = True
    absent: Mapping[str, str] = field(default_factory=dict)

    def role(self, name: str) -> Role:
        """Returns one of its roles."""
        return next(role for role in self.roles if role.name == name)

    def __repr__(self) -> str:
        return self.name


def _function(name: str, result: str, arguments: Mapping[str, tuple[str, str]], **more: object) -> Function:
    return Function(name, {value: Argument(*named) for value, named in arguments.items()}, result, **more)  # pyright: ignore[reportArgumentType]


def _conv() -> Role:
    return Role(
        "conv",
        (
            _function("causal_conv1d_fn", "batch width pos", {}, is_longer=True),
            _function("causal_conv1d_update", "batch width pos", {}),
        ),
        {"out": "batch pos width"},
    )


CONV = _conv()
"""A short causal convolution, with its activation function; every kind that has one calls it in the same way."""

_STATE_SPACE = {"raw_dt": "dt", "A": "A", "B": "B", "C": "C", "D": "D", "gate": "z"}


def _arguments(axes: Mapping[str, str], names: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    return {value: (names[value], axes[value]) for value in axes}


_SELECTIVE = Role(
    "scan",
    (
        _function(
            "mamba_selective_scan",
            "batch d_inner pos",
            _arguments(
                {
                    "x": "batch d_inner pos",
                    "raw_dt": "batch d_inner pos",
                    "dt_bias": "d_inner",
                    "A": "d_inner state",
                    "B": "batch state pos",
                    "C": "batch state pos",
                    "D": "d_inner",
                    "gate": "batch d_inner pos",
                },
                {**_STATE_SPACE, "x": "hidden_states", "dt_bias": "delta_bias"},
            ),
            softplus="delta_softplus",
        ),
        _function(
            "mamba_selective_state_update",
            "batch d_inner",
            _arguments(
                {
                    "x": "batch d_inner",
                    "raw_dt": "batch d_inner",
                    "dt_bias": "d_inner",
                    "A": "d_inner state",
                    "B": "batch state",
                    "C": "batch state",
                    "D": "d_inner",
                    "gate": "batch d_inner",
                },
                {**_STATE_SPACE, "x": "hidden_states", "dt_bias": "dt_bias"},
            ),
            softplus="dt_softplus",
            state=Argument("state", "batch d_inner state"),
            writes_state=True,
        ),
    ),
    {
        "x": "batch pos d_inner",
        "raw_dt": "batch pos d_inner",
        "dt": "batch pos d_inner",
        "dt_bias": "d_inner",
        "A": "batch pos d_inner state",
        "B": "batch pos state",
        "C": "batch pos state",
        "D": "d_inner",
        "gate": "batch pos d_inner",
        "state": "batch pos d_inner state",
        "out": "batch pos d_inner",
    },
    carried="x",
    still=("raw_dt",),
    fused=("mamba_inner_fn",),
)

_BY_HEAD = Role(
    "scan",
    (
        _function(
            "mamba2_chunk_scan",
            "batch pos head d_head",
            _arguments(
                {
                    "x": "batch pos head d_head",
                    "raw_dt": "batch pos head",
                    "dt_bias": "head",
                    "A": "head",
                    "B": "batch pos group state",
                    "C": "batch pos group state",
                    "D": "head",
                    "gate": "batch pos head d_head",
                },
                {**_STATE_SPACE, "x": "hidden_states", "dt_bias": "dt_bias"},
            ),
            softplus="dt_softplus",
            state=Argument("initial_states", "batch head d_head state"),
        ),
        _function(
            "mamba2_selective_state_update",
            "batch head d_head",
            _arguments(
                {
                    "x": "batch head d_head",
                    "raw_dt": "batch head (d_head)",
                    "dt_bias": "head (d_head)",
                    "A": "head (d_head) (state)",
                    "B": "batch group state",
                    "C": "batch group state",
                    "D": "head (d_head)",
                    "gate": "batch head d_head",
                },
                {**_STATE_SPACE, "x": "hidden_states", "dt_bias": "dt_bias"},
            ),
            softplus="dt_softplus",
            state=Argument("state", "batch head d_head state"),
            writes_state=True,
        ),
    ),
    {
        "x": "batch pos head d_head",
        "raw_dt": "batch pos head",
        "dt": "batch pos head",
        "dt_bias": "head",
        "A": "batch pos head",
        "B": "batch pos group state",
        "C": "batch pos group state",
        "D": "head",
        "gate": "batch pos head d_head",
        "attention": "batch head q_pos k_pos",
        "state": "batch pos head d_head state",
        "out": "batch pos head d_head",
    },
    carried="x",
    still=("raw_dt",),
    fused=("mamba2_split_conv1d_scan_combined",),
)


def _delta(whole: str, single: str, decay: str) -> Role:
    """Returns the role of a delta rule's functions, which have the same arguments."""
    axes = {
        "q": "batch pos qk_head d_head_qk",
        "k": "batch pos qk_head d_head_qk",
        "v": "batch pos head d_head_v",
        "log_decay": decay,
        "beta": "batch pos head",
    }
    names = {"q": "query", "k": "key", "v": "value", "log_decay": "g", "beta": "beta"}
    state = Argument("initial_state", "batch head d_head_qk d_head_v")
    functions = tuple(
        _function(
            name,
            "batch pos head d_head_v",
            _arguments(axes, names),
            state=state,
            settings={"output_final_state": True},
            keeps=("use_qk_l2norm_in_kernel",),
        )
        for name in (whole, single)
    )
    return Role(
        "recurrence",
        functions,
        {
            **axes,
            "attention": "batch head q_pos k_pos",
            "state": "batch pos head d_head_qk d_head_v",
            "out": "batch pos head d_head_v",
        },
        carried="v",
        still=("log_decay", "beta"),
    )


_CHANNELS_SEPARATE = "every channel has a matrix of its own, not every head"
_NO_CONV = "no convolution comes before the recurrence"
_SCAN = {
    "hook_dt_proj": ("scan", "raw_dt"),
    "hook_dt": ("scan", "dt"),
    "hook_A": ("scan", "A"),
    "hook_B": ("scan", "B"),
    "hook_C": ("scan", "C"),
    "hook_scan_in": ("scan", "x"),
    "hook_scan_out": ("scan", "out"),
    "hook_state": ("scan", "state"),
}
_DELTA = {
    "hook_conv": ("conv", "out"),
    "hook_q": ("recurrence", "q"),
    "hook_k": ("recurrence", "k"),
    "hook_v": ("recurrence", "v"),
    "hook_log_decay": ("recurrence", "log_decay"),
    "hook_beta": ("recurrence", "beta"),
    "hook_effective_attention": ("recurrence", "attention"),
    "hook_state": ("recurrence", "state"),
    "hook_recurrence_out": ("recurrence", "out"),
}

SELECTIVE_SCAN = MixerKind(
    "SELECTIVE_SCAN",
    (CONV, _SELECTIVE),
    {"hook_conv": ("conv", "out"), **_SCAN, "hook_gate": ("scan", "gate")},
    frozenset({"x_proj", "dt_proj", "out_proj"}),
    absent={"hook_effective_attention": _CHANNELS_SEPARATE},
)
"""Mamba: each channel has a state and step sizes of its own."""

STATE_SPACE_HEADS = MixerKind(
    "STATE_SPACE_HEADS",
    (CONV, _BY_HEAD),
    {"hook_conv": ("conv", "out"), **_SCAN, "hook_effective_attention": ("scan", "attention")},
)
"""Mamba 2: the channels of a head share their step sizes."""

GATED_DELTA = MixerKind(
    "GATED_DELTA",
    (CONV, _delta("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "batch pos head")),
    _DELTA,
)
"""The gated delta rule: one decay for each head."""

CHANNEL_DELTA = MixerKind(
    "CHANNEL_DELTA",
    (CONV, _delta("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention", "batch pos head d_head_qk")),
    _DELTA,
)
"""Kimi's delta attention: one decay for each channel of a head's queries and keys."""

SHORT_CONV = MixerKind(
    "SHORT_CONV",
    (CONV,),
    {"hook_conv": ("conv", "out")},
    absent={"hook_effective_attention": _CHANNELS_SEPARATE, "hook_state": "it has no state but its last inputs"},
)
"""A short convolution between two gates, without a recurrence (LFM2)."""

GATED_RECURRENCE = MixerKind(
    "GATED_RECURRENCE",
    (
        Role(
            "scan",
            (
                _function(
                    "_rnn_scan",
                    "batch pos d_inner",
                    {"x": ("hidden_states", "batch pos d_inner"), "decay": ("recurrent_gate", "batch pos d_inner")},
                ),
            ),
            {"x": "batch pos d_inner", "decay": "batch pos d_inner", "out": "batch pos d_inner"},
            caller="rg_lru",
        ),
    ),
    {"hook_scan_in": ("scan", "x"), "hook_decay": ("scan", "decay"), "hook_scan_out": ("scan", "out")},
    absent={
        "hook_state": "the state is the recurrence's own output, hook_scan_out",
        "hook_effective_attention": _CHANNELS_SEPARATE,
    },
)
"""RecurrentGemma: each channel is a leaky sum, whose decay depends on the token."""

WEIGHTED_AVERAGE = MixerKind(
    "WEIGHTED_AVERAGE",
    (
        Role(
            "recurrence",
            (
                _function(
                    "rwkv_linear_attention",
                    "batch pos d_inner",
                    {"k": ("key", "batch pos d_inner"), "v": ("value", "batch pos d_inner")},
                ),
            ),
            {"k": "batch pos d_inner", "v": "batch pos d_inner", "out": "batch pos d_inner"},
        ),
    ),
    {
        "hook_k": ("recurrence", "k"),
        "hook_v": ("recurrence", "v"),
        "hook_recurrence_out": ("recurrence", "out"),
    },
    reads_linearly=False,
    absent={
        "hook_conv": _NO_CONV,
        "hook_state": "the state is three tensors: a sum, the sum of its weights, and their largest exponent",
        "hook_effective_attention": _CHANNELS_SEPARATE,
    },
)
"""RWKV: each channel is an average of its values, weighted by keys and by distance."""

MATRIX_MEMORY = MixerKind(
    "MATRIX_MEMORY",
    (
        Role(
            "recurrence",
            (
                _function(
                    "forward",
                    "batch head pos d_head_v",
                    {
                        "q": ("query", "batch head pos d_head_qk"),
                        "k": ("key", "batch head pos d_head_qk"),
                        "v": ("value", "batch head pos d_head_v"),
                        "input_gate": ("igate", "batch head pos"),
                        "forget_gate": ("fgate", "batch head pos"),
                    },
                    state=Argument("c_initial", "batch head d_head_qk d_head_v"),
                ),
            ),
            {
                "q": "batch pos head d_head_qk",
                "k": "batch pos head d_head_qk",
                "v": "batch pos head d_head_v",
                "input_gate": "batch pos head",
                "forget_gate": "batch pos head",
                "attention": "batch head q_pos k_pos",
                "out": "batch pos head d_head_v",
            },
            carried="v",
            caller="mlstm_backend",
        ),
    ),
    {
        "hook_q": ("recurrence", "q"),
        "hook_k": ("recurrence", "k"),
        "hook_v": ("recurrence", "v"),
        "hook_input_gate": ("recurrence", "input_gate"),
        "hook_forget_gate": ("recurrence", "forget_gate"),
        "hook_effective_attention": ("recurrence", "attention"),
        "hook_recurrence_out": ("recurrence", "out"),
    },
    absent={
        "hook_conv": _NO_CONV,
        "hook_state": "the state is three tensors: a matrix, a normaliser, and their largest exponent",
    },
)
"""xLSTM's matrix memory."""

INLINE = MixerKind(
    "INLINE",
    (),
    {},
    absent={
        "hook_conv": _NO_CONV,
        "hook_state": "the recurrence is in the module's own forward, which calls no function for it",
        "hook_effective_attention": "the recurrence is in the module's own forward, which calls no function for it",
    },
)
"""A mixer that calls no function for its recurrence (MiniMax): its points are at the ends of its parts."""

_APART = "each head is scanned by a call of its own, so that no call has the whole value"

SELECTIVE_BY_HEAD = MixerKind(
    "SELECTIVE_BY_HEAD",
    (CONV,),
    {"hook_conv": ("conv", "out")},
    absent=dict.fromkeys((*_SCAN, "hook_effective_attention"), _APART),
)
"""Zamba: Mamba in heads, each scanned by itself."""

KINDS: Mapping[str, MixerKind] = {
    function.name: kind
    for kind in (
        SHORT_CONV,
        SELECTIVE_SCAN,
        STATE_SPACE_HEADS,
        GATED_DELTA,
        CHANNEL_DELTA,
        GATED_RECURRENCE,
        WEIGHTED_AVERAGE,
    )
    for role in kind.roles
    for function in role.functions
    if role is not CONV or kind is SHORT_CONV
} | {"mlstm_backend": MATRIX_MEMORY, "x_proj_weight": SELECTIVE_BY_HEAD}
"""Kinds by the names, of functions, parts or parameters, that a mixer's code uses."""


def kind_among(names: Iterable[str]) -> MixerKind | None:
    """Returns the kind of a mixer whose code uses these names; None where it uses none of a mixer's.

    A recurrence tells more than the convolution before it.
    """
    found = {KINDS[name] for name in names if name in KINDS}
    if SELECTIVE_BY_HEAD in found:
        return SELECTIVE_BY_HEAD
    return next(iter(found - {SHORT_CONV} or found), None)
