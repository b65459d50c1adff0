"""Linear probes: how well a class can be read from activations, on examples that the probe has not seen."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.activations import Activations, Layers, gathered, layers_of, points_of
from clearspan.analysis.logistic import fitted, predicted_held_out, stratified_folds
from clearspan.analysis.steering import SteeringVector
from clearspan.analysis.translators import name_of
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, check_kind, check_positive, tensor_of
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Batch, Input, Place, Positions
from clearspan.modes import no_grad
from clearspan.plots import LineChart
from clearspan.points import Address
from clearspan.progress import Progress, shown
from clearspan.results import Columns, Result, counted, number
from clearspan.statistics import Interval, share_interval

if TYPE_CHECKING:
    import plotly.graph_objects as go

Label = str | int
Labels = Sequence[Label] | Sequence[Sequence[Label]] | Int[Tensor, "row"] | Int[Tensor, "row pos"]
"""One for each row; or one for each position: a list a row of its real tokens' labels, or a tensor as the ids lie."""
ProbeControl = Literal["shuffled", "by_token"]


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier of the values at one hook point, in float64 on the CPU: `weight @ value + bias`.

    Attributes:
        name: The point's full name.
        classes: What it tells apart, in the order of its logits.
        weight: For values as they are; of the point's own axes, such as `[class, d_model]`.
        bias: In the unit of the logits, nats.
        means: Mean value of each class.
        activation_norm: Mean norm of the values.
        model_name: The model that it was trained on.
    """

    name: str
    classes: tuple[Label, ...]
    weight: Float[Tensor, "class *axes"]
    bias: Float[Tensor, "class"]
    means: Float[Tensor, "class *axes"]
    activation_norm: float
    model_name: str

    def logits(self, values: Float[Tensor, "*place axes"]) -> Float[Tensor, "*place class"]:
        """Returns unnormalised log-probabilities of the classes, on the values' device, in float64.

        Args:
            values: At the point, such as `cache[probe.name]`.

        Raises:
            InvalidArgumentError: Values of another shape.
        """
        values, axes = tensor_of("values", values), self.weight.ndim - 1
        if values.shape[values.ndim - axes :] != self.weight.shape[1:] or values.ndim < axes:
            raise InvalidArgumentError(
                f"the probe at {self.name} cannot read these values",
                expected=f"[..., {', '.join(map(str, self.weight.shape[1:]))}]",
                got=str(list(values.shape)),
            )
        exact = values.detach().double().flatten(-axes)
        return exact @ self.weight.flatten(1).T.to(exact) + self.bias.to(exact)

    def predict(self, values: Float[Tensor, "*place axes"]) -> Int[Tensor, "*place"]:
        """Returns the likeliest class of each value, as an index into `classes`.

        Raises:
            InvalidArgumentError: Values of another shape.
        """
        return self.logits(values).argmax(-1)

    def direction(self, positive: Label, negative: Label | None = None) -> Float[Tensor, "*axes"]:
        """Returns the direction of norm 1 along which the logit of one class rises most against that of another.

        Args:
            positive: The class that it leads to.
            negative: The class that it leads away from; by default all others, in equal parts.

        Raises:
            InvalidArgumentError: A class that is not there, or twice the same.
        """
        weights = self._difference(self.weight, positive, negative)
        return weights / weights.norm().clamp(min=torch.finfo(weights.dtype).tiny)

    def steering_vector(self, positive: Label, negative: Label | None = None) -> SteeringVector:
        """Returns the direction as a steering vector, as long as the class means differ along it, in float32.

        A direction that tells classes apart need not be one that the model uses: it is tilted away from what varies for
        other reasons. The difference of means (`fit_steering_vector`) is often the better one to steer with.

        Arguments and errors are those of `direction`.
        """
        unit = self.direction(positive, negative)
        length = (self._difference(self.means, positive, negative) * unit).sum()
        against = "the others" if negative is None else repr(negative)
        return SteeringVector(
            {self.name: (unit * length).float()},
            {self.name: self.activation_norm},
            self.model_name,
            f"linear probe for {positive!r} against {against}",
        )

    def _difference(
        self, rows: Float[Tensor, "class *axes"], positive: Label, negative: Label | None
    ) -> Float[Tensor, "*axes"]:
        one = self._index(positive)
        others = [i for i in range(len(rows)) if i != one] if negative is None else [self._index(negative)]
        if others == [one]:
            raise InvalidArgumentError(f"a direction leads from one class to another, and not from {positive!r} itself")
        return rows[one] - rows[others].mean(0)

    def _index(self, label: Label) -> int:
        if label not in self.classes:
            raise InvalidArgumentError(f"the probe knows no class {label!r}", expected=str(self.classes))
        return self.classes.index(label)


@dataclass(frozen=True, eq=False, repr=False)
class Probes(Result):
    """Held-out accuracy at each point, on the CPU, and a probe for each that is trained on all examples.

    Attributes:
        probes: By point, in the order asked for.
        classes: What the probes tell apart.
        labels: Of each example, as an index into `classes`.
        groups: Of each example: examples of one group are in the same fold.
        folds: Of each example: the fold in which it was held out.
        places: Row and position of each example.
        predicted: The class that the probe trained without an example's fold gives to it.
        control_accuracy: Held-out accuracy on each draw of the control's labels.
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
        examples, groups = counted(len(self.labels), "example"), counted(int(self.groups.max()) + 1, "group")
        return (
            f"held-out accuracy of linear probes for {len(self.classes)} classes; {examples} in {groups}, "
            f"{int(self.folds.max()) + 1} folds; majority {number(self.majority)}"
        )

    def at(self, where: int | str) -> Probe:
        """Returns the probe of a layer, or of a point's name.

        Raises:
            InvalidArgumentError: There is none there, or several.
        """
        return self.probes[self.points.index(point_at(self.points, where))]

    def interval(self, level: float = 0.95) -> Interval:
        """Returns the accuracies with Wilson's score interval around each.

        Unlike a bootstrap interval it has a width where every example is right. Each group counts as one observation,
        so it is too wide where the examples of a group are unlike one another. It does not know that other training
        texts would give other probes.

        Raises:
            InvalidArgumentError: A level outside 0 to 1.

        References:
            Wilson (1927), "Probable inference, the law of succession, and statistical inference", JASA 22(158).
        """
        return share_interval(self.accuracy[..., None], level=level, observations=int(self.groups.max()) + 1)

    def columns(self) -> Columns:
        """Returns one row for each point; `low` and `high` are the ends of the 95 % interval."""
        interval = self.interval()
        ends = {"low": interval.low.tolist(), "high": interval.high.tolist()}
        return {"point": self.points, "accuracy": interval.mean.tolist(), **ends, **self._control}

    @property
    def _control(self) -> dict[str, list[float]]:
        """The control's accuracy at each point, mean over its draws, by its name; empty without a draw."""
        name, draws = f"control ({self.control.replace('_', ' ')})", self.control_accuracy
        return {name: draws.mean(0).tolist()} if len(draws) else {}

    def chart(self) -> LineChart:
        """Returns accuracies by point, or by layer where there is one in each, with the control and the majority."""
        layers = layers_of(self.points)
        is_by_layer = len(set(layers)) == len(self.points)
        series = {"probe": self.accuracy.tolist(), **self._control, "majority": [self.majority] * len(self.points)}
        return LineChart(
            series,
            [str(layer) for layer in layers] if is_by_layer else self.points,
            "layer" if is_by_layer else "point",
            "held-out accuracy",
            self.title,
            span=(0, 1),
        )

    def plot(self) -> "go.Figure":
        """Returns a plotly figure of it, each point or layer at its own place."""
        return super().plot().update_layout(xaxis_type="category")


