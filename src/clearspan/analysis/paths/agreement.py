"""How well an approximation agrees with what it approximates: correlations, and the largest error."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.errors import InvalidArgumentError
from clearspan.plots.charts import lines
from clearspan.results import Columns, Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class Agreement(Result):
    """Approximate and exact effects of the same cells, means over rows, on the CPU.

    Attributes:
        approximate: The approximation.
        exact: What it approximates.
        labels: A name for each cell.
        total: How many cells there are, of which these are all or a sample.

    Example:
        >>> effects = torch.tensor([0.0, 1.0, 2.0, 4.0])
        >>> found = Agreement(effects * 0.5, effects, list("abcd"), total=4)
        >>> round(found.pearson, 6), round(found.spearman, 6), found.largest_error, found.worst
        (1.0, 1.0, 2.0, 'd')
    """

    approximate: Float[Tensor, "cell"]
    exact: Float[Tensor, "cell"]
    labels: Sequence[str]
    total: int

    ranked_by: ClassVar[str | None] = "error"

    @property
    def pearson(self) -> float:
        """Pearson's correlation; NaN where one side is the same in all cells."""
        return pearson(self.approximate, self.exact)

    @property
    def spearman(self) -> float:
        """Spearman's rank correlation; NaN likewise."""
        return pearson(ranks(self.approximate), ranks(self.exact))

    @property
    def errors(self) -> Float[Tensor, "cell"]:
        """The approximation, less the exact effect."""
        return self.approximate - self.exact

    @property
    def largest_error(self) -> float:
        """The largest error's size."""
        return float(self.errors.abs().max())

    @property
    def worst(self) -> str:
        """The cell with the largest error."""
        return self.labels[int(self.errors.abs().argmax())]

    @property
    def summary(self) -> str:
        """The correlations and the largest error."""
        cells = "all cells" if len(self.labels) == self.total else f"{len(self.labels)} of {self.total} cells"
        return (
            f"with exact patching of {cells}: Pearson {self.pearson:z.3f}, Spearman {self.spearman:z.3f}, "
            f"largest error {self.largest_error:.3g} of effects up to {self.exact.abs().max():.3g}"
        )

    @property
    def title(self) -> str:
        """What was compared, and how it agrees."""
        return f"the approximation compared {self.summary}, at {self.worst}"

    def columns(self) -> Columns:
        """Returns one row for each cell."""
        columns = {"approximate": self.approximate, "exact": self.exact, "error": self.errors}
        return {"cell": list(self.labels), **{name: values.tolist() for name, values in columns.items()}}

    def plot(self) -> "go.Figure":
        """Returns each cell as a point, with a line where both are equal."""
        exact, approximate = self.exact.tolist(), self.approximate.tolist()
        ends = [min(exact), max(exact)]
        figure = lines({"cells": approximate}, x=exact, x_title="exact", value_title="approximate", title=self.title)
        figure.update_traces(mode="markers", text=list(self.labels), hovertemplate="%{text}<br>%{x:.4g}, %{y:.4g}")
        return figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": "#b8b5aa", "dash": "dot"}, name="equal")


def pearson(values: Float[Tensor, "cell"], others: Float[Tensor, "cell"]) -> float:
    """Returns Pearson's correlation of two series, computed in float64; NaN where one is constant.

    Example:
        >>> round(pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 3.0, 1.0])), 6)
        -1.0
    """
    one, other = (series.double() - series.double().mean() for series in (values, others))
    return float((one @ other) / (one.norm() * other.norm()))


def ranks(values: Float[Tensor, "cell"]) -> Float[Tensor, "cell"]:
    """Returns the rank of each value from 1 on; equal values share the mean of theirs.

    Example:
        >>> ranks(torch.tensor([3.0, 1.0, 3.0])).tolist()
        [2.5, 1.0, 2.5]
    """
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[group]


def sampled(total: int, count: int | None, seed: int) -> list[int]:
    """Returns the numbers of some cells of all, chosen at random and in order; all of them for None.

    Example:
        >>> sampled(5, None, seed=0), len(sampled(5, 2, seed=0))
        ([0, 1, 2, 3, 4], 2)
    """
    if count is not None and count < 2:
        raise InvalidArgumentError("no correlation can be known", expected="two cells or more", got=str(count))
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    return chosen.sort().values.tolist()


def compared(agreement: Agreement | None) -> str:
    """Returns how an approximation agrees with exact patching, or that nobody has looked."""
    return "not compared with exact patching" if agreement is None else agreement.summary
