"""How sure a mean is: its standard error, intervals, and a sign-flip test of paired differences.

Rows are the sample: what was drawn independently, such as texts. Every further axis is a quantity of its own, such as
layers and heads, so that one call does a whole grid. A quantity that a row lacks is NaN there, and is left out: with
too few rows left, it is NaN. Computed in float64 on the CPU.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.checks import check_counts, tensor_of
from clearspan.errors import InvalidArgumentError

_CHUNK = 2**24
"""Numbers held at a time while samples are drawn: 128 MiB."""


@dataclass(frozen=True, eq=False)
class Interval:
    """Means over rows, and the ends of an interval around each.

    Attributes:
        mean: Of the rows as they are.
        low: The lower end.
        high: The upper end.
        level: The share of intervals, over repeated samples, that hold the true mean.
    """

    mean: Float[Tensor, "*quantity"]
    low: Float[Tensor, "*quantity"]
    high: Float[Tensor, "*quantity"]
    level: float


def standard_error(values: Float[Tensor, "row *quantity"]) -> Float[Tensor, "*quantity"]:
    """Returns the standard error of the mean over rows, `sqrt(sum((x - mean)²) / (n - 1)) / sqrt(n)`.

    Raises:
        InvalidArgumentError: Fewer than two rows, from which no spread can be known.

    Example:
        >>> standard_error(torch.tensor([1.0, 2.0, 3.0, 4.0])).item()
        0.645497...
    """
    return _by_quantity(values, 2, lambda rows: rows.std(0) / len(rows) ** 0.5)


def bootstrap_interval(
    values: Float[Tensor, "row *quantity"], *, level: float = 0.95, samples: int = 2000, seed: int = 0
) -> Interval:
    """Returns the percentile bootstrap interval for the mean over rows.

    Rows are drawn with replacement, as many as there are, and the mean is taken, `samples` times. The interval runs
    between the `(1 - level) / 2` and `(1 + level) / 2` quantiles of these means. Quantities that the same rows have are
    drawn together. With few rows (below some 20) the interval is too narrow.

    Args:
        values: One row for each independent observation.
        level: Between 0 and 1.
        samples: Draws.
        seed: Of the draws. Torch's own seed is neither read nor changed.

    Raises:
        InvalidArgumentError: Fewer than two rows, no samples, or a level outside 0 to 1.

    Example:
        >>> found = bootstrap_interval(torch.arange(100.0))
        >>> found.mean.item(), 42 < found.low.item() < 46, 53 < found.high.item() < 57
        (49.5, True, True)

    References:
        Efron (1979), "Bootstrap methods: another look at the jackknife", Annals of Statistics 7(1). Efron and
        Tibshirani (1993), "An Introduction to the Bootstrap", section 13.3: the percentile interval.
    """
    _check_level(level)
    check_counts(samples=samples)
    check_counts(0, seed=seed)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.double)

    def interval(rows: Float[Tensor, "row quantity"]) -> Float[Tensor, "3 quantity"]:
        generator, count, means = torch.Generator().manual_seed(seed), len(rows), []
        for size in _sizes(samples, per_sample=count):
            drawn = torch.randint(count, (size, count), generator=generator)
            # How often each row was drawn, as weights: one product does every quantity.
            times = torch.zeros(size, count, dtype=rows.dtype).scatter_add_(
                1, drawn, torch.ones(1, 1).to(rows).expand_as(drawn)
            )
            means.append(times @ rows / count)
        return torch.cat([rows.mean(0)[None], _quantiles(torch.cat(means), ends)])

    mean, low, high = _by_quantity(values, 2, interval, lead=(3,))
    return Interval(mean, low, high, level)


def share_interval(
    hits: Float[Tensor, "*quantity row"], *, level: float = 0.95, observations: int | None = None
) -> Interval:
    """Returns shares of hits over the last axis, with Wilson's score interval around each, in float64.

    Args:
        hits: 1 for a hit and 0 for a miss, or a mean of several such.
        level: Between 0 and 1.
        observations: How many of them are independent; by default all.

    Raises:
        InvalidArgumentError: A level outside 0 to 1.

    Example:
        >>> import torch
        >>> found = share_interval(torch.ones(10))
        >>> found.mean.item(), round(found.low.item(), 3), found.high.item()
        (1.0, 0.722, 1.0)

    References:
        Wilson (1927), "Probable inference, the law of succession, and statistical inference", JASA 22(158).
    """
    _check_level(level)
    values = hits.detach().double().cpu()
    share, z = values.nanmean(-1), NormalDist().inv_cdf((1 + level) / 2)
    count = (~values.isnan()).sum(-1).double() if observations is None else observations
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)).sqrt()
    return Interval(share, (centre - half).clamp(min=0), (centre + half).clamp(max=1), level)


def permutation_p_value(
    differences: Float[Tensor, "row *quantity"], *, samples: int = 2000, seed: int = 0
) -> Float[Tensor, "*quantity"]:
    """Returns the two-sided p-value of a sign-flip test: could paired differences as far from 0 be chance?

    If a pair's two sides were exchangeable, each difference could as well have had the other sign. The p-value is the
    share of sign flips whose mean is at least as far from 0 as the observed one. Up to 12 rows, or where `samples` are
    no fewer than all `2 ** rows` flips, every flip is counted and the value is exact. Otherwise `samples` random flips
    are counted along with the observed one, so that it is at least `1 / (samples + 1)`. All quantities of a row are
    flipped together. Nothing is corrected for testing many quantities.

    Args:
        differences: One row for each independent pair.
        samples: Random flips.
        seed: Of the flips. Torch's own seed is neither read nor changed.

    Raises:
        InvalidArgumentError: No rows, or no samples.

    Example:
        >>> permutation_p_value(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).item()    # 2 of 32 flips: none, and all
        0.0625

    References:
        Fisher (1935), "The Design of Experiments", section 21. Phipson and Smyth (2010), "Permutation P-values should
        never be zero", arXiv:1603.05766: counting the observed one.
    """
    check_counts(samples=samples)
    check_counts(0, seed=seed)

    def p_value(rows: Float[Tensor, "row quantity"]) -> Float[Tensor, "quantity"]:
        count = len(rows)
        # Flips that give the same mean in exact arithmetic are not to fall below it by rounding.
        bound = rows.mean(0).abs() - 1e-12 * rows.abs().mean(0)
        is_exact = count <= 12 or 2**count <= samples
        far = torch.zeros_like(bound) if is_exact else torch.ones_like(bound)
        for signs in _all_signs(count) if is_exact else _random_signs(count, samples, seed):
            far += ((signs @ rows / count).abs() >= bound).sum(0)
        return far / (2**count if is_exact else samples + 1)

    return _by_quantity(differences, 1, p_value)


def _by_quantity(
    values: Float[Tensor, "row *quantity"],
    least: int,
    compute: Callable[[Float[Tensor, "row quantity"]], Float[Tensor, "... quantity"]],
    lead: tuple[int, ...] = (),
) -> Float[Tensor, "..."]:
    """Returns what is computed, for each quantity, of the rows that have it; NaN where they are fewer than `least`."""
    values = tensor_of("values", values)
    if values.ndim == 0 or len(values) < least:
        raise InvalidArgumentError(
            "there are too few rows", expected=f"[row, ...] with at least {least}", got=str(list(values.shape))
        )
    rows = values.detach().double().cpu().reshape(len(values), -1)
    patterns, pattern_of = (~rows.isnan()).unique(dim=1, return_inverse=True)
    found = rows.new_full((*lead, rows.shape[1]), torch.nan)
    for number, is_known in enumerate(patterns.T):
        if is_known.sum() >= least:
            own = pattern_of == number
            found[..., own] = compute(rows[is_known][:, own])
    return found.reshape((*lead, *values.shape[1:]))


def _check_level(level: float) -> None:
    if not isinstance(level, int | float) or not 0 < level < 1:
        raise InvalidArgumentError(f"level={level!r} is no share", expected="0 < level < 1")


def _sizes(samples: int, per_sample: int) -> Iterator[int]:
    """Yields how many samples to draw at a time."""
    most = max(1, _CHUNK // per_sample)
    for start in range(0, samples, most):
        yield min(most, samples - start)


def _all_signs(count: int) -> Iterator[Float[Tensor, "sample row"]]:
    """Yields every pattern of signs, once."""
    bits = torch.arange(count)
    for patterns in torch.arange(2**count).split(max(1, _CHUNK // count)):
        yield ((patterns[:, None] >> bits) & 1).double() * 2 - 1


def _random_signs(count: int, samples: int, seed: int) -> Iterator[Float[Tensor, "sample row"]]:
    generator = torch.Generator().manual_seed(seed)
    for size in _sizes(samples, per_sample=count):
        yield torch.randint(2, (size, count), generator=generator).double() * 2 - 1


def _quantiles(values: Float[Tensor, "sample quantity"], at: Float[Tensor, "end"]) -> Float[Tensor, "end quantity"]:
    """Returns quantiles over samples, between neighbours where they fall so. `torch.quantile` refuses large tensors."""
    ordered = values.sort(0).values
    place = at * (len(values) - 1)
    below = place.floor().long()
    above = place.ceil().long()
    return ordered[below].lerp(ordered[above], (place - below)[:, None])
