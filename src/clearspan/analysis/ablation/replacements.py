"""What an ablated value is replaced by: zero, its mean over a reference, or its value on another row of one."""

from typing import Literal, get_args

from clearspan.analysis.corpus import Batch
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Action, Mean, Resample, Zero

AblationMethod = Literal["zero", "mean", "resample"]

REFERENCE = "reference"
"""Name of the run from which means and other values are taken."""


def action_of(method: AblationMethod, *, given: Batch, reference: Batch, seed: int) -> Action:
    """Returns what becomes of an ablated value.

    Args:
        method: Which replacement.
        given: Tokens that are ablated, and their mask.
        reference: Tokens from which means and other values are taken, and their mask.
        seed: Of the rows' order.

    Raises:
        InvalidArgumentError: An unknown method; for `"resample"`, fewer than two rows, padding, or a reference of
            another shape.
    """
    if method not in get_args(AblationMethod):
        raise InvalidArgumentError(f"unknown method {method!r}", expected="'zero', 'mean' or 'resample'")
    if method == "resample":
        _check_resampled(given, reference)
    return {"zero": Zero(), "mean": Mean(REFERENCE), "resample": Resample(REFERENCE, seed)}[method]


def _check_resampled(given: Batch, reference: Batch) -> None:
    shapes = [list(tokens.shape) for tokens, _ in (given, reference)]
    if shapes[0] != shapes[1]:
        raise InvalidArgumentError(
            "method='resample' takes each row's replacement from the reference at the same position",
            expected=f"a reference of the input's shape {shapes[0]}",
            got=str(shapes[1]),
        )
    if shapes[0][0] < 2:
        raise InvalidArgumentError(
            "method='resample' takes the values of another row", expected="two rows or more", got="one"
        )
    if not all(bool(mask.all()) for _, mask in (given, reference)):
        raise InvalidArgumentError(
            "method='resample' takes the value at the same position",
            expected="rows of one length",
            got="rows with padding",
            fix="method='mean'",
        )
