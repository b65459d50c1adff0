"""What a product of queries and keys shows besides heads: a bias of the distance, a sink."""

import torch

from clearspan.structure.algebra import same
from clearspan.structure.trace import Attended


def has_distance_bias(attended: Attended) -> bool:
    """Whether scores have a share that is the same for all rows, and no mask: the last position sees all others."""
    if attended.scores is None or len(attended.query) < 2:
        return False
    query, key, scores = (one.double() for one in (attended.query, attended.key, attended.scores))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    products = (query @ key.transpose(-1, -2))[:, :, -1]
    last = scores[:, :, -1].expand_as(products)
    seen = (last > last.max() - 1e4).all(0)  # a window's mask is a bias too, and a much larger one
    slope, change = ((one[1] - one[0])[seen] for one in (products, last))
    bias = last[0] - (slope * change).sum() / slope.square().sum() * products[0]
    return any(float(row[there].std()) > 1e-3 for row, there in zip(bias, seen, strict=True) if int(there.sum()) > 1)


def sink_scales_z(attended: Attended) -> bool:
    """Whether a sink takes its share of z, and not of the pattern; the first position sees itself alone."""
    if attended.call is None:
        return False
    value = attended.value[:, :, 0].repeat_interleave(attended.query.shape[1] // attended.value.shape[1], 1)
    if same(attended.result[:, 0], value):
        return False
    first = attended.call.inside()[1][:, :, 0, 0]
    return same(first, torch.ones_like(first))
