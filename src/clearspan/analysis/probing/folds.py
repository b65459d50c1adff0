"""Folds of examples for cross-validation: groups stay together, and every fold has its share of each class."""

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.errors import InvalidArgumentError


def stratified_folds(
    labels: Int[Tensor, "example"], groups: Int[Tensor, "example"], count: int, seed: int
) -> Int[Tensor, "example"]:
    """Returns the fold of each example, from 0.

    Groups, in an order given by the seed and the larger ones first, go one by one to the fold that has the least of
    their classes, and among several such folds to the one with the fewest examples.

    Args:
        labels: Classes from 0, each of which occurs.
        groups: Numbers of groups from 0, each of which occurs.
        count: Folds.
        seed: Of the order. Torch's own seed is neither read nor changed.

    Raises:
        InvalidArgumentError: Fewer than two folds, more folds than groups, or a class that is in one fold alone, so
            that nothing can be trained on it when that fold is held out.

    Example:
        >>> stratified_folds(torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 2, 3, 3]), 2, seed=0)
        tensor([0, 0, 1, 0, 1, 1])
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
    _check_trainable(filled)
    return fold_of[groups]


def _check_trainable(filled: Int[Tensor, "fold class"]) -> None:
    alone = ((filled > 0).sum(0) < 2).nonzero()[:, 0].tolist()
    if alone:
        raise InvalidArgumentError(
            f"class {alone[0]} is in one fold alone",
            expected="groups of each class in two folds or more",
            reason="when that fold is held out, no example of the class is left to train on",
            fix="more groups of that class",
        )
