"""Ablation: what a metric changes by when heads, layers or neurons are put out, one at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.analysis.activations import Layers, layers_of, points_of
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, whole_numbers
from clearspan.effects import Effects
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Input
from clearspan.interventions import Action, Intervention, Mean, Resample, Zero
from clearspan.model import check_bridge
from clearspan.progress import Progress
from clearspan.sweep import Grid, Metric, NextTokenLoss, Sweep, grid

AblationMethod = Literal["zero", "mean", "resample"]

_REFERENCE = "reference"
_MEANING: Mapping[AblationMethod, str] = {
    "zero": "set to zero",
    "mean": "replaced by its mean",
    "resample": "taken from another row",
}


def ablate_heads(
    bridge: TransformerBridge,
    input: Input,
    metric: Metric | Mapping[str, Metric] | None = None,
    *,
    layers: Layers = None,
    method: AblationMethod = "zero",
    reference: Input | None = None,
    seed: int = 0,
    attention_mask: Int[Tensor, "row pos"] | None = None,
    reference_mask: Int[Tensor, "row pos"] | None = None,
    progress: bool | Progress = True,
) -> Effects:
    """Returns a metric with the output of one head (`hook_z`) ablated at all positions, for each head.

    Each head is a cell of a sweep (`clearspan.sweep.Sweep`), which runs few batches, each from the layer it changes.

    - `"zero"`: the value becomes 0.
    - `"mean"`: it becomes its mean over all rows and real positions of the reference, the first position included; the
      same mean at every position.
    - `"resample"`: row `i` gets the value of row `p(i)` of the reference at the same position. `p` is a random order
      given by the seed in which no row keeps its place, the same for all heads.

    Args:
        bridge: The model, in evaluation mode, with no hooks on it.
        input: Any input.
        metric: What is measured, or several by name; see `clearspan.sweep.Sweep`. By default each row's mean next-token
            loss in nats, in which each real token but the last predicts the next real one.
        layers: One or several, negative from the end; by default all.
        method: What the value is replaced by.
        reference: Where `"mean"` and `"resample"` take values from: any input; by default the input itself.
        seed: Of `"resample"`.
        attention_mask: 1 for real tokens, where bare token ids have padding.
        reference_mask: The same of the reference.
        progress: Whether a bar is shown, or a function that is told how far it is.

    Returns:
        The metric by layer, head and row. `change()` is what it is more than in the run without ablation.

    Raises:
        InvalidArgumentError: An unknown method; hooks on the model, or training mode; a metric that is not a number for
            each row; for the default metric, a row of one token; for `"resample"`, fewer than two rows, rows of
            different lengths, or a reference of other lengths than the input.
        UnknownPointError: A layer that the model does not have.
        NoTokenizerError: Text, and the bridge has no tokenizer.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> found = ablate_heads(bridge, ["import os, sys", "def f(self, x):"], method="mean")
        >>> found.of().shape
        torch.Size([5, 8, 2])
        >>> found.title.split(";")[0]
        'next-token loss in nats with one head replaced by its mean'

    References:
        Wang et al. (2022), arXiv:2211.00593, section 2.1, for mean ablation. There the mean is by position over texts
        of one template; here it is over all positions, so that texts need not be aligned.
        Chan et al. (2022), "Causal Scrubbing", for resampling.
    """
    chosen = layers_of(points_of(bridge, "z", layers))
    cells = grid("z", _action(method, seed), layer=chosen, head=range(bridge.cfg.n_heads))
    return _ablated(bridge, input, metric, cells, method, reference, attention_mask, reference_mask, progress)


def ablate_layers(
    bridge: TransformerBridge,
    input: Input,
    metric: Metric | Mapping[str, Metric] | None = None,
    *,
    layers: Layers = None,
    method: AblationMethod = "zero",
    reference: Input | None = None,
    seed: int = 0,
    attention_mask: Int[Tensor, "row pos"] | None = None,
    reference_mask: Int[Tensor, "row pos"] | None = None,
    progress: bool | Progress = True,
) -> Effects:
    """Returns a metric with what one sublayer adds to the stream ablated: attention, MLP or mixer, for each of them.

    These are the values at `hook_attn_out`, `hook_mlp_out` and `hook_mixer_out`, after any norm and bias. Arguments,
    methods and errors are those of `ablate_heads`.

    Returns:
        The metric by layer, part (`attn`, `mlp`, `mixer`, ...) and row; NaN where a layer lacks the part.

    Example:
        >>> import clearspan
        >>> found = ablate_layers(clearspan.boot("tiny-bigcode"), "def f(self, x):")
        >>> bool(found.select(layer=0, part="mlp").change() > 0.5)
        True
    """
    chosen, action = layers_of(points_of(bridge, "resid_post", layers)), _action(method, seed)
    here = [(layer, sublayer) for layer in chosen for sublayer in bridge.blocks[layer].sublayers]
    parts = tuple(dict.fromkeys(sublayer.name for _, sublayer in here))
    cells = Grid(
        (("part", tuple((layer, sublayer.name) for layer, sublayer in here)),),
        tuple((Intervention(sublayer.hook_out, action),) for _, sublayer in here),
    )
    found = _ablated(bridge, input, metric, cells, method, reference, attention_mask, reference_mask, progress)
    at = [chosen.index(layer) * len(parts) + parts.index(sublayer.name) for layer, sublayer in here]
    values = {}
    for name, measured in found.values.items():
        every = measured.new_full((len(chosen) * len(parts), measured.shape[-1]), torch.nan)
        every[at] = measured
        values[name] = every.unflatten(0, (len(chosen), len(parts)))
    return replace(found, values=values, axes={"layer": tuple(chosen), "part": parts})


def ablate_neurons(
    bridge: TransformerBridge,
    input: Input,
    metric: Metric | Mapping[str, Metric] | None = None,
    *,
    layer: int,
    neurons: int | Sequence[int] | None = None,
    method: AblationMethod = "zero",
    reference: Input | None = None,
    seed: int = 0,
    attention_mask: Int[Tensor, "row pos"] | None = None,
    reference_mask: Int[Tensor, "row pos"] | None = None,
    progress: bool | Progress = True,
) -> Effects:
    """Returns a metric with one neuron of an MLP (`mlp.hook_post`) ablated at all positions, for each neuron.

    Other arguments, methods and errors are those of `ablate_heads`.

    Args:
        bridge: The model.
        input: Any input.
        metric: As for `ablate_heads`.
        layer: Whose MLP; negative from the end.
        neurons: One or several, negative from the end; by default all.
        method: As for `ablate_heads`.
        reference: As for `ablate_heads`.
        seed: As for `ablate_heads`.
        attention_mask: As for `ablate_heads`.
        reference_mask: As for `ablate_heads`.
        progress: As for `ablate_heads`.

    Returns:
        The metric by neuron and row.

    Raises:
        AbsentPointError: The layer has no neurons of its own, such as in a mixture of experts.
        InvalidArgumentError: A neuron that does not exist, or as for `ablate_heads`.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> ablate_neurons(bridge, "import os", layer=4, neurons=[3, 900]).mean().shape
        torch.Size([2])
    """
    check_bridge(bridge)
    unit = Intervention("post", _action(method, seed), layer=layer)
    size = bridge.index.find(unit.name(bridge.cfg.n_layers)).sizes["d_mlp"]
    chosen = range(size) if neurons is None else dict.fromkeys(whole_numbers("neurons", neurons))
    cells = grid(unit, neuron=chosen)
    return _ablated(bridge, input, metric, cells, method, reference, attention_mask, reference_mask, progress)


def _action(method: AblationMethod, seed: int) -> Action:
    if method not in get_args(AblationMethod):
        raise InvalidArgumentError(f"unknown method {method!r}", expected="'zero', 'mean' or 'resample'")
    check_counts(0, seed=seed)
    return {"zero": Zero(), "mean": Mean(_REFERENCE), "resample": Resample(_REFERENCE, seed)}[method]


def _ablated(
    bridge: TransformerBridge,
    input: Input,
    metric: Metric | Mapping[str, Metric] | None,
    cells: Grid,
    method: AblationMethod,
    reference: Input | None,
    attention_mask: Int[Tensor, "row pos"] | None,
    reference_mask: Int[Tensor, "row pos"] | None,
    progress: bool | Progress,
) -> Effects:
    """Returns the sweep's effects, with what was done in words."""
    if reference is None and reference_mask is not None:
        raise InvalidArgumentError("a reference_mask is given, and no reference", fix="attention_mask, for the input's")
    batch = bridge.to_batch(input, attention_mask)
    sources: dict[str, Input] = {}
    if method != "zero":
        # A reference without a mask goes to the sweep as it was given: bare ids may be padded as the input is.
        other = batch if reference is None else reference
        sources[_REFERENCE] = other if reference_mask is None else bridge.to_batch(other, reference_mask)
    measured = {"next-token loss": NextTokenLoss()} if metric is None else metric
    found = Sweep(bridge, batch, cells, measured, sources=sources).run(progress=progress)
    return replace(found, what=f"one {cells.axes[-1][0]} {_MEANING[method]}")
