"""Training examples of a probe, standardised by themselves alone, and predictions for examples that are held out."""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from .logistic import logistic_weights

Linear = tuple[Float[Tensor, "labeling class width"], Float[Tensor, "labeling class"]]
"""Weights and biases for each set of labels, for features as they are."""


@dataclass(frozen=True, eq=False)
class Design:
    """Training examples, standardised, in float64.

    The best weights lie in the span of the examples. Where these are fewer than the features, they are kept in an
    orthonormal basis of it, in which there is less to fit.

    Attributes:
        mean: Of each feature.
        spread: Its standard deviation; infinite where the feature does not vary, so that it has no weight.
        basis: Orthonormal columns.
        coordinates: The standardised examples in that basis.
    """

    mean: Float[Tensor, "width"]
    spread: Float[Tensor, "width"]
    basis: Float[Tensor, "width rank"]
    coordinates: Float[Tensor, "example rank"]

    @classmethod
    def of(cls, features: Float[Tensor, "example width"]) -> Self:
        """Returns the design of features, of which nothing but these examples is known."""
        exact = features.double()
        mean, spread = exact.mean(0), exact.std(0, correction=0)
        # What float32 features vary by from rounding alone is no variation.
        spread = spread.where(spread > 1e-6 * exact.abs().amax(0), torch.inf)
        standard = (exact - mean) / spread
        if len(standard) >= standard.shape[1]:
            return cls(mean, spread, torch.eye(standard.shape[1], dtype=exact.dtype), standard)
        basis, triangle = torch.linalg.qr(standard.T)
        return cls(mean, spread, basis, triangle.T)

    def fit(self, labels: Int[Tensor, "labeling example"], n_classes: int, l2: float) -> Linear:
        """Returns the logistic regression for each set of labels.

        The penalty is on weights of standardised features; those returned are for features as they are.

        Raises:
            InvalidArgumentError: The best weights were not reached.
        """
        targets = functional.one_hot(labels, n_classes).to(self.coordinates).transpose(1, 2)
        found = logistic_weights(self.coordinates, targets, l2)
        weight = found[..., :-1] @ self.basis.T / self.spread
        return weight, found[..., -1] - weight @ self.mean


def predicted_held_out(
    features: Float[Tensor, "example width"],
    labels: Int[Tensor, "labeling example"],
    folds: Int[Tensor, "example"],
    n_classes: int,
    l2: float,
) -> Int[Tensor, "labeling example"]:
    """Returns the class that each example is given by a model fitted on the other folds, for each set of labels."""
    predicted = torch.empty_like(labels)
    for fold in folds.unique():
        held_out = folds == fold
        weight, bias = Design.of(features[~held_out]).fit(labels[:, ~held_out], n_classes, l2)
        predicted[:, held_out] = (weight @ features[held_out].double().T + bias[..., None]).argmax(1)
    return predicted
