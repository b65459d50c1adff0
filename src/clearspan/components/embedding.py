"""Token and position embeddings, the unembedding, and what may lie before it."""

import weakref
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.components.base import GeneralizedComponent
from clearspan.components.factors import BlockParameter, Factor, Offset, Scale, Terms, is_one, value_of
from clearspan.components.linear import LinearBridge
from clearspan.components.weights import LinearMap, Weight, WeightTensor
from clearspan.conversions import ChainedConversion, ChannelsConversion, ScaledConversion, ShiftedConversion
from clearspan.errors import MissingWeightError, UnwritableError
from clearspan.points import Access, Converted, HookPoint, Place, SharedRow, Side, Whole, entry_of


@dataclass(eq=False, repr=False)
class EmbeddingBridge(GeneralizedComponent):
    """The token embedding. What it adds to the residual stream is `hook_embed`.

    A part `norm` is a norm in its own module, which rows of the table pass (Inkling).

    Attributes:
        multiplier: What the model multiplies the embedding by outside its module: a number, or the path of a parameter
            `[d_model]`.
        offset: What the model adds to that product, as sums of products of parameters `[d_model]`, by their paths.
        ends_at: Path of the norm or projection through which it reaches the residual stream, or None.
        ends_at_call: Which call of that module in a forward this is, where the model calls it several times, or None.
    """

    _: KW_ONLY
    multiplier: Factor = 1.0
    offset: Terms = ()
    ends_at: str | None = None
    ends_at_call: int | None = None

    _shown = ("n_tokens", "width")
    input_axes = "batch pos"

    @Weight
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding `[d_vocab, d_model]`, the live parameter."""
        return self.told_of_ties("W_E", self.weight("weight"), self.parameter("weight"))

    def claims(self) -> Iterator[str]:
        """Yields the module's path, or that of its table where a part of it is named, and what is applied after it."""
        yield f"{self.module_path}.weight" if self.submodules else self.module_path
        factor = (self.multiplier,) if isinstance(self.multiplier, str) else ()
        yield from dict.fromkeys((*factor, *(path for term in self.offset for path in term)))

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
        return "batch pos d_model" if self.width == self._fixed.d_model else "batch pos width"

    def points(self) -> Iterator[HookPoint]:
        """Yields `hook_embed`."""
        end = None if self.ends_at is None else Place(self.ends_at, Side.OUTPUT, call=self.ends_at_call)
        place = end or self.place(Side.OUTPUT)
        sizes = {"d_model": self._fixed.d_model}
        yield HookPoint("hook_embed", entry_of("hook_embed").axes, place, self._added, sizes=sizes)

    @property
    def _scale(self) -> Scale:
        factor = self.multiplier
        return BlockParameter(weakref.ref(self._bound.model), factor) if isinstance(factor, str) else float(factor)

    @property
    def factor(self) -> float | Tensor:
        """What the model multiplies it by outside its module, as it is now: a number, or `[d_model]`."""
        return value_of(self._scale)

    @property
    def _added(self) -> Access:
        """How the embedding shows, as it reaches the residual stream."""
        scaled, offset = ScaledConversion(self._scale), Offset.of(self._bound.model, self.offset)
        if offset is not None:
            return Converted(ChainedConversion(scaled, ShiftedConversion(offset)))
        return Whole() if is_one(self._scale) else Converted(scaled)


