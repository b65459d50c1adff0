"""What linear probes trained at some points say of examples that they have not seen."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.activations import layers_of
from clearspan.analysis.places import Place
from clearspan.errors import InvalidArgumentError
from clearspan.plots.charts import lines
from clearspan.points import Address
from clearspan.results import Columns, Result
from clearspan.statistics import Interval, share_interval

from .probe import Label, Probe

if TYPE_CHECKING:
    import plotly.graph_objects as go

ProbeControl = Literal["shuffled", "by_token"]


@dataclass(frozen=True, eq=False, repr=False)
class Probes(Result):
    """Held-out accuracy at each point, on the CPU, and a probe for each, which is trained on all examples.

    Attributes:
        probes: By point, in the order asked for.
        classes: What is told apart.
        labels: Of each example, as an index into `classes`.
        groups: Of each example: examples of one group are in the same fold.
        folds: Of each example: the fold in which it was held out.
        places: Row and position of each example.
        predicted: What the probe trained without an example's fold takes it for.
        control_accuracy: Held-out accuracy on the control's labels, mean over as many draws; none without a control.
        control: What these labels are.
    """

    probes: tuple[Probe, ...]
    classes: tuple[Label, ...]
    labels: Int[Tensor, "example"]
    groups: Int[Tensor, "example"]
    folds: Int[Tensor, "example"]
    places: tuple[Place, ...]
    predicted: Int[Tensor, "point example"]
    control_accuracy: Float[Tensor, "draw point"]
    control: ProbeControl

    shown: ClassVar[int] = 40

    @property
    def points(self) -> tuple[str, ...]:
        """Full names of the points."""
        return tuple(probe.name for probe in self.probes)

    @property
    def accuracy(self) -> Float[Tensor, "point"]:
        """Share of examples whose class the probe got right without having seen them."""
        return (self.predicted == self.labels).double().mean(-1)

    @property
    def majority(self) -> float:
        """Accuracy of saying the commonest class always."""
        return self.labels.bincount().max().item() / len(self.labels)

    @property
    def title(self) -> str:
        """What was measured, on how many examples."""
        groups = int(self.groups.max()) + 1
        return (
            f"held-out accuracy of linear probes for {len(self.classes)} classes; {len(self.labels)} examples in "
            f"{groups} groups, {int(self.folds.max()) + 1} folds; majority {self.majority:z.4f}"
        )

    def at(self, where: int | str) -> Probe:
        """Returns the probe of a layer, or of a point's name.

        Raises:
            InvalidArgumentError: There is none there, or several.
        """
        found = [probe for probe in self.probes if probe.name == where or Address.parse(probe.name).layer == where]
        if len(found) != 1:
            raise InvalidArgumentError(
                f"there is not one probe at {where!r}", expected=f"one of {', '.join(self.points)}", got=str(len(found))
            )
        return found[0]

    def interval(self, level: float = 0.95) -> Interval:
        """Returns the accuracies with Wilson's score interval around each.

        Unlike a bootstrap interval it has a width where every example is right. Each group counts as one observation,
        so it is too wide where the examples of a group are unlike one another. That probes trained on other texts would
        be other probes, it does not know.

        Raises:
            InvalidArgumentError: A level outside 0 to 1.

        References:
            Wilson (1927), "Probable inference, the law of succession, and statistical inference", JASA 22(158).
        """
        return share_interval(self.accuracy[..., None], level=level, observations=int(self.groups.max()) + 1)

    def columns(self) -> Columns:
        """Returns one row for each point; `low` and `high` are the ends of the 95 % interval."""
        interval = self.interval()
        columns: dict[str, list[object]] = {
            "point": list(self.points),
            "accuracy": interval.mean.tolist(),
            "low": interval.low.tolist(),
            "high": interval.high.tolist(),
        }
        if len(self.control_accuracy):
            columns[f"control ({self.control.replace('_', ' ')})"] = self.control_accuracy.mean(0).tolist()
        return columns

    def plot(self) -> "go.Figure":
        """Returns accuracies by point, or by layer where there is one in each, with the control and the majority."""
        layers = layers_of(self.points)
        is_by_layer = len(set(layers)) == len(self.points)
        series = {"probe": self.accuracy.tolist()}
        if len(self.control_accuracy):
            series[f"control ({self.control.replace('_', ' ')})"] = self.control_accuracy.mean(0).tolist()
        series["majority"] = [self.majority] * len(self.points)
        x = [str(layer) for layer in layers] if is_by_layer else self.points
        figure = lines(
            series,
            x=x,
            x_title="layer" if is_by_layer else "point",
            value_title="held-out accuracy",
            title=self.title,
        )
        return figure.update_layout(xaxis_type="category", yaxis_range=[0, 1.03])
