"""From the residual stream to logits: by the model's own code, and as the linear map that this is at a norm's scale.

`logit(t) = normed @ direction(t) + constant(t)`, before a cap, where `normed` is the last norm's output without its
bias; and a norm is linear in its input once its scale is given. Nothing has to be folded into weights for that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from clearspan._forward.forward import run_segment
from clearspan._forward.given import ModelInput, check_width
from clearspan.checks import check_kind, whole_numbers
from clearspan.components import GeneralizedComponent, NormalizationBridge
from clearspan.components.factors import scaled
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Batch
from clearspan.model import Model
from clearspan.transfers import numbers_on
from clearspan.weights.processing import final_norm, has_head, readout

Weights = Callable[[GeneralizedComponent, Tensor], Tensor]
"""Returns a part's weight to compute with: a cache checks here that it is still that of its run."""
_ROWS = 8192
"""Rows of a matrix that are copied at a time into another dtype."""


def exact(value: Tensor) -> Tensor:
    """Returns a tensor in float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


# --- by the model's own code -----------------------------------------------------------------------------------------


def read_out(
    model: Model, residual: Float[Tensor, "batch pos d_model"], tokens: Sequence[int] | None = None
) -> Float[Tensor, "batch pos d_vocab"]:
    """Returns the logits that the model makes of a last residual stream; no hook is called.

    Args:
        model: The model.
        residual: The stream after the last block.
        tokens: The tokens whose logits are computed, in order; None for all, by the model's own code.
    """
    check_kind(Tensor, residual=residual)
    check_width(model, residual, is_residual=True)
    if tokens is not None:
        tokens = _checked_tokens(model, tokens)
    with model.taps.turns.unseen():
        has_streams = len(model.blocks[0].stream_shape) > 1
        if tokens is None or model.unembed.is_quantised or has_head(model) or has_streams:
            given = ModelInput(Batch(None, embeds=residual), {"inputs_embeds": residual, "use_cache": False})
            logits = run_segment(model, given, len(model.blocks), None)
            assert isinstance(logits, Tensor), "a run that does not stop ends with logits"
            return logits if tokens is None else logits[..., list(tokens)]
        return _of_tokens(model, residual, tokens)


def _checked_tokens(model: Model, tokens: Sequence[int]) -> list[int]:
    """Returns tokens as a list of ids of the vocabulary."""
    ids = whole_numbers("tokens", tokens)
    if not ids or not 0 <= min(ids) <= max(ids) < model.cfg.d_vocab:
        raise InvalidArgumentError(f"tokens={tokens!r}"[:80], expected=f"ids from 0 to {model.cfg.d_vocab - 1}")
    return ids


def _of_tokens(model: Model, residual: Tensor, tokens: Sequence[int]) -> Tensor:
    """Returns some tokens' logits by the parts that read the stream out: a norm, linear maps, a scale, a cap."""
    norm, maps, cfg = final_norm(model), readout(model), model.adapter.cfg
    value = residual if norm is None else norm.module(residual)
    for part in maps[:-1]:
        value = part.module(value)
    value = scaled(value, model.unembed.input_scale)
    rows = numbers_on(value.device, tokens)
    bias = maps[-1].bias_or_none()
    logits = functional.linear(value, maps[-1].matrix[rows], None if bias is None else bias[rows]) * cfg.logit_scale
    cap = cfg.output_logits_soft_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def log_probs(model: Model, residual: Float[Tensor, "place d_model"]) -> Float[Tensor, "place d_vocab"]:
    """Returns the log-probabilities, in nats, that the model makes of last residual streams. Gradients reach these.

    Computed in float32 at least.
    """
    return exact(read_out(model, residual[:, None])[:, 0]).log_softmax(-1)


