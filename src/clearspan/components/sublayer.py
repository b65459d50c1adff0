"""Sublayers of a block: where one reads the residual stream, and where and how it adds to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clearspan.components.attention import GeneralAttentionBridge
from clearspan.components.base import GeneralizedComponent
from clearspan.components.factors import Offset, Scale, is_one, value_of
from clearspan.components.linear import LinearBridge
from clearspan.components.mlp import MLPBridge, MoEBridge
from clearspan.components.normalization import NormalizationBridge
from clearspan.components.opaque import OpaqueBridge
from clearspan.components.opaque_attention import OpaqueAttentionBridge
from clearspan.conversions import ChainedConversion, ScaledConversion, ShiftedConversion
from clearspan.errors import ConflictingWritesError, MissingWeightError
from clearspan.points import Access, Converted, Derivation, Place, Side, Whole

SublayerKind = Literal["attn", "mixer", "mlp"]
"""What a sublayer does: softmax attention by head, another way to mix positions, or each position on its own."""

_LAST = ("o", "out", "out_proj")
"""What the projections are called whose output is that of a sublayer."""


def part_kind(name: str) -> SublayerKind:
    """Returns what a sublayer of some name does: `attn2` is attention, `mlp2`, `moe` and `ple` MLPs, others mixers.

    Example:
        >>> part_kind("attn2"), part_kind("moe"), part_kind("mixer")
        ('attn', 'mlp', 'mixer')
    """
    base = name.rstrip("0123456789")
    if base.endswith("attn"):
        return "attn"
    return "mlp" if base in ("mlp", "moe", "ple", "laurel") else "mixer"


def required_kind(name: str, part: GeneralizedComponent | None) -> type[GeneralizedComponent]:
    """Returns the kind of component that a sublayer of some name must be.

    MLPs may be opaque; attention has heads that are seen, so that another way to mix positions has another name.
    """
    match part_kind(name):
        case "attn":
            return OpaqueAttentionBridge if isinstance(part, OpaqueAttentionBridge) else GeneralAttentionBridge
        case "mlp":
            return next((kind for kind in (MoEBridge, OpaqueBridge) if isinstance(part, kind)), MLPBridge)
        case "mixer":
            return GeneralizedComponent


def projection_input(attention: str, projection: str) -> str:
    """Returns the leaf of the point of what one projection of an attention reads.

    Example:
        >>> projection_input("attn", "q"), projection_input("attn2", "k")
        ('hook_q_input', 'hook_k2_input')
    """
    number = attention.removeprefix("attn")
    is_numbered = number != attention and (not number or number.isdigit())
    return f"hook_{projection}{number}_input" if is_numbered else f"hook_{attention}_{projection}_input"


def stream_at(stage: int) -> str:
    """Returns the leaf of the point with the stream that a stage of a block reads.

    Example:
        >>> [stream_at(stage) for stage in range(3)]
        ['hook_resid_pre', 'hook_resid_mid', 'hook_resid_mid2']
    """
    return "hook_resid_pre" if not stage else f"hook_resid_mid{stage if stage > 1 else ''}"


@dataclass(frozen=True, eq=False)
class Sublayer:
    """A live sublayer of a block.

    What a block asks of its part: `first`, the component that reads the stream (or the norm's output); `last`, whose
    output it adds; `reads()` and `adds()`, the linear maps that do that, where it is linear maps.

    Attributes:
        name: Its name in the block, such as `attn`, `mlp`, `mixer`, `attn2`.
        part: The component.
        block: Path of the block, such as `blocks.3`.
        stage: Number of the stage whose stream it reads, from 0.
        adds_at: Number of the stage after which it is added; later than `stage` for a shortcut.
        norm: The norm through which it reads the stream, or None.
        norm_after: The norm on its output, or None.
        shares_norm: Whether another sublayer of the stage reads through the same norm.
        input_factor: What the block multiplies its input by, after the norm.
        scale: What the block multiplies its output by, after the norm on it.
        named_out: Where its contribution is, if the adapter says so.
        offset: What the block adds to that product, besides the stream, or None.
    """

    name: str
    part: GeneralizedComponent
    block: str
    stage: int
    adds_at: int
    norm: NormalizationBridge | None
    norm_after: NormalizationBridge | None
    shares_norm: bool
    input_factor: float
    scale: Scale
    named_out: Place | None
    offset: Offset | None = None

    @property
    def kind(self) -> SublayerKind:
        """What it does; attention whose heads are not known by their weights mixes positions in another way."""
        return "mixer" if isinstance(self.part, OpaqueAttentionBridge) else part_kind(self.name)

    @property
    def multiplier(self) -> float | Tensor:
        """What the block multiplies its output by, as it is now: a number, or `[d_model]`."""
        return value_of(self.scale)

    @property
    def bias(self) -> Tensor | None:
        """What the bias of its output projection adds to the stream, `[d_model]`; None where it has none.

        Raises:
            MissingWeightError: A norm lies between, so that it depends on the input.
        """
        last = next((self.part.submodules[key] for key in _LAST if key in self.part.submodules), None)
        bias = last.bias_or_none() if isinstance(last, LinearBridge) else None
        if bias is not None and self.norm_after is not None:
            raise MissingWeightError(
                f"what the output bias of {self.part.path} adds to the stream depends on the input",
                reason=f"it goes through the norm {self.norm_after.path}",
                fix="cache.get_full_resid_decomposition(...), which takes a run's own scale of the norm",
            )
        return None if bias is None else bias * self.multiplier

    @property
    def layer(self) -> int:
        """The layer that it is in."""
        return int(self.block.rpartition(".")[2])

    @property
    def label(self) -> str:
        """What labels of its heads and neurons begin with: `L3`, and `L3.attn2.` for a further attention."""
        return f"L{self.layer}" + ("" if self.name in ("attn", "mlp") else f".{self.name}.")

    @property
    def hook_in(self) -> str:
        """Name of the point where it reads the stream."""
        return f"{self.block}.hook_{self.name}_in"

    @property
    def hook_out(self) -> str:
        """Name of the point that shows what it adds."""
        return f"{self.block}.hook_{self.name}_out"

    @property
    def reads(self) -> Place:
        """Where it reads the stream."""
        return (self.norm or self.part.first).place(Side.INPUT)

    @property
    def reads_at(self) -> str:
        """Name of a point with the stream as it enters it, for all heads at once."""
        if part_kind(self.name) != "attn":
            return self.hook_in
        return f"{self.part.path if self.norm is None else self.norm.path}.hook_in"

    @property
    def adds(self) -> Place:
        """Where its contribution is, before the multiplier."""
        if self.norm_after is not None:
            return self.norm_after.place(Side.OUTPUT)
        return self.named_out or self.part.last.place(Side.OUTPUT)

    @property
    def added(self) -> Access:
        """How its contribution shows there."""
        if self.offset is not None:
            return Converted(ChainedConversion(ScaledConversion(self.scale), ShiftedConversion(self.offset)))
        if is_one(self.scale):
            last = next((self.part.submodules[key] for key in ("o", "out") if key in self.part.submodules), None)
            if self.norm_after is None and isinstance(last, LinearBridge):
                return last.output_access
            return Whole()
        return Converted(ScaledConversion(self.scale))

    def entering(self) -> Callable[[Tensor], Tensor] | None:
        """Returns what lies between the stream and the part's input, or None for nothing."""
        norm = None if self.norm is None else self.norm.module.forward
        factor = self.input_factor
        if factor == 1:
            return norm
        return lambda value: (value if norm is None else norm(value)) * factor


class SublayerInput(Derivation):
    """The residual stream as read by a sublayer that shares a norm; a write acts on the sublayer's input.

    Args:
        sublayer: The sublayer.
    """

    is_in_series = False
    PART = "input"

    def __init__(self, sublayer: Sublayer) -> None:
        first = sublayer.part.first
        self.path = sublayer.part.path
        self.entering = sublayer.entering()
        self.targets: tuple[Place, ...] = (first.place(Side.INPUT),)

    def read(self, part: str, source: Tensor, edits: Mapping[str, Tensor]) -> Tensor:
        """Returns the residual stream."""
        return source

    def write(self, target: Place, raw: Tensor, source: Tensor, edits: Mapping[str, Tensor], entered: Tensor) -> Tensor:
        """Returns the sublayer's input for the edited residual stream.

        Raises:
            ConflictingWritesError: The shared norm was written in the same run.
        """
        if not torch.allclose(entered, self._normalized(source), rtol=0, atol=0, equal_nan=True):
            kind = "the MLP" if part_kind(self.path.rpartition(".")[2]) == "mlp" else self.path
            raise ConflictingWritesError(
                f"{kind}'s own input was written, and the output of the norm that it shares with attention as well",
                where=self.path,
                fix=f"write the norm's output alone, or {self.path.rpartition('.')[2]}.hook_in, which comes after both",
            )
        return self._normalized(edits[self.PART])

    def _normalized(self, value: Tensor) -> Tensor:
        return value if self.entering is None else self.entering(value)
