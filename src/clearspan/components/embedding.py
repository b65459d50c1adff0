"""Token and position embeddings, and the unembedding."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.components.base import GeneralizedComponent
from clearspan.errors import MissingWeightError
from clearspan.points import HookPoint, SharedRow, Side
from clearspan.shapes import axes


class EmbeddingBridge(GeneralizedComponent):
    """The token embedding. Its output is `hook_embed`."""

    input_axes = "batch pos"

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding `[d_vocab, d_model]`, the live parameter."""
        return self.weight("weight")

    def points(self) -> Iterator[HookPoint]:
        """Yields `hook_embed`."""
        yield HookPoint(
            "hook_embed", axes(self.output_axes), self.place(Side.OUTPUT), aliases=(f"{self.path}.hook_out",)
        )


class PosEmbedBridge(GeneralizedComponent):
    """A learned position embedding. Its output is `hook_pos_embed`."""

    input_axes = "batch pos"

    @property
    def W_pos(self) -> Float[Tensor, "pos d_model"]:
        """The position embedding `[pos, d_model]`, the live parameter."""
        return self.weight("weight")

    def points(self) -> Iterator[HookPoint]:
        """Yields `hook_pos_embed`, with the batch's rows also where the model computes one row for all."""
        yield HookPoint(
            "hook_pos_embed",
            axes(self.output_axes),
            self.place(Side.OUTPUT),
            SharedRow(),
            aliases=(f"{self.path}.hook_out",),
        )
        yield self.point("hook_in", self.input_axes, self.place(Side.INPUT), SharedRow())


class UnembeddingBridge(GeneralizedComponent):
    """The unembedding, from the final norm's output to logits before any scale or cap of the model's."""

    output_axes = "batch pos d_vocab"

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding `[d_model, d_vocab]`, a view of the live parameter."""
        return self.weight("weight").T

    @property
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        """The bias `[d_vocab]`: the live parameter, or zeros of stride 0 where the model has none."""
        try:
            return self.weight("bias")
        except MissingWeightError:
            weight = self.weight("weight")
            return torch.zeros(1, dtype=weight.dtype, device=weight.device).expand(len(weight))
