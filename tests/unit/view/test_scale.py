import pytest
import torch

from clearspan.view.scale import effect_bound


@pytest.mark.parametrize(
    ("drop", "bound"),
    [
        ([[0.5, -2.0, 9.0]], 2.0),  # the last position does not count
        ([[0.001, 9.0]], 0.9),  # unless the others are noise beside it
        ([[3.0]], 0.3),
        ([[0.0, 0.0]], 1e-4),
    ],
)
def test_the_full_colour_is_the_largest_effect_before_the_last_position(drop, bound):
    assert effect_bound(torch.tensor(drop)) == pytest.approx(bound)