@dataclass(eq=False, repr=False)
class PosEmbedBridge(GeneralizedComponent):
    """A position embedding, learned or sinusoidal. Its output is `hook_pos_embed`.

    With `layout=Layout.ONE_ROW` the model adds one row `[pos, d_model]` to all rows of the batch (Marian, Pegasus).
    Without a name no module makes what is added: the model's own forward does (CTRL), and it ends in the embedding.

    Attributes:
        offset: Rows of the table before that of position 0.
        input_is_positions: Whether the module's first input is positions, not a mask, a shape or token ids.
        table: Name of the parameter that holds a row for each position, or None where the module computes them.
        padding_id: The token id that gets no position, where the model counts the others: the first has the row
            `offset`, and tokens of this id the row before it (RoBERTa). The model's `position_ids` are then rows. None
            where positions do not depend on ids.
        ends_in_embed: Whether its output goes through the norm or projection at which the token embedding ends, so that
            `hook_embed` has both, and this has no share of the residual stream that could be told apart (BERT).
    """

    _: KW_ONLY
    offset: int = 0
    input_is_positions: bool = True
    table: str | None = "weight"
    padding_id: int | None = None
    ends_in_embed: bool = False

    input_axes = "batch pos"

    @Weight
    def W_pos(self) -> Float[Tensor, "pos d_model"]:
        """The position embedding `[pos, d_model]`, the live parameter or a view of it.

        Raises:
            MissingWeightError: The module computes it for each position.
        """
        if self.table is None:
            reason = "the module computes a position's sines and cosines, and has no weights"
            raise MissingWeightError(f"{self.path} has no W_pos", reason=reason)
        weight = self.weight(self.table)
        return weight[self.offset :] if self.offset else weight

    @property
    def output_axes(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The output's axes: of the residual stream, or narrower where a projection follows."""
        return _embedded_axes(self, self.table)

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, including the table's own width."""
        has_table = self.table is not None and self.has(self.table)
        return {**super().sizes(), **({"width": self.shape(str(self.table))[-1]} if has_table else {})}

    def writes(self) -> Iterator[LinearMap]:
        """Yields the table, where its rows are added to the residual stream."""
        if self.table is not None and not self.ends_in_embed:
            yield LinearMap(self.module, self.table, None, in_axis=-2, out_axis=-1)

    def points(self) -> Iterator[HookPoint]:
        """Yields `hook_pos_embed`, with the batch's rows even if the model computes one row for all."""
        if self.ends_in_embed or self.name is None:
            return
        axes, sizes = entry_of("hook_pos_embed").axes, {"d_model": self._fixed.d_model}
        yield HookPoint("hook_pos_embed", axes, self.place(Side.OUTPUT), SharedRow(), sizes=sizes)

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields the positions, if the module gets them, and the output, with the batch's rows."""
        if self.name is None:
            return
        if self.input_is_positions:
            yield self.point("hook_in", self.place(Side.INPUT), SharedRow(), dimensions=self.input_axes)
        yield self.point("hook_out", self.place(Side.OUTPUT), SharedRow(), dimensions=self.output_axes)

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields the input, if it is not positions, and `hook_pos_embed`, if `hook_embed` has it."""
        if self.name is None:
            yield "hook_pos_embed", "the model adds positions in its own forward, by no module, and hook_embed has them"
            return
        if not self.input_is_positions:
            yield (
                f"{self.path}.hook_in",
                "the module's input is no positions: it makes them from a mask, ids or a shape",
            )
        if self.ends_in_embed:
            reason = (
                "positions are added to the token embedding before its norm or projection, so hook_embed has both; "
            )
            yield "hook_pos_embed", f"{reason}{self.path}.hook_out has them alone"


@dataclass(eq=False, repr=False)
class TypeEmbedBridge(GeneralizedComponent):
    """The embedding of token types (segments). What it adds to the residual stream is `hook_type_embed`.

    Attributes:
        ends_in_embed: Whether its output goes through the norm or projection at which the token embedding ends, so that
            `hook_embed` has both.
    """

    _: KW_ONLY
    ends_in_embed: bool = False

    input_axes = "batch pos"

    @property
    def output_axes(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The output's axes: of the residual stream, or narrower where a projection follows."""
        return _embedded_axes(self, "weight")

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, including the embedding's own width."""
        return {**super().sizes(), "width": self.shape("weight")[-1]}

    def points(self) -> Iterator[HookPoint]:
        """Yields `hook_type_embed`, with the batch's rows even if the model computes one row for all."""
        if not self.ends_in_embed:
            axes, sizes = entry_of("hook_type_embed").axes, {"d_model": self._fixed.d_model}
            yield HookPoint("hook_type_embed", axes, self.place(Side.OUTPUT), SharedRow(), sizes=sizes)

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields the types, where there are several, and the output, with the batch's rows."""
        if self.shape("weight")[0] > 1:
            yield self.point("hook_in", self.place(Side.INPUT), SharedRow(), dimensions=self.input_axes)
        yield self.point("hook_out", self.place(Side.OUTPUT), SharedRow(), dimensions=self.output_axes)

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields `hook_type_embed`, if `hook_embed` has it, and the types of a table of one row."""
        if self.shape("weight")[0] == 1:
            yield f"{self.path}.hook_in", "there is one type of tokens, so that types tell nothing"
        if self.ends_in_embed:
            reason = "types are added to the token embedding before its norm or projection, so hook_embed has both; "
            yield "hook_type_embed", f"{reason}{self.path}.hook_out has them alone"


def _embedded_axes(part: GeneralizedComponent, table: str | None) -> str:
    width = part.cfg.d_model if table is None or not part.has(table) else part.shape(table)[-1]
    return "batch pos d_model" if width == part.cfg.d_model else "batch pos width"


@dataclass(eq=False, repr=False)
class UnembeddingBridge(LinearBridge):
    """The unembedding, from the final norm's output to logits before any scale or cap of the model's.

    Attributes:
        scale: What the model multiplies its output by.
        softcap: Where the model caps the scaled logits by `cap * tanh(logits / cap)`, or None.
        input_scale: What the model multiplies the last norm's output by before it, outside of any module (MiniCPM 3).
        n_logits: How many of its first outputs are logits, where those after them only pad the vocabulary (Inkling);
            None where all are.
    """

    _: KW_ONLY
    scale: float = 1.0
    softcap: float | None = None
    input_scale: float = 1.0
    n_logits: int | None = None

    output_axes = "batch pos d_vocab"

    @property
    def matrix(self) -> Tensor:
        """The weight `[d_vocab, d_model]`, the live parameter or the rows of it that give logits."""
        whole = super().matrix
        return whole if self.n_logits is None else whole[: self.n_logits]

    def bias_or_none(self) -> Tensor | None:
        """Returns the bias `[d_vocab]`, or None where there is none."""
        bias = super().bias_or_none()
        return bias if bias is None or self.n_logits is None else bias[: self.n_logits]

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
        zeros = torch.zeros(1, dtype=weight.dtype, device=weight.device).expand(len(weight[: self.n_logits]))
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
        shown = Whole() if self.n_logits is None else Converted(ChannelsConversion(0, self.n_logits))
        yield self.point("hook_out", self.place(Side.OUTPUT), shown, dimensions=self.output_axes)


class LogitHeadBridge(GeneralizedComponent):
    """What lies between the residual stream, or its last norm, and the unembedding, and is no linear map.

    BERT's transform is one: a linear map, an activation function, a norm. Its parts are its submodules, under any name.
    Logits are then no linear function of the stream at a given scale, and what needs that raises.
    """
