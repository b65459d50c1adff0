"""An estimate: a mean over rows, and how sure it is."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from clearspan.statistics import standard_error


@dataclass(frozen=True)
class Estimate:
    """A mean over rows drawn independently.

    Attributes:
        mean: In the unit of the rows.
        error: Its standard error; NaN where there is one row.
        rows: How many.
    """

    mean: float
    error: float
    rows: int

    def __str__(self) -> str:
        return f"{self.mean:z.3f}" if self.rows == 1 else f"{self.mean:z.3f} ± {self.error:z.3f}"


def estimate(values: Float[Tensor, "row"]) -> Estimate:
    """Returns the mean of one number for each row, computed in float64.

    Example:
        >>> import torch
        >>> print(estimate(torch.tensor([1.0, 2.0, 3.0, 4.0])))
        2.500 ± 0.645
    """
    error = standard_error(values).item() if len(values) > 1 else float("nan")
    return Estimate(values.double().mean().item(), error, len(values))
