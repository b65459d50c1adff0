"""Latents: narrow maps and norms before the map that gives queries, or keys and values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
        is_joined: Whether the map reads what the norm reads too, after its output.
    """

    reader: Visit
    norm: Visit
    map: Visit
    multiplier: float = 1.0
    is_joined: bool = False


def find_low(reader: Visit, earlier: Sequence[Visit]) -> Low | None:
    """Returns the latent that a map reads, or None where it reads no norm of a part of another map's output."""
    for norm in (one for one in earlier if norm_kind(one)):
        inward = next((one for one in earlier if _gives_latent(one, norm)), None)
        if inward is None:
            continue
        multiplier = _multiplier(norm, reader)
        if multiplier is not None:
            return Low(reader, norm, inward, _as_root(multiplier, norm, inward))
        if _reads_both(reader, norm):
            return Low(reader, norm, inward, is_joined=True)
    return None


def _reads_both(reader: Visit, norm: Visit) -> bool:
    """Whether a map reads a norm's output, and after it what the norm reads."""
    if norm.left is None or norm.entered is None or reader.entered is None or norm.left.shape != norm.entered.shape:
        return False
    return same(reader.entered, torch.cat([norm.left, norm.entered], dim=-1))


def _as_root(multiplier: float, norm: Visit, inward: Visit) -> float:
    """Returns a multiplier exactly, where it is the root of the stream's width over the latent's."""
    if norm.entered is None or inward.entered is None:
        return multiplier
    root = (inward.entered.shape[-1] / norm.entered.shape[-1]) ** 0.5
    return root if math.isclose(root, multiplier, rel_tol=1e-5) else multiplier


def _gives_latent(one: Visit, norm: Visit) -> bool:
    """Whether a norm reads the first channels of a map's output."""
    if norm.entered is None or one.left is None or one.order > norm.order or not linear_kind(one):
        return False
    width = norm.entered.shape[-1]
    return one.left.shape[-1] >= width and same(one.left[..., :width], norm.entered)


def gives_rest(one: Visit, norm: Visit) -> bool:
    """Whether a norm reads the last channels of a map's output, those after a latent's."""
    if norm_kind(norm) is None or norm.entered is None or one.left is None:
        return False
    return same(norm.entered, one.left[..., -norm.entered.shape[-1] :])


def _multiplier(norm: Visit, reader: Visit) -> float | None:
    """Returns what a norm's output is multiplied by before a map reads it, or None where the map reads another."""
    return None if norm.left is None or reader.entered is None else factor(norm.left, reader.entered)
