"""Multinomial logistic regression with a penalty, fitted by Newton's method for several sets of labels at once.

Each step solves for Newton's direction by conjugate gradients, which need products with the loss's curvature alone, and
goes along it as far as the loss falls.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.errors import InvalidArgumentError

_TOLERANCE = 1e-7
"""Of each entry of the gradient, where the loss is a mean over examples."""
_MOST_STEPS = 100
_MOST_INNER_STEPS = 500


def logistic_weights(
    features: Float[Tensor, "example width"], targets: Float[Tensor, "labeling class example"], l2: float
) -> Float[Tensor, "labeling class width+1"]:
    """Returns the minimum of `sum(cross_entropy) + l2 / 2 * sum(weight²)`: weights, and in the last column free biases.

    Args:
        features: In float64.
        targets: 1 for each example's class, otherwise 0.
        l2: Penalty, more than 0.

    Raises:
        InvalidArgumentError: The minimum was not reached.

    Example:
        >>> features = torch.tensor([[-1.0], [0.0], [1.0], [2.0]], dtype=torch.float64)
        >>> targets = torch.tensor([[[1.0, 1, 0, 0], [0, 0, 1, 1]]], dtype=torch.float64)
        >>> logistic_weights(features, targets, l2=1.0)
        tensor([[[-0.6807,  0.3403],
                 [ 0.6807, -0.3403]]], dtype=torch.float64)
    """
    features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    penalty = torch.full_like(features[0], l2)
    penalty[-1] = 0
    weights = features.new_zeros(*targets.shape[:2], features.shape[1])

    def loss(weights: Tensor) -> Float[Tensor, "labeling 1 1"]:
        return _inner(weights, penalty * weights) / 2 - _inner(targets, (weights @ features.T).log_softmax(1))

    left = torch.inf
    for _ in range(_MOST_STEPS):
        probs = (weights @ features.T).softmax(1)
        gradient = (probs - targets) @ features + penalty * weights
        left = gradient.abs().max().item() / len(features)
        if left < _TOLERANCE:
            return weights
        step = _solved(
            lambda step, probs=probs: _curvature(features, probs, step) + penalty * step,
            -gradient,
            enough=_TOLERANCE * len(features) / 10,
        )
        weights = weights + _step_size(loss, weights, step, _inner(gradient, step)) * step
    raise InvalidArgumentError(
        "a logistic regression was not fitted to the end",
        expected=f"a gradient below {_TOLERANCE}",
        got=f"{left:.1e}",
        fix="a larger l2",
    )


def _curvature(
    features: Float[Tensor, "example width"], probs: Float[Tensor, "labeling class example"], step: Tensor
) -> Float[Tensor, "labeling class width"]:
    """Returns the product of the unpenalised loss's second derivative with a step."""
    along = step @ features.T
    return probs * (along - (probs * along).sum(1, keepdim=True)) @ features


def _solved(
    product: Callable[[Tensor], Tensor], right: Float[Tensor, "labeling class width"], enough: float
) -> Float[Tensor, "labeling class width"]:
    """Returns `x` with `product(x)` near `right`, by conjugate gradients from 0.

    What is left has at most a tenth of the norm of `right`, less the smaller that is, and need not be below `enough`.
    """
    found, residual, direction = torch.zeros_like(right), right, right
    size = start = _inner(right, right)
    bound = (start * start.sqrt().clamp(max=0.01)).clamp(min=enough**2)
    for _ in range(_MOST_INNER_STEPS):
        if (size <= bound).all():
            break
        image = product(direction)
        length = _ratio(size, _inner(direction, image))
        found, residual = found + length * direction, residual - length * image
        before, size = size, _inner(residual, residual)
        direction = residual + _ratio(size, before) * direction
    return found


def _step_size(
    loss: Callable[[Tensor], Float[Tensor, "labeling 1 1"]], weights: Tensor, step: Tensor, slope: Tensor
) -> Float[Tensor, "labeling 1 1"]:
    """Returns how much of a step to take: all of it, halved until the loss falls as much as its slope promises."""
    size, before = torch.ones_like(slope), loss(weights)
    while True:
        # Near the minimum the loss falls by less than it is rounded.
        allowed = before + 1e-4 * size * slope + 1e-12 * before.abs()
        is_far = (loss(weights + size * step) > allowed) & (size > 1e-9)
        if not is_far.any():
            return size
        size = size.where(~is_far, size / 2)


def _inner(a: Tensor, b: Tensor) -> Float[Tensor, "labeling 1 1"]:
    return (a * b).sum((1, 2), keepdim=True)


def _ratio(a: Float[Tensor, "labeling 1 1"], b: Float[Tensor, "labeling 1 1"]) -> Float[Tensor, "labeling 1 1"]:
    """Returns `a / b`, and 0 where both have come to nothing."""
    return torch.where(b > 0, a / b.where(b > 0, 1.0), 0.0)
