"""The readout: what is in the residual stream, read through the last norm's weight and the unembedding, as logits.

Given the norm's scale, this is a linear map. It is here both ways, without scale and biases: from the stream to logits,
and from a token's logit to the direction of the stream that it reads.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.components import NormalizationBridge
from clearspan.weights.processing import final_norm, readout

_ROWS = 8192


@torch.no_grad()
def logits_of(bridge: TransformerBridge, vectors: Float[Tensor, "*vector d_model"]) -> Float[Tensor, "*vector d_vocab"]:
    """Returns what vectors in the last residual stream add to all logits, before a cap, for a scale of 1 of the norm.

    In float32 at least.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> logits_of(bridge, torch.ones(3, bridge.cfg.d_model)).shape
        torch.Size([3, 4096])
    """
    norm = final_norm(bridge)
    found = exact(vectors) if norm is None else weighted(norm, centred(norm, exact(vectors)))
    for part in readout(bridge):
        # In pieces, so that a matrix in half precision is not copied whole.
        found = torch.cat([found @ rows.to(found).T for rows in part.matrix.split(_ROWS)], dim=-1)
    return found * bridge.cfg.logit_scale


@torch.no_grad()
def directions_of(bridge: TransformerBridge, tokens: Int[Tensor, "*token"]) -> Float[Tensor, "*token d_model"]:
    """Returns the direction of the last residual stream that each token's logit reads.

    A vector in the stream adds `vector @ direction / scale` to the logit before a cap, where `scale` is the last norm's
    at that position (`ln_final.hook_scale`). In float32 at least.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> vector, token = torch.randn(bridge.cfg.d_model), torch.tensor(7)
        >>> bool(torch.isclose(vector @ directions_of(bridge, token), logits_of(bridge, vector)[7], atol=1e-4))
        True
    """
    *before, unembed = readout(bridge)
    found = exact(unembed.matrix[tokens]) * bridge.cfg.logit_scale
    for part in reversed(before):
        found = found @ part.matrix.to(found)
    norm = final_norm(bridge)
    return found if norm is None else centred(norm, weighted(norm, found))


def weighted(norm: NormalizationBridge, vectors: Float[Tensor, "*vector d_model"]) -> Float[Tensor, "*vector d_model"]:
    """Returns vectors times a norm's weight, where it has one."""
    return vectors if norm.module._parameters.get("weight") is None else vectors * norm.w.to(vectors)


def centred(norm: NormalizationBridge, vectors: Float[Tensor, "*vector d_model"]) -> Float[Tensor, "*vector d_model"]:
    """Returns vectors without their mean, where a norm takes that away."""
    return vectors if norm.uses_rms_norm else vectors - vectors.mean(-1, keepdim=True)


def exact(value: Tensor) -> Tensor:
    """Returns a tensor in float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
