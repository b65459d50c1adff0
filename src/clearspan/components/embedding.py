"""Token and position embeddings, and the unembedding."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.components.base import GeneralizedComponent
from clearspan.components.linear import LinearBridge
from clearspan.components.weights import Weight, WeightTensor
from clearspan.conversions import ScaledConversion
from clearspan.errors import UnwritableError
from clearspan.points import Converted, HookPoint, Place, SharedRow, Side, Whole, entry_of


@dataclass(eq=False, repr=False)
class EmbeddingBridge(GeneralizedComponent):
    """The token embedding. What it adds to the residual stream is `hook_embed`.

    Attributes:
        multiplier: What the model multiplies the embedding by outside its module.
        ends_at: Path of the norm or projection through which it reaches the residual stream, or None.
    """

    _: KW_ONLY
    multiplier: float = 1.0
    ends_at: str | None = None

    _shown = ("n_tokens", "width")
    input_axes = "batch pos"

    @Weight
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding `[d_vocab, d_model]`, the live parameter."""
        return self.told_of_ties("W_E", self.weight("weight"), self.parameter("weight"))

    @property
    def width(self) -> int:
        """The embedding's own width; a projection to the residual stream's may follow."""
        return self.shape("weight")[1]

    @property
    def n_tokens(self) -> int:
        """How many tokens it has now: it may have been resized."""
        return self.shape("weight")[0]

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, including the embedding's own width."""
        return {**super().sizes(), "width": self.width}

    @property
    def output_axes(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The output's axes: of the residual stream, or narrower where a projection follows."""
        return "batch pos d_model" if self.width == self.cfg.d_model else "batch pos width"

    def points(self) -> Iterator[HookPoint]:
        """Yields `hook_embed`."""
        place = self.place(Side.OUTPUT) if self.ends_at is None else Place(self.ends_at, Side.OUTPUT)
        access = Whole() if self.multiplier == 1 else Converted(ScaledConversion(self.multiplier))
        sizes = {"d_model": self.cfg.d_model}
        yield HookPoint("hook_embed", entry_of("hook_embed").axes, place, access, sizes=sizes)


@dataclass(eq=False, repr=False)
class PosEmbedBridge(GeneralizedComponent):
    """A learned position embedding. Its output is `hook_pos_embed`.

    Attributes:
        offset: Rows of the table before that of position 0.
        input_is_positions: Whether the module's first input is positions, not a mask.
    """

    _: KW_ONLY
    offset: int = 0
    input_is_positions: bool = True

    input_axes = "batch pos"

    @Weight
    def W_pos(self) -> Float[Tensor, "pos d_model"]:
        """The position embedding `[pos, d_model]`, the live parameter or a view of it."""
        return self.weight("weight")[self.offset :] if self.offset else self.weight("weight")

    def points(self) -> Iterator[HookPoint]:
        """Yields `hook_pos_embed`, with the batch's rows even if the model computes one row for all."""
        axes, sizes = entry_of("hook_pos_embed").axes, {"d_model": self.cfg.d_model}
        yield HookPoint("hook_pos_embed", axes, self.place(Side.OUTPUT), SharedRow(), sizes=sizes)

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields the positions, if the module gets them, and the output, with the batch's rows."""
        if self.input_is_positions:
            yield self.point("hook_in", self.place(Side.INPUT), SharedRow(), dimensions=self.input_axes)
        yield self.point("hook_out", self.place(Side.OUTPUT), SharedRow(), dimensions=self.output_axes)

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields the input, if it is not positions."""
        if not self.input_is_positions:
            yield f"{self.path}.hook_in", "the module makes positions from the padding mask, which is its input"


@dataclass(eq=False, repr=False)
class UnembeddingBridge(LinearBridge):
    """The unembedding, from the final norm's output to logits before any scale or cap of the model's.

    Attributes:
        scale: What the model multiplies its output by.
        softcap: Where the model caps the scaled logits by `cap * tanh(logits / cap)`, or None.
    """

    _: KW_ONLY
    scale: float = 1.0
    softcap: float | None = None

    output_axes = "batch pos d_vocab"

    @Weight
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding `[d_model, d_vocab]`, a view of the live parameter."""
        return self.told_of_ties("W_U", self.matrix.T, self.parameter("weight"))

    @Weight
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        """The bias `[d_vocab]`: the live parameter, or without one zeros of stride 0 that refuse writes."""
        bias = self.bias_or_none()
        if bias is not None:
            return bias
        weight = self.parameter("weight")
        zeros = torch.zeros(1, dtype=weight.dtype, device=weight.device).expand(len(weight))
        return WeightTensor.of(zeros, before=self._refuse_bias)

    def _refuse_bias(self) -> None:
        raise UnwritableError(
            "the unembedding has no bias, and zeros that stand for it cannot be written",
            fix="bridge.unembed.module.bias = torch.nn.Parameter(...)",
        )

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields the input, and the logits before any scale or cap."""
        before, _ = super().raw_ends()
        yield before
        yield self.point("hook_out", self.place(Side.OUTPUT), dimensions=self.output_axes)