@no_grad
def train_probe(
    bridge: TransformerBridge,
    input: Input,
    labels: Labels,
    *,
    layers: Layers = None,
    name: str = "resid_post",
    positions: Positions = -1,
    groups: Sequence[Hashable] | None = None,
    folds: int = 5,
    l2: float = 1.0,
    control: ProbeControl = "shuffled",
    controls: int = 3,
    seed: int = 0,
    attention_mask: Int[Tensor, "row pos"] | None = None,
    batch_size: int = 32,
    progress: bool | Progress = True,
) -> Probes:
    """Returns linear probes at each layer, and how often they are right about examples that they have not seen.

    Each place of the input is an example. Activations are gathered in one pass for all points. A probe is a multinomial
    logistic regression on standardised features, with a penalty on its weights:
    `sum(cross_entropy) + l2 / 2 * sum(weight²)`. Every example is held out once: the folds have the classes in equal
    shares, the examples of a group are in one fold, and what a probe is trained on, means and spreads of features
    included, is the other folds alone.

    Args:
        bridge: The model.
        input: Any input: text, texts, token ids, a tokenizer's output, a `Batch`, ...
        labels: One for each row; or one for each position: for each row a list of its real tokens' labels, or a tensor
            `[row, pos]` that lies as the token ids do.
        layers: One or several, negative from the end; by default all.
        name: Short name of a point in each layer, or the full name of one point. Values of several axes, such as those
            of all heads at `"z"`, are read whole.
        positions: Where to read: counted among each row's real tokens, negative from the last one; None for all.
        groups: For each row its source, template or author: rows of one group are never split between training and
            held-out examples. By default rows of the same tokens are one group, and every other row is its own.
        folds: Into how many parts examples go; each part is held out once.
        l2: Penalty; larger for fewer examples, or many features.
        control: What labels the control has. `"shuffled"`: the labels in a random order, between groups where each
            group has one label; no probe can know them, and held-out accuracy is that of chance. `"by_token"`: a random
            label for each token that is read; a probe that does as well on these may have learned which token is which.
        controls: Draws of the control's labels.
        seed: Of folds and control. Torch's own seed is neither read nor changed.
        attention_mask: 1 for real tokens, where bare token ids have padding.
        batch_size: Rows run at a time.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, total)` after each point.

    Returns:
        Held-out predictions at each point, and a probe for each that is trained on all examples.

    Raises:
        UnknownPointError: There is no such point, or no such layer.
        InvalidArgumentError: Labels or groups that are not one for each row, one class alone, a class in one fold
            alone, a position that a row does not have, a control by token of an input without tokens, or a size that is
            not positive.
        NotFiniteError: A value is infinite or not a number.
        NoTokenizerError: Text, and the bridge has no tokenizer.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> words = ["area", "name", "size", "path", "data", "key"]
        >>> texts = [f"def {w}(self): return" for w in words] + [f"def {w}(x): return" for w in words]
        >>> found = train_probe(bridge, texts, ["method"] * 6 + ["function"] * 6, layers=[1, 3], folds=3, controls=1)
        >>> found.accuracy.shape, found.majority, found.at(3).classes
        (torch.Size([2]), 0.5, ('function', 'method'))

    References:
        Alain and Bengio (2016), arXiv:1610.01644, for linear probes. Hewitt and Liang (2019), arXiv:1909.03368, for
        control tasks: theirs has a random label for each word type, which is `"by_token"`.
    """
    if control not in get_args(ProbeControl):
        raise InvalidArgumentError(f"unknown control {control!r}", expected="'shuffled' or 'by_token'")
    check_positive(l2=l2)
    check_counts(0, folds=folds, controls=controls, seed=seed)
    names = points_of(bridge, name, layers)
    batch = bridge.to_batch(input, attention_mask)
    if control == "by_token" and controls and batch.tokens is None:
        raise InvalidArgumentError("control='by_token' needs token ids", got="embeddings", fix="control='shuffled'")
    with shown(progress) as tell:
        read = gathered(bridge, batch, names, positions=positions, batch_size=batch_size, tell=tell)
        examples = Examples.of(batch, read, labels, groups, folds, seed)
        targets = examples.labels
        drawn = [examples.control_labels(control, seed + number) for number in range(controls)]
        every = torch.stack([targets, *drawn])
        probes, predicted, model_name = [], [], name_of(bridge)
        for done, point in enumerate(names):
            values = read.values[point]
            predicted.append(predicted_held_out(values.flatten(1), every, examples.folds, len(examples.classes), l2))
            (weight,), (bias,) = fitted(values.flatten(1), targets[None], len(examples.classes), l2)
            probes.append(examples.probe(point, values, weight, bias, model_name))
            tell("probes", done + 1, len(names))
    by_labels = torch.stack(predicted, dim=1)
    return Probes(
        probes=tuple(probes),
        classes=examples.classes,
        labels=targets,
        groups=examples.groups,
        folds=examples.folds,
        places=read.places,
        predicted=by_labels[0],
        control_accuracy=(by_labels == every[:, None]).double().mean(-1)[1:],
        control=control,
    )


