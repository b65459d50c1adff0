"""Linear probes: how well a class can be read from activations, on examples that the probe has not seen."""

from collections.abc import Hashable, Sequence
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.activations import Activations, Layers, Positions, gathered, points_of
from clearspan.analysis.corpus import check_positive
from clearspan.analysis.places import Input
from clearspan.analysis.progress import Progress, silent
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError

from .folds import stratified_folds
from .probe import Label, Probe
from .probe_design import Design, predicted_held_out
from .probe_result import ProbeControl, Probes

Labels = Sequence[str] | Sequence[int] | Int[Tensor, "batch"] | Int[Tensor, "batch pos"]
"""One for each row, or, with token ids, one for each of their positions."""


@torch.no_grad()
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
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    batch_size: int = 32,
    progress: Progress = silent,
) -> Probes:
    """Returns linear probes at each layer, and how often they are right about examples that they have not seen.

    Each place of the input is an example. Activations are gathered in one pass for all points. A probe is a multinomial
    logistic regression on standardised features, with a penalty on its weights:
    `sum(cross_entropy) + l2 / 2 * sum(weight²)`. Every example is held out once: the folds have the classes in equal
    shares, the examples of a group are in one fold, and what a probe is trained on, means and spreads of features
    included, is the other folds alone.

    Args:
        bridge: The model.
        input: Text, a list of texts, or token ids `[batch, pos]`.
        labels: One for each row. With token ids, also one for each position: `[batch, pos]`.
        layers: One or several, negative from the end; by default all.
        name: Short name of a point in each layer, or the full name of one point. Values of several axes, such as those
            of all heads at `"z"`, are read whole.
        positions: Where to read: counted among each row's real tokens, negative from the end; None for all.
        groups: What may not be split between training and held-out examples, for each row: its source, its template,
            its author. By default rows of the same tokens are one group, and every other row is its own.
        folds: Parts, each of which is held out once.
        l2: Penalty; larger for fewer examples, or many features.
        control: Of what labels the control is. `"shuffled"`: the labels in a random order, between groups where each
            group has one label; no probe can know them, and held-out accuracy is that of chance. `"by_token"`: a random
            label for each token that is read; a probe that does as well on these may have learned which token is which.
        controls: Draws of the control's labels.
        seed: Of folds and control. Torch's own seed is neither read nor changed.
        attention_mask: 1 for real tokens, where token ids have padding. Texts make their own.
        batch_size: Rows run at a time.
        progress: Called after each point.

    Returns:
        Held-out predictions at each point, and a probe for each that is trained on all examples.

    Raises:
        UnknownPointError: There is no such point, or no such layer.
        InvalidArgumentError: Labels or groups that are not one for each row, one class alone, a class in one fold
            alone, a position that a row does not have, or a size that is not positive.
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
    names = points_of(bridge, name, layers)
    read = gathered(bridge, input, names, positions=positions, mask=attention_mask, batch_size=batch_size)
    classes, targets = _classes(read, labels, attention_mask)
    group_of = _groups(read, groups)
    fold_of = stratified_folds(targets, group_of, folds, seed)
    drawn = [control_labels(read, targets, group_of, control, seed + i) for i in range(controls)]
    every = torch.stack([targets, *drawn])
    probes, predicted = [], []
    for done, point in enumerate(names):
        values = read.values[point]
        predicted.append(predicted_held_out(values.flatten(1), every, fold_of, len(classes), l2))
        probes.append(_trained(bridge, point, values, classes, targets, l2))
        progress("probes", done + 1, len(names))
    by_labels = torch.stack(predicted, dim=1)
    return Probes(
        probes=tuple(probes),
        classes=classes,
        labels=targets,
        groups=group_of,
        folds=fold_of,
        places=read.places,
        predicted=by_labels[0],
        control_accuracy=(by_labels == every[:, None]).double().mean(-1)[1:],
        control=control,
    )


def _trained(
    bridge: TransformerBridge,
    name: str,
    values: Float[Tensor, "example *axes"],
    classes: tuple[Label, ...],
    targets: Int[Tensor, "example"],
    l2: float,
) -> Probe:
    """Returns the probe of one point, trained on all examples."""
    features, shape = values.flatten(1), values.shape[1:]
    weight, bias = Design.of(features).fit(targets[None], len(classes), l2)
    return Probe(
        name,
        classes,
        weight[0].unflatten(1, shape),
        bias[0],
        torch.stack([values[targets == i].double().mean(0) for i in range(len(classes))]),
        features.norm(dim=1).mean().item(),
        bridge.cfg.model_name or bridge.cfg.architecture,
    )


def _classes(
    read: Activations, labels: Labels, mask: Int[Tensor, "batch pos"] | None
) -> tuple[tuple[Label, ...], Int[Tensor, "example"]]:
    """Returns the classes in order, and that of each example."""
    n_rows = len(read.texts)
    given = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    if len(given) != n_rows:
        raise InvalidArgumentError("labels are one for each row", expected=f"{n_rows} labels", got=str(len(given)))
    of_examples: list[Label]
    if isinstance(labels, Tensor) and labels.ndim == 2:
        of_examples = _labels_of_positions(read, labels, mask)
    else:
        of_examples = [given[row] for row, _ in read.places]
    classes = tuple(sorted(set(of_examples)))
    if len(classes) < 2:
        raise InvalidArgumentError(
            "a probe tells classes apart", expected="two classes or more", got=", ".join(map(repr, classes))
        )
    return classes, torch.tensor([classes.index(label) for label in of_examples])


def _labels_of_positions(
    read: Activations, labels: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"] | None
) -> list[Label]:
    real = torch.ones_like(labels) if mask is None else mask.cpu()
    lengths = [len(text) for text in read.texts]
    if real.shape != labels.shape or real.sum(-1).tolist() != lengths:
        raise InvalidArgumentError(
            "labels of positions lie as the token ids do",
            expected=f"labels of their shape, with {lengths} real tokens",
            got=str(list(labels.shape)),
        )
    rows = [row[keep].tolist() for row, keep in zip(labels.cpu(), real.bool(), strict=True)]
    return [rows[row][position] for row, position in read.places]


def _groups(read: Activations, groups: Sequence[Hashable] | None) -> Int[Tensor, "example"]:
    """Returns the number of each example's group, from 0."""
    given = list(read.texts if groups is None else groups)
    if len(given) != len(read.texts):
        raise InvalidArgumentError(
            "groups are one for each row", expected=f"{len(read.texts)} groups", got=str(len(given))
        )
    numbers = {group: number for number, group in enumerate(dict.fromkeys(given))}
    return torch.tensor([numbers[given[row]] for row, _ in read.places])


def control_labels(
    read: Activations,
    targets: Int[Tensor, "example"],
    groups: Int[Tensor, "example"],
    control: ProbeControl,
    seed: int,
) -> Int[Tensor, "example"]:
    """Returns one draw of the control's labels; `control` says of which, as for `train_probe`."""
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
