"""The residual stream of a run read by norms and by logits, exactly on raw weights."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._cache.lookup import CacheLookup
from clearspan._cache.slices import Picks
from clearspan._forward.readout import read_out
from clearspan.components import GeneralizedComponent, NormalizationBridge
from clearspan.errors import InvalidArgumentError
from clearspan.hf.offload import execution_device
from clearspan.model import Model
from clearspan.weights.processing import final_norm, readout


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with a given scale, without its bias: `(value - mean(value)) / scale * weight`.

    It computes in the scale's dtype, which is float32 at least.

    Attributes:
        scale: What it divides by.
        weight: What it multiplies by, or None.
        centres: Whether it subtracts the mean, as a layer norm does and an RMS norm does not.
    """

    scale: Float[Tensor, "*batch_pos 1"]
    weight: Float[Tensor, "d_model"] | None
    centres: bool

    @classmethod
    def of(cls, cache: CacheLookup, norm: NormalizationBridge, scale: Tensor | None = None) -> "FrozenNorm":
        """Returns a norm with the scale that it had in a cache's run, or with another one."""
        has_weight = norm.module._parameters.get("weight") is not None
        weight = cache.weight(norm, norm.w) if has_weight else None
        scale = cache[f"{norm.path}.hook_scale"] if scale is None else scale
        return cls(wide(scale), weight, not norm.uses_rms_norm)

    def __call__(self, part: Float[Tensor, "*component_batch_pos d_model"]) -> Tensor:
        """Returns what a part of the norm's input is in its output."""
        wide = part.to(self.scale)
        centred = wide - wide.mean(-1, keepdim=True) if self.centres else wide
        normalized = centred / self.scale
        return (normalized if self.weight is None else normalized * self.weight.to(wide)).to(part)

    def pulled_back(self, direction: Float[Tensor, "*place d_model"]) -> Float[Tensor, "*place d_model"]:
        """Returns the direction in the norm's input for one in its output.

        `self(part) @ direction == part @ self.pulled_back(direction) / scale`, for which the norm's output need not be
        formed.
        """
        scaled = direction if self.weight is None else direction * self.weight.to(direction)
        return scaled - scaled.mean(-1, keepdim=True) if self.centres else scaled


def wide(value: Tensor) -> Tensor:
    """Returns a tensor in float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def apply_slope_(
    norm: NormalizationBridge, value: Float[Tensor, "row pos d_model"], vectors: Float[Tensor, "*part row pos d_model"]
) -> None:
    """Multiplies vectors by the derivative of a norm's normalised value at an input, in place.

    `vector -> (vector - n * mean(vector * n)) / scale`, for the normalised value `n`, and with the vector centred where
    the norm centres. The second term is the scale's. The matrix is symmetric: it takes changes of the input to changes
    of the normalised value, and gradients at that back to the input.

    Args:
        norm: The norm.
        value: Its input, in float32 at least.
        vectors: The vectors.
    """
    scale = norm.scale(value)
    normalized = norm.normalize(value, scale)
    if not norm.uses_rms_norm:
        vectors -= vectors.mean(-1, keepdim=True)
    along = (vectors * normalized).mean(-1, keepdim=True)
    vectors.addcmul_(normalized, along, value=-1).div_(scale)


def norm_at(model: Model, depth: int, *, mlp_input: bool) -> NormalizationBridge | None:
    """Returns the norm through which a layer (its MLP), or the unembedding, reads the residual stream, if any."""
    if depth == model.cfg.n_layers:
        return final_norm(model)
    block = model.blocks[depth]
    if block.norms_the_sum:
        return None
    shares_first = block.is_parallel and "ln2" not in block.submodules
    found = block.submodules.get("ln2" if mlp_input and not shares_first else "ln1")
    return found if isinstance(found, NormalizationBridge) else None


def through_norm(cache: CacheLookup, stack: Tensor, depth: int, *, mlp_input: bool) -> Tensor:
    """Returns what each component of a stack is in the output of the norm at a depth; where none is, the stack."""
    norm = norm_at(cache.model, depth, mlp_input=mlp_input)
    return stack if norm is None else FrozenNorm.of(cache, norm)(stack)


Tokens = str | int | Int[Tensor, "*batch_pos"]
"""A token for every row (text of one token, or an id), one for each `[batch]`, or for each position `[batch, pos]`."""


@dataclass(frozen=True)
class TokenReading:
    """How tokens' logits read the last norm's output, before a cap: `normed @ direction + constant`.

    In float32 at least, on the cache's device.

    Attributes:
        direction: In the output of the norm without its bias, or in the stream where there is no norm.
        constant: What biases of the norm, of a projection after it, and of the unembedding add.
    """

    direction: Float[Tensor, "*batch_pos d_model"]
    constant: Float[Tensor, "*batch_pos"]

    @classmethod
    def of(cls, cache: CacheLookup, ids: Int[Tensor, "*batch_pos"]) -> "TokenReading":
        """Returns the reading of tokens' logits, in their shape."""
        model = cache.model
        *before, unembed = readout(model)
        rows = cache.weight(unembed, model.W_U).T[ids]
        direction = wide(rows) * model.cfg.logit_scale
        constant = wide(cache.weight(unembed, model.b_U)[ids]) * model.cfg.logit_scale
        for part in reversed(before):
            constant = _plus_bias(cache, constant, direction, part)
            direction = direction @ cache.weight(part, part.matrix).to(direction)
        norm = final_norm(model)
        constant = constant if norm is None else _plus_bias(cache, constant, direction, norm)
        return cls(direction.to(cache.device), constant.to(cache.device))


