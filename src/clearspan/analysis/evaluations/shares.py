"""How sure a share is: an interval that has a width where every observation is a hit."""

from statistics import NormalDist

from jaxtyping import Float
from torch import Tensor

from clearspan.errors import InvalidArgumentError
from clearspan.statistics import Interval


def share_interval(hits: Float[Tensor, "*quantity row"], *, level: float = 0.95) -> Interval:
    """Returns shares of hits over the last axis, with Wilson's score interval around each, in float64.

    Args:
        hits: 1 for a hit and 0 for a miss, or a mean of several such.
        level: Between 0 and 1.

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
    if not 0 < level < 1:
        raise InvalidArgumentError(f"level={level} is no share", expected="0 < level < 1")
    values = hits.detach().double().cpu()
    share, count, z = values.mean(-1), values.shape[-1], NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)).sqrt()
    return Interval(share, (centre - half).clamp(min=0), (centre + half).clamp(max=1), level)
