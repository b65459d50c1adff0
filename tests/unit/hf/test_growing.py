"""What a model gives its blocks, and which axis of it has the rows, in runs of other rows and positions."""

import pytest
import torch

from clearspan.hf.growing import Extent, Given, UnfitForGrowth

SEEN = Extent(rows=2, positions=3, length=5)
OTHER = Extent(rows=4, positions=6, length=9)


def _axis(once, twice, shape, extent=OTHER):
    at = 0, ("mask",)
    return Given(SEEN, {at: torch.Size(once)}, {at: torch.Size(twice)}).axis_of_rows(*at, torch.Size(shape), extent)


@pytest.mark.parametrize(
    ("once", "twice", "shape", "axis"),
    [
        ([2, 1, 3, 5], [4, 1, 3, 5], [4, 1, 6, 9], 0),
        ([1, 1, 3, 5], [1, 1, 3, 5], [1, 1, 6, 9], None),
        ([3, 2, 8], [3, 4, 8], [6, 4, 8], 1),
        ([2 * 3, 8], [4 * 3, 8], [4 * 6, 8], 0),
        ([], [], [], None),
    ],
)
def test_the_axis_of_rows_is_found_in_runs_of_any_extent(once, twice, shape, axis):
    assert _axis(once, twice, once, SEEN) == axis
    assert _axis(once, twice, shape) == axis


@pytest.mark.parametrize(
    ("once", "twice", "shape"),
    [
        ([1, 3], [1, 3], [4, 6]),  # now there are rows
        ([2, 3], [4, 3], [1, 6]),  # now there are none
        ([2, 3], [4, 3], [4, 7]),
    ],
)
def test_a_tensor_of_another_shape_is_not_taken_for_the_one_that_was_seen(once, twice, shape):
    with pytest.raises(UnfitForGrowth, match="'mask' of a block has another shape than its rows and positions tell"):
        _axis(once, twice, shape)


def test_a_tensor_that_was_not_seen_or_has_several_axes_of_rows_is_unfit():
    with pytest.raises(UnfitForGrowth, match="'mask' of a block is not the same kind of tensor for all rows"):
        _axis([2, 3], [4, 3], [4, 1, 6])
    with pytest.raises(UnfitForGrowth, match="'mask' of a block is not the same kind of tensor for all rows"):
        Given(SEEN, {}, {}).axis_of_rows(0, ("mask",), torch.Size([4]), OTHER)
    with pytest.raises(UnfitForGrowth, match="'mask' of a block depends on the rows in more ways than one"):
        _axis([2, 2], [4, 4], [4, 4])