def attributions(
    cache: CacheLookup,
    stack: Float[Tensor, "component *batch_pos d_model"],
    direction: Float[Tensor, "*batch_pos d_model"],
) -> Float[Tensor, "component *batch_pos"]:
    """Returns what each component of a last residual stream is in a direction of the last norm's output.

    In float32 at least.
    """
    norm = final_norm(cache.model)
    if norm is None:
        return torch.einsum("c...d,...d->c...", stack.to(direction), direction)
    frozen = FrozenNorm.of(cache, norm)
    return torch.einsum("c...d,...d->c...", stack.to(direction), frozen.pulled_back(direction)) / frozen.scale[..., 0]


def _plus_bias(cache: CacheLookup, constant: Tensor, direction: Tensor, part: GeneralizedComponent) -> Tensor:
    bias = cache.bias(part)
    return constant if bias is None else constant + direction @ bias.to(direction)


def token_ids(model: Model, tokens: Tokens) -> Tensor:
    """Returns tokens as ids on the model's device.

    Raises:
        InvalidArgumentError: They are no ids of the vocabulary, or have too many axes.
    """
    if isinstance(tokens, str):
        tokens = model.to_single_token(tokens)
    ids = torch.as_tensor(tokens, device=model.unembed.parameter("weight").device)
    d_vocab = model.W_U.shape[1]
    is_integer = not (ids.is_floating_point() or ids.dtype == torch.bool)
    if not is_integer or ids.ndim > 2 or not ids.numel() or not 0 <= ids.min() <= ids.max() < d_vocab:
        raise InvalidArgumentError(
            "these are no tokens",
            expected=f"text of one token, or ids from 0 to {d_vocab - 1}: one, [batch] or [batch, pos]",
            got=f"{tokens!r}" if ids.numel() == 1 else f"{ids.dtype} {list(ids.shape)}",
        )
    return ids


def laid_out(ids: Int[Tensor, "*batch_pos"], picks: Picks) -> Int[Tensor, "*batch_pos"]:
    """Returns tokens at chosen rows and positions, with the axes that a stack has there, each whole or of size 1.

    Raises:
        InvalidArgumentError: There is not one token for each row, or for each row and position.
    """
    if not ids.ndim:
        return ids
    is_by_row = ids.ndim == 1 and "batch" in picks.sizes
    axes = ["batch"] if is_by_row else list(picks.sizes)
    found = Picks({axis: picks.sizes[axis] for axis in axes}, picks.choices).made(ids, "the tensor of tokens")
    has_positions = "pos" in picks.sizes and not isinstance(picks.choices["pos"], int)
    return found[..., None] if is_by_row and has_positions else found


def lens(cache: CacheLookup, stack: Float[Tensor, "depth *batch_pos d_model"]) -> Tensor:
    """Returns the logits that the model makes of each stream, `[depth, *batch_pos, d_vocab]`."""
    # The model's own forward has both axes.
    streams = stack if cache.has_positions else stack[..., None, :]
    streams = streams if cache.has_batch_dim else streams[:, None]
    home = execution_device(cache.model.blocks[-1].module)
    with torch.set_grad_enabled(cache.is_on_graph and torch.is_grad_enabled()):
        logits = [read_out(cache.model, stream.to(home)).to(stack.device) for stream in streams]
    return torch.stack(logits).reshape(*stack.shape[:-1], -1)
