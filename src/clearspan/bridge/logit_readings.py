"""What components of the residual stream are in the model's logits, exactly on raw weights."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.bridge.cache_lookup import CacheLookup
from clearspan.bridge.norm_readings import FrozenNorm
from clearspan.bridge.picks import Picks
from clearspan.components import GeneralizedComponent
from clearspan.errors import InvalidArgumentError
from clearspan.hf.offload import execution_device
from clearspan.weights.processing import final_norm, readout

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge

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
        bridge = cache.bridge
        *before, unembed = readout(bridge)
        rows = cache.weight(unembed, bridge.W_U).T[ids]
        exact = torch.promote_types(rows.dtype, torch.float32)
        direction = rows.to(exact) * bridge.cfg.logit_scale
        constant = cache.weight(unembed, bridge.b_U)[ids].to(exact) * bridge.cfg.logit_scale
        for part in reversed(before):
            constant = _plus_bias(cache, constant, direction, part)
            direction = direction @ cache.weight(part, part.matrix).to(direction)
        norm = final_norm(bridge)
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
    norm = final_norm(cache.bridge)
    if norm is None:
        return torch.einsum("c...d,...d->c...", stack.to(direction), direction)
    frozen = FrozenNorm.of(cache, norm)
    return torch.einsum("c...d,...d->c...", stack.to(direction), frozen.pulled_back(direction)) / frozen.scale[..., 0]


def _plus_bias(cache: CacheLookup, constant: Tensor, direction: Tensor, part: GeneralizedComponent) -> Tensor:
    bias = cache.bias(part)
    return constant if bias is None else constant + direction @ bias.to(direction)


def token_ids(bridge: "TransformerBridge", tokens: Tokens) -> Tensor:
    """Returns tokens as ids on the model's device.

    Raises:
        InvalidArgumentError: They are no ids of the vocabulary, or have too many axes.
    """
    if isinstance(tokens, str):
        tokens = bridge.to_single_token(tokens)
    ids = torch.as_tensor(tokens, device=bridge.unembed.parameter("weight").device)
    d_vocab = bridge.W_U.shape[1]
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
    home = execution_device(cache.bridge.blocks[-1].module)
    with torch.set_grad_enabled(cache.is_on_graph and torch.is_grad_enabled()):
        logits = [cache.bridge.read_out(stream.to(home)).to(stack.device) for stream in streams]
    return torch.stack(logits).reshape(*stack.shape[:-1], -1)