def last_normed(model: Model, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
    """Returns what the last norm makes of a last residual stream, or the stream without one; no hook is called."""
    check_kind(Tensor, residual=residual)
    check_width(model, residual, is_residual=True)
    norm = final_norm(model)
    if norm is None:
        return residual
    with model.taps.turns.unseen():
        return norm.module(residual)


# --- as a linear map -------------------------------------------------------------------------------------------------


def norm_at(model: Model, depth: int, *, mlp_input: bool) -> NormalizationBridge | None:
    """Returns the norm through which a layer (its MLP), or the unembedding, reads the residual stream, if any.

    Raises:
        MissingPartError: The layer has no MLP.
    """
    if depth == len(model.blocks):
        return final_norm(model)
    return model.blocks[depth].reader(mlp_input=mlp_input).norm


def as_it_is(part: GeneralizedComponent, weight: Tensor) -> Tensor:  # noqa: ARG001
    """Returns a weight as the model has it now."""
    return weight


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with a given scale, without its bias: `(value - mean(value)) / scale * weight`.

    It computes in float32 at least.

    Attributes:
        scale: What it divides by.
        weight: What it multiplies by, or None.
        centres: Whether it subtracts the mean, as a layer norm does and an RMS norm does not.
    """

    scale: Float[Tensor, "*batch_pos 1"]
    weight: Float[Tensor, "d_model"] | None
    centres: bool

    @classmethod
    def of(cls, norm: NormalizationBridge, scale: Tensor | None = None, weights: Weights = as_it_is) -> Self:
        """Returns a norm with a scale; by default with 1.

        Raises:
            InvalidArgumentError: A gate on its output is made of that too, so that it is not linear at a scale.
        """
        if not norm.is_linear_at_scale:
            raise InvalidArgumentError(
                f"{norm.path} is not linear in the residual stream at a given scale",
                reason="a gate multiplies its output that is made of it",
                fix="run the model, with hooks on the stream",
            )
        weight = weights(norm, norm.w) if norm.has("weight") else None
        if scale is None:
            scale = torch.ones(1, device=None if weight is None else weight.device)
        return cls(exact(scale), weight, not norm.uses_rms_norm)

    def __call__(self, part: Float[Tensor, "*component_batch_pos d_model"]) -> Tensor:
        """Returns what a part of the norm's input is in its output."""
        wide = part.to(torch.promote_types(part.dtype, self.scale.dtype))
        return self.weighted(self._centred(wide) / self.scale).to(part)

    def pulled_back(self, direction: Float[Tensor, "*place d_model"]) -> Float[Tensor, "*place d_model"]:
        """Returns the direction in the norm's input for one in its output.

        `self(part) @ direction == part @ self.pulled_back(direction) / scale`, for which the norm's output need not be
        formed.
        """
        return self._centred(self.weighted(direction))

    def slope(self, value: Float[Tensor, "*batch_pos d_model"], *, of_gradients: bool = False) -> "NormSlope":
        """Returns the derivative of the normalised value, before the weight, at the input that has this scale.

        Args:
            value: The input.
            of_gradients: Whether the weight is multiplied by first: it takes gradients at the output to the input.
        """
        normalized = self._centred(value) / self.scale
        directions = [torch.ones_like(normalized), normalized] if self.centres else [normalized]
        factor = self.weighted(1 / self.scale) if of_gradients else 1 / self.scale
        return NormSlope(factor, torch.stack(directions, dim=-2))

    def weighted(self, value: Float[Tensor, "*place d_model"]) -> Float[Tensor, "*place d_model"]:
        """Returns a value times the weight, where there is one."""
        return value if self.weight is None else value * self.weight.to(value)

    def _centred(self, value: Tensor) -> Tensor:
        return value - value.mean(-1, keepdim=True) if self.centres else value


@dataclass(frozen=True)
class NormSlope:
    """The derivative of a norm: `vector -> (vector - n * mean(vector * n)) / scale`, for the normalised value `n`.

    A layer norm centres the vector too. The matrix is symmetric: it takes changes of the input to changes of the
    normalised value, and gradients there back to the input.

    Attributes:
        factor: What vectors are multiplied by: one over the scale, and the weight where these are gradients.
        directions: What they lose then: `n`, and what is the same in all channels.
    """

    factor: Float[Tensor, "*batch_pos d"]
    directions: Float[Tensor, "*batch_pos direction d_model"]

    def __getitem__(self, index: int) -> "NormSlope":
        """Returns one of several along the first axis."""
        return NormSlope(self.factor[index], self.directions[index])

    def apply_(self, vectors: Float[Tensor, "*part row pos d_model"]) -> None:
        """Multiplies vectors by the derivative, in place; they are dense."""
        width = vectors.shape[-1]
        directions = self.directions.reshape(-1, *self.directions.shape[-2:])
        vectors.mul_(self.factor)
        by_place = vectors.view(-1, len(directions), width).transpose(0, 1)
        by_place.baddbmm_(by_place @ directions.mT, directions, alpha=-1 / width)


@dataclass(frozen=True)
class TokenReading:
    """How tokens' logits read the last norm's output, before a cap: `normed @ direction + constant`.

    In float32 at least.

    Attributes:
        direction: In the output of the norm without its bias, or in the stream where there is no norm.
        constant: What biases of the norm, of a projection after it, and of the unembedding add.
    """

    direction: Float[Tensor, "*token d_model"]
    constant: Float[Tensor, "*token"]

    @classmethod
    def of(cls, model: Model, ids: Int[Tensor, "*token"], weights: Weights = as_it_is) -> Self:
        """Returns the reading of tokens' logits, in their shape."""
        *before, unembed = readout(model)
        direction = exact(weights(unembed, unembed.matrix)[ids]) * model.cfg.logit_scale * model.unembed.input_scale
        bias = unembed.bias_or_none()
        constant = direction.new_zeros(ids.shape)
        if bias is not None:
            constant = exact(weights(unembed, bias)[ids]) * model.cfg.logit_scale
        norm = final_norm(model)
        for part in [*reversed(before), *([] if norm is None else [norm])]:
            bias = part.bias_or_none()
            if bias is not None:
                constant = constant + direction @ weights(part, bias).to(direction)
            if part is not norm:
                direction = direction @ weights(part, part.matrix).to(direction)
        return cls(direction, constant)


def directions_of(model: Model, ids: Int[Tensor, "*token"]) -> Float[Tensor, "*token d_model"]:
    """Returns the direction of the last residual stream that each token's logit reads.

    A vector in the stream adds `vector @ direction / scale` to the logit before a cap, where `scale` is the last norm's
    at that position (`ln_final.hook_scale`). In float32 at least.
    """
    direction, norm = TokenReading.of(model, ids).direction, final_norm(model)
    return direction if norm is None else FrozenNorm.of(norm).pulled_back(direction)


def added_logits(model: Model, vectors: Float[Tensor, "*vector d_model"]) -> Float[Tensor, "*vector d_vocab"]:
    """Returns what vectors in the last residual stream add to all logits, before a cap, for a scale of 1 of the norm.

    In float32 at least.
    """
    norm, found = final_norm(model), exact(vectors)
    if norm is not None:
        found = FrozenNorm.of(norm)(found)
    for part in readout(model):
        found = torch.cat([found @ rows.to(found).T for rows in part.matrix.split(_ROWS)], dim=-1)
    return found * (model.cfg.logit_scale * model.unembed.input_scale)
