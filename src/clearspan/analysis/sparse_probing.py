"""Sparse probes: how well a class can be read from a few neurons, which are chosen without the held-out examples."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.activations import Layers, gathered, points_of
from clearspan.analysis.logistic import fitted
from clearspan.analysis.probing import Examples, Label, Labels, Probe, point_at
from clearspan.analysis.translators import name_of
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_choice, check_counts, check_positive, is_whole, whole_numbers
from clearspan.effects import Effects
from clearspan.errors import InvalidArgumentError, NotFiniteError
from clearspan.inputs import Input, Place, Positions
from clearspan.modes import no_grad
from clearspan.progress import Progress, shown
from clearspan.results import counted, number

NeuronChoice = Literal["mean_difference", "separation"]
Neuron = int | tuple[int, ...]
"""The number of a neuron or feature; of a value of several axes, such as heads, its place on each."""
Features = Callable[[Float[Tensor, "example *axes"]], Float[Tensor, "example feature"]]
"""Makes features of values, such as the encoder of a sparse autoencoder."""


@dataclass(frozen=True, eq=False, repr=False)
class SparseProbes(Effects):
    """Held-out accuracy of probes of `k` neurons at each point, and the probes trained on all examples.

    The values are `"accuracy"`, 1 or 0 for each example; `"shuffled labels"` and `"random neurons"`, the accuracy of
    each draw of the two controls. `interval()` takes examples as independent, which those of a group may not be.

    Attributes:
        ranking: By point: neurons, best first, as chosen on all examples; as many as the largest `k`.
        probes: By point and `k`.
        classes: What the probes tell apart.
        targets: The class of each example, as an index into `classes`.
        groups: Of each example: examples of one group are in the same fold.
        folds: Of each example: the fold in which it was held out.
        places: Row and position of each example.
    """

    ranking: Mapping[str, tuple[Neuron, ...]] = field(default_factory=dict)
    probes: Mapping[tuple[str, int], Probe] = field(default_factory=dict)
    classes: tuple[Label, ...] = ()
    targets: Int[Tensor, "example"] = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    groups: Int[Tensor, "example"] = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    folds: Int[Tensor, "example"] = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    places: tuple[Place, ...] = ()

    @property
    def majority(self) -> float:
        """Accuracy of saying the commonest class always."""
        return self.targets.bincount().max().item() / len(self.targets)

    def at(self, where: int | str, k: int) -> Probe:
        """Returns the probe of `k` neurons of a layer, or of a point's name; the weights of other neurons are 0.

        Raises:
            InvalidArgumentError: There is none there, or several.
        """
        point = point_at(tuple(self.ranking), where)
        ks = sorted(size for name, size in self.probes if name == point)
        if not is_whole(k) or k not in ks:
            raise InvalidArgumentError(f"there is no probe of k={k!r} neurons"[:80], expected=f"one of {ks}")
        return self.probes[point, int(k)]

    def neurons(self, where: int | str, k: int | None = None) -> tuple[Neuron, ...]:
        """Returns the neurons that the probe of a layer or point reads, best first; by default those of the largest.

        Raises:
            InvalidArgumentError: There is no such point, or several; or it has fewer neurons.
        """
        ranked = self.ranking[point_at(tuple(self.ranking), where)]
        if k is not None:
            check_counts(k=k)
            if k > len(ranked):
                raise InvalidArgumentError(f"k={k} neurons were not chosen", expected=f"1 to {len(ranked)}")
        return ranked[:k]


@no_grad
def train_sparse_probe(
    bridge: TransformerBridge,
    input: Input,
    labels: Labels,
    *,
    ks: int | Sequence[int] = (1, 2, 4, 8, 16),
    layers: Layers = None,
    name: str = "post",
    features: Features | None = None,
    choice: NeuronChoice = "mean_difference",
    positions: Positions = -1,
    groups: Sequence[Hashable] | None = None,
    folds: int = 5,
    l2: float = 1.0,
    controls: int = 3,
    seed: int = 0,
    attention_mask: Int[Tensor, "row pos"] | None = None,
    batch_size: int = 32,
    progress: bool | Progress = True,
) -> SparseProbes:
    """Returns probes that read `k` neurons of each layer, and how often they are right about unseen examples.

    For each fold, neurons are ranked by the other folds' examples alone, and a logistic regression as that of
    `train_probe` is trained on the best `k` of them. A class that one neuron tells as well as many is told by that
    neuron; accuracy that rises up to a large `k` says that it is spread over many. That a neuron tells a class does not
    say that the model uses it.

    Neurons are ranked by how far apart the means of the classes are: the root of `sum over classes of share *
    (mean - overall mean)²`. With `choice="separation"` this is divided by the spread within the classes, so that the
    scale of a neuron does not count.

    Args:
        bridge: The model.
        input: Any input.
        labels: As for `train_probe`.
        ks: How many neurons, one number or several.
        layers: One or several, negative from the end; by default all.
        name: Short name of a point in each layer, by default the neurons of MLPs, or the full name of one point. Values
            of several axes are read whole.
        features: Makes features `[example, feature]` of the values, in float32 on the CPU, in place of neurons: such as
            the encoder of a sparse autoencoder. The probes are then of its features.
        choice: How neurons are ranked.
        positions: As for `train_probe`.
        groups: As for `train_probe`.
        folds: Into how many parts examples go; each part is held out once.
        l2: Penalty, as for `train_probe`.
        controls: Draws of each control: shuffled labels, for which neurons are ranked anew, and random neurons.
        seed: Of folds and controls. Torch's own seed is neither read nor changed.
        attention_mask: 1 for real tokens, where bare token ids have padding.
        batch_size: Rows run at a time.
        progress: Whether a bar is shown, or a function called as `progress(stage, done, total)` after each point.

    Raises:
        UnknownPointError: There is no such point, or no such layer.
        InvalidArgumentError: More neurons than there are, features that are not one row for each example, or as for
            `train_probe`.
        NotFiniteError: A value or feature is infinite or not a number.
        NoTokenizerError: Text, and the bridge has no tokenizer.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> words = ["area", "name", "size", "path", "data", "key"]
        >>> texts = [f"def {w}(self): return" for w in words] + [f"def {w}(x): return" for w in words]
        >>> found = train_sparse_probe(
        ...     bridge, texts, ["method"] * 6 + ["function"] * 6, layers=[1, 3], ks=[1, 4], folds=3, controls=1
        ... )
        >>> found.mean().shape, len(found.neurons(3)), found.at(3, k=1).classes
        (torch.Size([2, 2]), 4, ('function', 'method'))

    References:
        Gurnee et al. (2023), "Finding Neurons in a Haystack: Case Studies with Sparse Probing", arXiv:2305.01610.
    """
    check_choice(get_args(NeuronChoice), choice=choice)
    check_positive(l2=l2)
    check_counts(0, folds=folds, controls=controls, seed=seed)
    sizes = sorted({*whole_numbers("ks", ks)})
    if not sizes or sizes[0] < 1:
        raise InvalidArgumentError(f"ks={ks!r} are no numbers of neurons"[:80], expected="whole numbers from 1")
    names = points_of(bridge, name, layers)
    batch = bridge.to_batch(input, attention_mask)
    rows: dict[str, list[Tensor]] = {"accuracy": [], "shuffled labels": [], "random neurons": []}
    ranking: dict[str, tuple[Neuron, ...]] = {}
    probes: dict[tuple[str, int], Probe] = {}
    with shown(progress) as tell:
        read = gathered(bridge, batch, names, positions=positions, batch_size=batch_size, tell=tell)
        examples = Examples.of(batch, read, labels, groups, folds, seed)
        shuffled = [examples.control_labels("shuffled", seed + number) for number in range(controls)]
        for done, point in enumerate(names):
            values = _features(read.values[point], features, point)
            flat, fit = values.flatten(1), Fit(sizes, choice, len(examples.classes), l2)
            if sizes[-1] > flat.shape[1]:
                raise InvalidArgumentError(
                    f"k={sizes[-1]} neurons cannot be chosen", expected=f"1 to {flat.shape[1]}", where=point
                )
            orders = [_random_order(flat.shape[1], seed + draw) for draw in range(controls)]
            rows["accuracy"].append(fit.correct(flat, examples.labels, examples.folds).double())
            rows["shuffled labels"].append(_means([fit.correct(flat, own, examples.folds) for own in shuffled], sizes))
            of_random = [fit.correct(flat, examples.labels, examples.folds, order) for order in orders]
            rows["random neurons"].append(_means(of_random, sizes))
            order = fit.order(flat, examples.labels)[: sizes[-1]]
            ranking[point] = tuple(_place(one, values.shape[1:]) for one in order.tolist())
            for k in sizes:
                weight, bias = fit.weights(flat, examples.labels, order[:k])
                probes[point, k] = examples.probe(point, values, weight, bias, name_of(bridge))
            tell("sparse probes", done + 1, len(names))
    count, group_count = len(examples.labels), int(examples.groups.max()) + 1
    majority = examples.labels.bincount().max().item() / count
    return SparseProbes(
        {name: torch.stack(own) for name, own in rows.items() if controls or name == "accuracy"},
        {"point": names, "k": tuple(sizes)},
        what=(
            f"sparse probes for {len(examples.classes)} classes, held out; {counted(count, 'example')} in "
            f"{counted(group_count, 'group')}, {folds} folds; majority {number(majority)}"
        ),
        span=(0.0, 1.0),
        row="example",
        ranking=ranking,
        probes=probes,
        classes=examples.classes,
        targets=examples.labels,
        groups=examples.groups,
        folds=examples.folds,
        places=read.places,
    )


@dataclass(frozen=True)
class Fit:
    """How sparse probes are trained.

    Attributes:
        sizes: Numbers of neurons, rising.
        choice: How neurons are ranked.
        n_classes: How many classes.
        l2: Penalty.
    """

    sizes: list[int]
    choice: NeuronChoice
    n_classes: int
    l2: float

    def order(self, values: Float[Tensor, "example width"], labels: Int[Tensor, "example"]) -> Int[Tensor, "width"]:
        """Returns neurons, best first."""
        wide = values.double()
        classes = [wide[labels == one] for one in range(self.n_classes)]
        shares = torch.tensor([len(one) / len(wide) for one in classes], dtype=torch.double)
        means = torch.stack([one.mean(0) if len(one) else wide.mean(0) for one in classes])
        between = shares @ (means - shares @ means).square()
        if self.choice == "separation":
            within = torch.stack([(one - mean).square().sum(0) for one, mean in zip(classes, means, strict=True)])
            between = (between / (within.sum(0) / len(wide))).nan_to_num(nan=0.0)
        return between.argsort(descending=True, stable=True)

    def weights(
        self, values: Float[Tensor, "example width"], labels: Int[Tensor, "example"], chosen: Int[Tensor, "k"]
    ) -> tuple[Float[Tensor, "class width"], Float[Tensor, "class"]]:
        """Returns the weights and biases of a probe of some neurons; the weights of others are 0."""
        (own,), (bias,) = fitted(values[:, chosen], labels[None], self.n_classes, self.l2)
        weight = own.new_zeros(self.n_classes, values.shape[1])
        weight[:, chosen] = own
        return weight, bias

    def correct(
        self,
        values: Float[Tensor, "example width"],
        labels: Int[Tensor, "example"],
        folds: Int[Tensor, "example"],
        order: Int[Tensor, "width"] | None = None,
    ) -> Tensor:
        """Returns `[k, example]`: whether a probe trained without an example's fold gives it its label.

        Args:
            values: Of all neurons.
            labels: Of the examples.
            folds: Of the examples.
            order: Neurons, best first; by default as the examples of the other folds rank them.
        """
        found = torch.empty(len(self.sizes), len(labels), dtype=torch.bool)
        for fold in folds.unique():
            held_out = folds == fold
            seen, own = values[~held_out], labels[~held_out]
            ranked = self.order(seen, own) if order is None else order
            for index, k in enumerate(self.sizes):
                chosen = ranked[:k]
                (weight,), (bias,) = fitted(seen[:, chosen], own[None], self.n_classes, self.l2)
                predicted = (values[held_out][:, chosen].double() @ weight.T + bias).argmax(-1)
                found[index, held_out] = predicted == labels[held_out]
        return found


def _features(
    values: Float[Tensor, "example *axes"], features: Features | None, point: str
) -> Float[Tensor, "example *axes"]:
    """Returns what probes read: the values, or features of them."""
    if features is None:
        return values
    if not callable(features):
        raise InvalidArgumentError("features= is a function of values", got=repr(features)[:80])
    found = features(values)
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(values) or not found.is_floating_point():
        raise InvalidArgumentError(
            f"the features at {point} are not one row for each example",
            expected=f"[{len(values)}, feature], floating point",
            got=str(list(found.shape)) if isinstance(found, Tensor) else type(found).__name__,
        )
    found = found.detach().cpu()
    if not found.isfinite().all():
        raise NotFiniteError(f"the features at {point} are not finite", got=str(found.dtype))
    return found


def _means(draws: list[Tensor], sizes: list[int]) -> Float[Tensor, "k draw"]:
    return torch.stack([one.double().mean(-1) for one in draws], -1) if draws else torch.empty(len(sizes), 0)


def _random_order(width: int, seed: int) -> Int[Tensor, "width"]:
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))


def _place(neuron: int, shape: Sequence[int]) -> Neuron:
    """Returns a neuron's place on the axes of a value."""
    if len(shape) < 2:
        return neuron
    return tuple(int(one) for one in torch.unravel_index(torch.tensor(neuron), tuple(shape)))