def point_at(points: Sequence[str], where: int | str) -> str:
    """Returns the one of some points that has a name or is in a layer.

    Raises:
        InvalidArgumentError: There is none there, or several.
    """
    check_kind(str, int, np.integer, where=where)
    found = [point for point in points if point == where or Address.parse(point).layer == where]
    if len(found) != 1:
        raise InvalidArgumentError(
            f"there is not one probe at {where!r}", expected=f"one of {', '.join(points)}", got=str(len(found))
        )
    return found[0]


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled examples, in groups that are held out together.

    Attributes:
        read: Their values, places and texts.
        classes: In order.
        labels: Of each example, as an index into `classes`.
        groups: The number of each example's group, from 0.
        folds: The number of the fold in which each example is held out.
    """

    read: Activations
    classes: tuple[Label, ...]
    labels: Int[Tensor, "example"]
    groups: Int[Tensor, "example"]
    folds: Int[Tensor, "example"]

    @classmethod
    def of(
        cls,
        batch: Batch,
        read: Activations,
        labels: Labels,
        groups: Sequence[Hashable] | None,
        folds: int,
        seed: int,
    ) -> Self:
        """Returns the examples of values that were read of a batch. Arguments and errors are those of `train_probe`."""
        classes, targets = _classes(batch, read.places, labels)
        group_of = _groups(batch, read, groups)
        return cls(read, classes, targets, group_of, stratified_folds(targets, group_of, folds, seed))

    def control_labels(self, control: ProbeControl, seed: int) -> Int[Tensor, "example"]:
        """Returns one draw of the labels of a control of `train_probe`."""
        return _control_labels(self.read, self.labels, self.groups, control, seed)

    def probe(
        self,
        name: str,
        values: Float[Tensor, "example *axes"],
        weight: Float[Tensor, "class width"],
        bias: Float[Tensor, "class"],
        model_name: str,
    ) -> Probe:
        """Returns the probe of values at a point, with given weights."""
        means = torch.stack([values[self.labels == number].double().mean(0) for number in range(len(self.classes))])
        norm = values.flatten(1).norm(dim=1).mean().item()
        return Probe(name, self.classes, weight.view_as(means), bias, means, norm, model_name)


def _classes(batch: Batch, places: Sequence[Place], labels: Labels) -> tuple[tuple[Label, ...], Int[Tensor, "example"]]:
    """Returns the classes in order, and that of each example."""
    is_tensor = isinstance(labels, Tensor | np.ndarray)
    if not is_tensor and (isinstance(labels, str) or not isinstance(labels, Sequence)):
        raise InvalidArgumentError("labels are one for each row", expected=f"{batch.rows} labels", got=repr(labels))
    given: list = labels.tolist() if is_tensor else list(labels)
    if len(given) != batch.rows:
        raise InvalidArgumentError("labels are one for each row", expected=f"{batch.rows} labels", got=str(len(given)))
    of_examples = [given[row] for row, _ in places]
    if any(isinstance(own, list | tuple) for own in given):
        widths = [batch.width] * batch.rows if is_tensor else batch.lengths.tolist()
        sizes = [len(own) if isinstance(own, list | tuple) else 0 for own in given]
        if sizes != widths:
            raise InvalidArgumentError(
                "labels of positions lie as the token ids do",
                expected=f"rows of {widths} labels, {'padding included' if is_tensor else 'one for each real token'}",
                got=f"rows of {sizes}",
            )
        columns = [batch.real_columns[row][at] if is_tensor else at for row, at in places]
        of_examples = [own[column] for own, column in zip(of_examples, columns, strict=True)]
    try:
        classes = tuple(sorted(set(of_examples)))
    except TypeError:
        raise InvalidArgumentError("labels are texts, or whole numbers", got=repr(given)[:80]) from None
    if len(classes) < 2:
        raise InvalidArgumentError(
            "a probe tells classes apart", expected="two classes or more", got=", ".join(map(repr, classes))
        )
    return classes, torch.tensor([classes.index(label) for label in of_examples])


def _groups(batch: Batch, read: Activations, groups: Sequence[Hashable] | None) -> Int[Tensor, "example"]:
    """Returns the number of each example's group, from 0."""
    if groups is None:
        groups = range(batch.rows) if batch.tokens is None else read.texts
    given = groups.tolist() if isinstance(groups, Tensor | np.ndarray) else groups
    if not isinstance(given, Sequence) or len(given) != batch.rows:
        got = str(len(given)) if isinstance(given, Sequence) else repr(given)
        raise InvalidArgumentError("groups are one for each row", expected=f"{batch.rows} groups", got=got)
    try:
        numbers = {group: count for count, group in enumerate(dict.fromkeys(given))}
    except TypeError:
        raise InvalidArgumentError("groups are names or numbers", got=repr(given)[:80]) from None
    return torch.tensor([numbers[given[row]] for row, _ in read.places])


def _control_labels(
    read: Activations,
    targets: Int[Tensor, "example"],
    groups: Int[Tensor, "example"],
    control: ProbeControl,
    seed: int,
) -> Int[Tensor, "example"]:
    """Returns one draw of the labels of a control of `train_probe`."""
    generator = torch.Generator().manual_seed(seed)
    if control == "by_token":
        tokens = torch.tensor([read.texts[row][position] for row, position in read.places])
        types, type_of = tokens.unique(return_inverse=True)
        return targets[torch.randint(len(targets), types.shape, generator=generator)][type_of]
    n_groups = int(groups.max()) + 1
    of_group = torch.zeros(n_groups, dtype=torch.long).index_put_((groups,), targets)
    if torch.equal(of_group[groups], targets):
        return of_group[torch.randperm(n_groups, generator=generator)][groups]
    return targets[torch.randperm(len(targets), generator=generator)]
