"""Logistic regression on standardised features, held-out predictions, and the folds that hold out.

A multinomial logistic regression with a penalty is fitted by Newton's method for several sets of labels at once. Each
step solves for Newton's direction by conjugate gradients, which only need products with the loss's curvature, and goes
along it as far as the loss falls.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from clearspan.errors import InvalidArgumentError

Linear = tuple[Float[Tensor, "labeling class width"], Float[Tensor, "labeling class"]]
"""Weights and biases for each set of labels, for features as they are."""
_TOLERANCE = 1e-7
"""Of each entry of the gradient, where the loss is a mean over examples."""
_MOST_STEPS = 100
_MOST_INNER_STEPS = 500


def fitted(
    features: Float[Tensor, "example width"], labels: Int[Tensor, "labeling example"], n_classes: int, l2: float
) -> Linear:
    """Returns the logistic regression of examples for each set of labels, in float64.

    The penalty is on weights of features standardised by these examples; those returned are for features as they are.

    Raises:
        InvalidArgumentError: The best weights were not reached.
    """
    exact = features.double()
    mean, spread = exact.mean(0), exact.std(0, correction=0)
    # What float32 features vary by from rounding alone is no variation: such a feature has no weight.
    spread = spread.where(spread > 1e-6 * exact.abs().amax(0), torch.inf)
    coordinates, basis = (exact - mean) / spread, None
    if len(exact) < exact.shape[1]:
        # The best weights lie in the span of the examples. An orthonormal basis of it has less to fit.
        basis, triangle = torch.linalg.qr(coordinates.T)
        coordinates = triangle.T
    targets = functional.one_hot(labels, n_classes).to(exact).transpose(1, 2)
    found = logistic_weights(coordinates, targets, l2)
    weight = found[..., :-1] if basis is None else found[..., :-1] @ basis.T
    weight = weight / spread
    return weight, found[..., -1] - weight @ mean


def predicted_held_out(
    features: Float[Tensor, "example width"],
    labels: Int[Tensor, "labeling example"],
    folds: Int[Tensor, "example"],
    n_classes: int,
    l2: float,
) -> Int[Tensor, "labeling example"]:
    """Returns the class that a model fitted on the other folds gives to each example, for each set of labels."""
    predicted = torch.empty_like(labels)
    for fold in folds.unique():
        held_out = folds == fold
        weight, bias = fitted(features[~held_out], labels[:, ~held_out], n_classes, l2)
        predicted[:, held_out] = (weight @ features[held_out].double().T + bias[..., None]).argmax(1)
    return predicted


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


def stratified_folds(
    labels: Int[Tensor, "example"], groups: Int[Tensor, "example"], count: int, seed: int
) -> Int[Tensor, "example"]:
    """Returns the fold of each example, from 0.

    Groups, in an order given by the seed and the larger ones first, go one by one to the fold that has the least of
    their classes, and among several such folds to the one with the fewest examples.

    Args:
        labels: Classes from 0; all occur.
        groups: Numbers of groups from 0; all occur.
        count: Folds.
        seed: Of the order. Torch's own seed is neither read nor changed.

    Raises:
        InvalidArgumentError: Fewer than two folds, more folds than groups, or a class that is in one fold alone, so
            that nothing can be trained on it when that fold is held out.
    """
    n_groups = int(groups.max()) + 1
    if not 2 <= count <= n_groups:
        raise InvalidArgumentError(
            f"folds={count} cannot be made", expected=f"2 to {n_groups}, the number of groups", got=str(count)
        )
    totals = labels.bincount()
    sizes = torch.zeros(n_groups, len(totals), dtype=torch.long)
    sizes.index_put_((groups, labels), torch.ones_like(labels), accumulate=True)
    order = torch.randperm(n_groups, generator=torch.Generator().manual_seed(seed))
    order = order[sizes[order].sum(1).argsort(descending=True, stable=True)]
    filled = torch.zeros(count, len(totals), dtype=torch.long)
    fold_of = torch.empty(n_groups, dtype=torch.long)
    for group in order.tolist():
        crowded = (filled / totals * (sizes[group] / totals)).sum(1)
        best = min(range(count), key=lambda fold: (float(crowded[fold]), int(filled[fold].sum())))
        filled[best] += sizes[group]
        fold_of[group] = best
    alone = ((filled > 0).sum(0) < 2).nonzero()[:, 0].tolist()
    if alone:
        raise InvalidArgumentError(
            f"class {alone[0]} is in one fold alone",
            expected="groups of each class in two folds or more",
            reason="when that fold is held out, no example of the class is left to train on",
            fix="more groups of that class",
        )
    return fold_of[groups]
