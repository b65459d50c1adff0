"""Latents: narrow maps and norms before the map that gives queries, or keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass

from clearspan.structure.algebra import factor, linear_kind, norm_kind, same
from clearspan.structure.trace import Visit


@dataclass(frozen=True)
class Low:
    """A latent that a linear map reads.

    Attributes:
        reader: The call of the map.
        norm: The call of the norm that gives it.
        map: The call of the map that the norm reads.
        multiplier: What the norm's output is multiplied by before that.
    """

    reader: Visit
    norm: Visit
    map: Visit
    multiplier: float = 1.0


def find_low(reader: Visit, earlier: Sequence[Visit]) -> Low | None:
    """Returns the latent that a map reads, or None where it reads no norm of a part of another map's output."""
    for norm in earlier:
        multiplier = _multiplier(norm, reader) if norm_kind(norm) else None
        inward = None if multiplier is None else next((one for one in earlier if _gives_latent(one, norm)), None)
        if multiplier is not None and inward is not None:
            return Low(reader, norm, inward, multiplier)
    return None


def _gives_latent(one: Visit, norm: Visit) -> bool:
    """Whether a norm reads the first channels of a map's output."""
    if norm.entered is None or one.left is None or one.order > norm.order or not linear_kind(one):
        return False
    width = norm.entered.shape[-1]
    return one.left.shape[-1] >= width and same(one.left[..., :width], norm.entered)


def _multiplier(norm: Visit, reader: Visit) -> float | None:
    """Returns what a norm's output is multiplied by before a map reads it, or None where the map reads another."""
    return None if norm.left is None or reader.entered is None else factor(norm.left, reader.entered)
