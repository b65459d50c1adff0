"""Attention whose product of queries and keys is seen, and not what its queries, keys and values are made of."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field

from clearspan.components.opaque import OpaqueBridge
from clearspan.components.weights import AbsentWeight
from clearspan.points import HookPoint, Layout, Place, Side

_NOT_MAPS = "queries, keys and values are not each one linear map of attention's input"
_COMPRESSED = "its keys are those of positions and of compressed blocks of positions, which are no axis of positions"
_UNKNOWN_OUTPUT = "what heads found reaches the output in a way that is no linear map of each head"


@dataclass(eq=False, repr=False)
class OpaqueAttentionBridge(OpaqueBridge):
    """Attention whose product is seen: queries and keys as multiplied, scores, pattern, and what heads find.

    What the product's queries, keys and values are made of is not known, nor how its result becomes what attention
    adds, so that it has no weights by letter.

    Attributes:
        core: Path, in its module, of the module that multiplies queries and keys; empty where its own does.
        n_heads: Query heads.
        n_kv_heads: Key and value heads.
        d_head: Channels of a query and a key.
        d_head_v: Channels of what a head finds.
        keys_are_positions: Whether there is one key for each position.
        has_rotary: Whether positions are rotated into queries and keys.
        has_sinks: Whether a sink, which is no key, takes a share of each query's attention.
    """

    _: KW_ONLY
    core: str = ""
    n_heads: int = 1
    n_kv_heads: int = 1
    d_head: int = 1
    d_head_v: int = 1
    keys_are_positions: bool = True
    has_rotary: bool = False
    has_sinks: bool = False

    hook_rot_q: HookPoint = field(init=False)
    hook_z: HookPoint = field(init=False)

    W_Q = AbsentWeight(_NOT_MAPS)
    W_K = AbsentWeight(_NOT_MAPS)
    W_V = AbsentWeight(_NOT_MAPS)
    W_O = AbsentWeight(_UNKNOWN_OUTPUT)
    b_Q = AbsentWeight(_NOT_MAPS)
    b_K = AbsentWeight(_NOT_MAPS)
    b_V = AbsentWeight(_NOT_MAPS)
    b_O = AbsentWeight(_UNKNOWN_OUTPUT)

    @property
    def core_path(self) -> str:
        """Path, in the model, of the module that multiplies queries and keys."""
        return f"{self.module_path}.{self.core}" if self.core else self.module_path

    def claims(self) -> Iterator[str]:
        """Yields its module, and the sinks where other parts of it are named."""
        yield from super().claims()
        if self.has_sinks and self.submodules:
            yield f"{self.core_path}.sinks"

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, with its own heads."""
        own = {"head": self.n_heads, "kv_head": self.n_kv_heads, "d_head": self.d_head, "d_head_v": self.d_head_v}
        return {**super().sizes(), **own}

    def points(self) -> Iterator[HookPoint]:
        """Yields what is seen of the product."""
        yield self.point("hook_rot_q", self._inside(Side.QUERY))
        if self.keys_are_positions:
            yield self.point("hook_rot_k", self._inside(Side.KEY))
            yield self.point("hook_attn_scores", self._inside(Side.SCORES))
            yield self.point("hook_pattern", self._inside(Side.PATTERN))
        axes = "batch pos head d_head" if self.d_head_v == self.d_head else "batch pos head d_head_v"
        yield self.point("hook_z", Place(self.core_path, Side.Z), dimensions=axes)

    def _inside(self, side: Side) -> Place:
        by_head = side in (Side.QUERY, Side.KEY)
        return Place(self.core_path, side, layout=Layout.HEADS_FIRST if by_head else Layout.ROWS_BY_ROWS)

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields what is not known, and what reads the residual stream by head."""
        block = self.path.rpartition(".")[0]
        for name in ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"):
            yield f"{block}.{name}", _NOT_MAPS
        for name in ("hook_q", "hook_k", "hook_v"):
            yield f"{self.path}.{name}", _NOT_MAPS
        yield f"{self.path}.hook_result", _UNKNOWN_OUTPUT
        if not self.keys_are_positions:
            for name in ("hook_rot_k", "hook_attn_scores", "hook_pattern"):
                yield f"{self.path}.{name}", _COMPRESSED
