"""Interchange interventions: does the model answer as if a variable had the value that it has in another run?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.activations import Layers, layers_of
from clearspan.analysis.corpus import check_positive
from clearspan.analysis.progress import Progress, silent
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Intervention, Patch
from clearspan.points import Address
from clearspan.sweep import LogitMetric, Sweep, SweepResult
from clearspan.sweep.metrics import Context

from .interchange_examples import InterchangeExamples
from .interchange_result import InterchangeAccuracy
from .interchange_runs import check_runnable, runs_of
from .interchange_site import InterchangeSite, Places, checked_basis, whole, within


def interchange_accuracy(
    bridge: TransformerBridge,
    examples: InterchangeExamples,
    *,
    name: str = "resid_post",
    layers: Layers = None,
    heads: Places = None,
    neurons: Places = None,
    subspace: Float[Tensor, "d k"] | None = None,
    batch_size: int = 64,
    progress: Progress = silent,
) -> InterchangeAccuracy:
    """Returns how often the answer is the expected one when values at the examples' positions are exchanged, by layer.

    The value at a base's position becomes that of its source: whole, in some heads or neurons, or in a subspace,
    `base + (source - base) @ subspace @ subspace.T`. Bases and sources are run once, and what is changed is run from
    its own layer.

    Args:
        bridge: The model, in evaluation mode.
        examples: Pairs, positions, and the answers that are expected.
        name: Short name of a point in each layer, or the full name of one point: a value at each position.
        layers: One or several, negative from the end; by default all.
        heads: Which heads are exchanged, together; by default all.
        neurons: Which neurons, or coordinates of the residual stream, are exchanged, together; by default all.
        subspace: Orthonormal columns, in the space of what is chosen of the value, flattened; by default all of it.
        batch_size: Pairs run at a time.
        progress: Called after each batch.

    Returns:
        Hits `[layer, example]`, with the accuracy that there is without an interchange.

    Raises:
        UnknownPointError: There is no such point, or no such layer.
        InvalidArgumentError: Heads or neurons that the point does not have, a subspace of another space or without an
            orthonormal basis, a token outside the vocabulary, or a model in training mode.
        NotFiniteError: Logits are infinite or not numbers.
        PointNotReachedError: The point is after the last block, or somebody else's hook is on a layer that is not run.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> table = " file name list size"
        >>> pairs = InterchangeExamples.of(bridge, [table + " file"], [table + " list"], [" size"])
        >>> found = interchange_accuracy(bridge, pairs, name="resid_pre", layers=[0, -1])
        >>> found.accuracy, found.unchanged
        (tensor([1., 1.]), tensor([0.]))

    References:
        Geiger, Lu, Icard and Potts (2021), "Causal Abstractions of Neural Networks", arXiv:2106.02997, for
        interchange interventions and their accuracy.
    """
    check_positive(batch_size=batch_size)
    sites = InterchangeSite.all_of(bridge, name, layers, heads, neurons)
    exchange = whole
    if subspace is not None:
        for site in sites:
            checked_basis(subspace, site)
        exchange = within(subspace)
    hits, unchanged = [], []
    for batch in examples.split(batch_size):
        runs = runs_of(bridge, batch, sites)
        hits.append(torch.stack([run.hits(exchange, batch_size) for run in runs]))
        unchanged.append(runs[0].unchanged)
        progress("interchanges", sum(map(len, unchanged)), len(examples))
    what = "whole vectors" if subspace is None else f"a subspace of {subspace.shape[1]} dimensions"
    return InterchangeAccuracy(torch.cat(hits, dim=1), torch.cat(unchanged), _axes(sites), f"{what} of {_said(sites)}")


@torch.no_grad()
def interchange_sweep(
    bridge: TransformerBridge,
    examples: InterchangeExamples,
    *,
    name: str = "resid_pre",
    layers: Layers = None,
    positions: Sequence[int] | None = None,
    heads: Places = None,
    neurons: Places = None,
    batch_size: int = 64,
    progress: Progress = silent,
) -> InterchangeAccuracy:
    """Returns how often the answer is the expected one, by layer and position, when values are exchanged there alone.

    Each cell writes at one position and reads at the same position of the source; the examples' own positions do not
    count. Cells run together, from the first layer and position that they change: see `clearspan.sweep.Sweep`.

    Args:
        bridge: The model, in evaluation mode, with no hooks on it.
        examples: Pairs without padding, bases and sources of one length.
        name: Short name of a point in each layer, or the full name of one point: a value at each position.
        layers: One or several, negative from the end; by default all.
        positions: Which, negative from the end; by default all.
        heads: Which heads are exchanged, together; by default all.
        neurons: Which neurons, or coordinates of the residual stream, are exchanged, together; by default all.
        batch_size: Pairs in one sweep.
        progress: Called after each sweep.

    Returns:
        Hits `[layer, position, example]`, with the accuracy that there is without an interchange.

    Raises:
        UnknownPointError: There is no such point, or no such layer.
        InvalidArgumentError: Examples that differ in length, a position that they do not have, hooks on the model, or
            as for `interchange_accuracy`.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> table = " file name list size"
        >>> pairs = InterchangeExamples.of(bridge, [table + " file"], [table + " list"], [" size"])
        >>> interchange_sweep(bridge, pairs, layers=[0, 4], positions=[-2, -1]).accuracy
        tensor([[0., 1.],
                [0., 1.]])
    """
    check_positive(batch_size=batch_size)
    _check_aligned(examples)
    sites = InterchangeSite.all_of(bridge, name, layers, heads, neurons)
    at = tuple(range(examples.base.shape[1]) if positions is None else positions)
    hits, unchanged = [], []
    for batch in examples.split(batch_size):
        check_runnable(bridge, batch)
        found = _swept(bridge, batch, sites, at)
        hits.append(found.of())
        unchanged.append(found.base[Answered.kind])
        progress("interchanges", sum(map(len, unchanged)), len(examples))
    every = torch.cat(hits, dim=1).unflatten(0, (len(sites), len(at)))
    axes = {**_axes(sites), "position": at}
    return InterchangeAccuracy(every, torch.cat(unchanged), axes, f"whole vectors of {_said(sites)}")


def _swept(
    bridge: TransformerBridge, examples: InterchangeExamples, sites: Sequence[InterchangeSite], positions: Sequence[int]
) -> SweepResult:
    """Returns the answers by cell, sites by positions, and example."""
    names = [site.name for site in sites]
    # Given as values, and not as tokens, so that the source's logits are not computed.
    _, read = bridge.run_with_cache(
        examples.source, names_filter=names, stop_at_layer=max(layers_of(names), default=-1) + 1, return_type=None
    )
    cells = {
        f"{site.name} {position}": Intervention(
            site.name, Patch("source"), positions=position, heads=site.heads, neurons=site.neurons
        )
        for site in sites
        for position in positions
    }
    metric = Answered(tuple(examples.labels.tolist()), examples.answers)
    sources = {"source": {name: read[name] for name in names}}
    return Sweep(bridge, examples.base, cells, metric, sources=sources).run(progress=False)


@dataclass(frozen=True)
class Answered(LogitMetric):
    """1 where the likeliest token after a row's last one is the label, otherwise 0.

    Attributes:
        labels: One for each row.
        answers: The tokens among which the likeliest counts, in order; None for the whole vocabulary.
    """

    labels: tuple[int, ...]
    answers: tuple[int, ...] | None = None

    kind: ClassVar[str] = "answered"

    @property
    def tokens(self) -> tuple[int, ...] | None:
        """The answers."""
        return self.answers

    def places(self, rows: int, length: int) -> Int[Tensor, "row 1"]:
        """Returns the last position of each row."""
        return torch.full((rows, 1), length - 1)

    def of(self, logits: Float[Tensor, "*cell row 1 token"], context: Context) -> Float[Tensor, "*cell row"]:
        """Returns whether it is."""
        likeliest = logits[..., 0, :].argmax(-1)
        if self.tokens is not None:
            likeliest = torch.tensor(self.tokens, device=likeliest.device)[likeliest]
        return (likeliest == torch.tensor(self.labels, device=likeliest.device)).float()


def _axes(sites: Sequence[InterchangeSite]) -> Mapping[str, tuple[int | str, ...]]:
    numbers = layers_of([site.name for site in sites])
    return {"layer": tuple(numbers)} if numbers else {"point": (sites[0].name,)}


def _said(sites: Sequence[InterchangeSite]) -> str:
    """Returns the sites in words, without the layer where there are several."""
    return str(sites[0]) if len(sites) == 1 else str(replace(sites[0], name=Address.parse(sites[0].name).within))


def _check_aligned(examples: InterchangeExamples) -> None:
    masks = [mask for mask in (examples.base_mask, examples.source_mask) if mask is not None]
    is_padded = not all(bool(mask.all()) for mask in masks)
    if is_padded or examples.base.shape != examples.source.shape:
        raise InvalidArgumentError(
            "a sweep over positions exchanges values at the same position",
            expected="bases and sources of one length, without padding",
            got="padding" if is_padded else f"{examples.base.shape[1]} and {examples.source.shape[1]} tokens",
            fix="interchange_accuracy, for positions that differ by pair",
        )
