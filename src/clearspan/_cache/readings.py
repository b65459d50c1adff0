"""The residual stream of a run read by norms and by logits, exactly on raw weights."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._cache.lookup import CacheLookup
from clearspan._cache.slices import Picks
from clearspan._forward.readout import FrozenNorm, TokenReading, exact, norm_at, read_out
from clearspan.checks import tensor_of
from clearspan.components import NormalizationBridge
from clearspan.errors import InvalidArgumentError
from clearspan.hf.modules import execution_device
from clearspan.model import Model
from clearspan.modes import with_gradients
from clearspan.weights.processing import final_norm


def frozen(cache: CacheLookup, norm: NormalizationBridge, scale: Tensor | None = None) -> FrozenNorm:
    """Returns a norm with the scale that it had in a cache's run, or with another one."""
    return FrozenNorm.of(norm, cache[f"{norm.path}.hook_scale"] if scale is None else scale, cache.weight)


def through_norm(cache: CacheLookup, stack: Tensor, depth: int, *, mlp_input: bool) -> Tensor:
    """Returns what each component of a stack is in the output of the norm at a depth; where none is, the stack."""
    norm = norm_at(cache.model, depth, mlp_input=mlp_input)
    return stack if norm is None else frozen(cache, norm)(stack)


def before_norm(
    cache: CacheLookup, directions: Float[Tensor, "d_model direction"], depth: int, *, mlp_input: bool
) -> Float[Tensor, "d_model direction"]:
    """Returns the directions in the input of the norm at a depth for those in its output, less the norm's scale.

    `through_norm(stack) @ directions == over_scale(stack @ before_norm(directions))`.
    """
    norm = norm_at(cache.model, depth, mlp_input=mlp_input)
    return directions if norm is None else frozen(cache, norm).pulled_back(exact(directions).T).T


def over_scale(cache: CacheLookup, stack: Tensor, depth: int, *, mlp_input: bool) -> Tensor:
    """Returns a stack over the scale that the norm at a depth had in the run."""
    norm = norm_at(cache.model, depth, mlp_input=mlp_input)
    return stack if norm is None else (stack / frozen(cache, norm).scale).to(stack)


def normed(cache: CacheLookup, norm: NormalizationBridge, streams: Tensor) -> Tensor:
    """Returns whole residual streams as a norm makes them: each by a scale of its own, and with the norm's bias."""
    found, bias = frozen(cache, norm, norm.scale(streams))(streams), cache.bias(norm)
    return found if bias is None else found + bias.to(found)


Tokens = str | int | Int[Tensor, "*batch_pos"]
"""A token for every row (text of one token, or an id), one for each `[batch]`, or for each position `[batch, pos]`."""


def reading_of(cache: CacheLookup, ids: Int[Tensor, "*batch_pos"]) -> TokenReading:
    """Returns how tokens' logits read the last norm's output, on the cache's device."""
    found = TokenReading.of(cache.model, ids, cache.weight)
    return TokenReading(found.direction.to(cache.device), found.constant.to(cache.device))


def attributions(
    cache: CacheLookup,
    stack: Float[Tensor, "*component_batch_pos d_model"],
    direction: Float[Tensor, "*batch_pos d_model"],
) -> Float[Tensor, "*component_batch_pos"]:
    """Returns what each component of a last residual stream is in a direction of the last norm's output.

    In float32 at least.
    """
    norm = final_norm(cache.model)
    if norm is None:
        return torch.einsum("...d,...d->...", stack.to(direction), direction)
    run = frozen(cache, norm)
    return torch.einsum("...d,...d->...", stack.to(direction), run.pulled_back(direction)) / run.scale[..., 0]


def token_ids(model: Model, tokens: Tokens) -> Tensor:
    """Returns tokens as ids on the model's device.

    Raises:
        InvalidArgumentError: They are no ids of the vocabulary, or have too many axes.
    """
    if isinstance(tokens, str):
        tokens = model.to_single_token(tokens)
    ids = tensor_of("tokens", tokens).to(model.unembed.parameter("weight").device)
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
    are_on = cache.is_on_graph and torch.is_grad_enabled()
    logits = [with_gradients(are_on, read_out, cache.model, one.to(home)).to(stack.device) for one in streams]
    return torch.stack(logits).reshape(*stack.shape[:-1], -1)
