"""The range that colours stand for."""

from torch import Tensor


def effect_bound(drop: Tensor) -> float:
    """Returns the effect, in nats, that has the full colour.

    It is the largest at any position before the last, since what enters at the last position nearly always matters
    most and would pale all else; but no less than a tenth of the largest anywhere, so that noise stays pale.

    Args:
        drop: Effects `[layer, pos]` in nats.
    """
    sizes = drop.abs()
    before_last = float(sizes[:, :-1].max()) if sizes.shape[1] > 1 else 0.0
    return max(before_last, float(sizes.max()) / 10, 1e-4)
