"""The algebra of processing: pure functions of weights. Each leaves what the model computes as it was."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.weights.factored_matrix import FactoredMatrix


def scale_inputs(weight: Tensor, scale: Float[Tensor, "in"], axis: int) -> Tensor:
    """Returns a map that scales its input itself: `W (scale * x) == W' x`.

    Args:
        weight: The map's weight.
        scale: A number for each input, such as a norm's weight.
        axis: The weight's axis of inputs, counted from the end.
    """
    return weight * scale.to(weight).reshape(-1, *(1,) * (-1 - axis))


def shifted_output(weight: Tensor, shift: Float[Tensor, "in"], axis: int) -> Tensor:
    """Returns what a constant shift of the input adds to a map's output: `W (x + shift) == W x + added`."""
    return (weight.movedim(axis, -1) @ shift.to(weight)[:, None])[..., 0]


def centred(weight: Tensor, axis: int, out: Tensor | None = None) -> Tensor:
    """Returns a weight minus its mean along an axis.

    Args:
        weight: The weight.
        axis: The axis.
        out: Where to put it, by default a new tensor; it may be the weight itself.
    """
    return torch.sub(weight, weight.mean(axis, keepdim=True), out=out)


def constant_of_values(b_V: Float[Tensor, "kv_head d_head"], W_O: Float[Tensor, "head d_head d_model"]) -> Tensor:
    """Returns what the value bias adds to attention's output `[d_model]`, whatever is attended to.

    A pattern's row sums to one, so each head adds `b_V @ W_O`.
    """
    expanded = b_V.repeat_interleave(len(W_O) // len(b_V), dim=0)
    return torch.einsum("hd,hdm->m", expanded, W_O)


class Refactored(NamedTuple):
    """Two weights with their biases, None for a bias that was missing."""

    left: Tensor
    left_bias: Tensor | None
    right: Tensor
    right_bias: Tensor | None


def refactored_QK(
    W_Q: Float[Tensor, "head d_model d_head"],
    b_Q: Float[Tensor, "head d_head"] | None,
    W_K: Float[Tensor, "kv_head d_model d_head"],
    b_K: Float[Tensor, "kv_head d_head"] | None,
) -> Refactored:
    """Returns queries and keys in the basis of singular vectors; every score `(x W_Q + b_Q) (y W_K + b_K)^T` stays.

    Heads that share keys share a basis: their queries, stacked in rows, times the keys are one matrix, whose singular
    values both sides share evenly. Biases are a further row.
    """
    queries, keys = _with_bias(W_Q, b_Q), _with_bias(W_K, b_K)
    group = len(W_Q) // len(W_K)
    stacked = queries.unflatten(0, (-1, group)).flatten(1, 2)
    even = FactoredMatrix(stacked, keys.mT).make_even()
    new_queries = _padded(even.A, W_Q.shape[-1]).unflatten(1, (group, -1)).flatten(0, 1)
    return Refactored(*_split(new_queries, W_Q, b_Q), *_split(_padded(even.B.mT, W_K.shape[-1]), W_K, b_K))


def refactored_OV(
    W_V: Float[Tensor, "kv_head d_model d_head"],
    b_V: Float[Tensor, "kv_head d_head"] | None,
    W_O: Float[Tensor, "head d_head d_model"],
) -> Refactored:
    """Returns values and outputs in the basis of singular vectors; every `(x W_V + b_V) W_O` stays.

    Heads that share values share a basis, in which the rows of their joined output weights are orthonormal: the values
    take the singular values.
    """
    values = _with_bias(W_V, b_V)
    group, d_head = len(W_O) // len(W_V), W_O.shape[1]
    outputs = W_O.double().unflatten(0, (-1, group)).transpose(1, 2).flatten(2)
    found = FactoredMatrix(values, outputs).svd()
    new_values = _padded(found.U * found.S[..., None, :], d_head)
    rows = _padded(found.V, d_head).mT
    new_outputs = rows.unflatten(2, (group, -1)).transpose(1, 2).flatten(0, 1).to(W_O)
    return Refactored(*_split(new_values, W_V, b_V), new_outputs, None)


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns a weight by head in float64, with its bias as one more row."""
    return weight.double() if bias is None else torch.cat([weight, bias[:, None]], dim=1).double()


def _split(joined: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Separates weight and bias again, in their own dtype."""
    joined = joined.to(weight)
    return (joined, None) if bias is None else (joined[:, :-1], joined[:, -1])


def _padded(matrix: Tensor, width: int) -> Tensor:
    """Returns a matrix with columns of zeros up to a width."""
    return torch.nn.functional.pad(matrix, (0, width - matrix.shape[-1]))
