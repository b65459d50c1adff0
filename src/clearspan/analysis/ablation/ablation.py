"""Ablation: what a metric changes by when heads, layers or neurons are put out, one at a time."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.metric import Metric
from clearspan.analysis.places import Input
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError

from .ablation_result import Ablation
from .ablation_sweep import Unit, ablated
from .replacements import AblationMethod


def ablate_heads(
    bridge: TransformerBridge,
    input: Input,
    metric: Metric | None = None,
    *,
    layers: Sequence[int] | None = None,
    method: AblationMethod = "zero",
    reference: Input | None = None,
    seed: int = 0,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    reference_mask: Int[Tensor, "batch pos"] | None = None,
) -> Ablation:
    """Returns what a metric changes by when the output of one head (`hook_z`) is ablated at all positions.

    Heads run as rows of few batches (`clearspan.sweep`), each from its own layer on, on the clean run's residual
    stream: what comes before does not change.

    - `"zero"`: the value becomes 0.
    - `"mean"`: it becomes its mean over all rows and real positions of the reference, the first position included; the
      same mean at every position.
    - `"resample"`: row `i` gets the value of row `p(i)` of the reference at the same position. `p` is a random order
      given by the seed in which no row keeps its place, the same for all units.

    Args:
        bridge: The model.
        input: Text, a list of texts, or token ids `[batch, pos]`.
        metric: From logits `[batch, pos, d_vocab]` to `[batch]`, or to one number for the batch. By default each row's
            mean next-token loss in nats, over predictions whose position and next token are both real.
        layers: Which; by default all.
        method: What the value is replaced by.
        reference: Where `"mean"` and `"resample"` take values from; by default the input.
        seed: Of `"resample"`.
        attention_mask: Where a token tensor is padded: 1 for real tokens. Texts make their own.
        reference_mask: The same of the reference.

    Returns:
        Changes `[row, layer, head]`, and their mean over rows.

    Raises:
        InvalidArgumentError: An unknown method or layer; other hooks on the model; a metric that is not a number for
            each row; a row without a next token, for the default metric; for `"resample"`, fewer than two rows,
            padding, or a reference of another shape than the input.
        NoTokenizerError: Text, and the bridge has no tokenizer.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> found = ablate_heads(bridge, ["import os, sys", "def f(self, x):"], method="mean")
        >>> found.change.shape, found.per_row.shape
        (torch.Size([5, 8]), torch.Size([2, 5, 8]))

    References:
        Wang et al. (2022), arXiv:2211.00593, section 2.1, for mean ablation. There the mean is by position over texts
        of one template; here it is over all positions, so that texts need not be aligned.
        Chan et al. (2022), "Causal Scrubbing", for resampling.
    """
    layers = _layers(bridge, layers)
    heads = range(bridge.cfg.n_heads)
    units = [Unit(f"blocks.{layer}.attn.hook_z", head=head) for layer in layers for head in heads]
    found = ablated(bridge, input, metric, units, method, reference, seed, attention_mask, reference_mask)
    axes = {"layer": tuple(layers), "head": tuple(heads)}
    return _result(found, axes, method, metric)


def ablate_layers(
    bridge: TransformerBridge,
    input: Input,
    metric: Metric | None = None,
    *,
    layers: Sequence[int] | None = None,
    method: AblationMethod = "zero",
    reference: Input | None = None,
    seed: int = 0,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    reference_mask: Int[Tensor, "batch pos"] | None = None,
) -> Ablation:
    """Returns what a metric changes by when what attention or the MLP of one layer adds to the stream is ablated.

    These are the values at `hook_attn_out` and `hook_mlp_out`, after any norm and bias. Arguments, methods and errors
    are those of `ablate_heads`.

    Returns:
        Changes `[row, layer, part]`, part being `attn` or `mlp`, and their mean over rows.

    Example:
        >>> import clearspan
        >>> found = ablate_layers(clearspan.boot("tiny-bigcode"), "def f(self, x):")
        >>> bool(found.change[0, 1] > 0.5)
        True
    """
    layers, parts = _layers(bridge, layers), ("attn", "mlp")
    units = [Unit(f"blocks.{layer}.hook_{part}_out") for layer in layers for part in parts]
    found = ablated(bridge, input, metric, units, method, reference, seed, attention_mask, reference_mask)
    return _result(found, {"layer": tuple(layers), "part": parts}, method, metric)


def ablate_neurons(
    bridge: TransformerBridge,
    input: Input,
    metric: Metric | None = None,
    *,
    layer: int,
    neurons: Sequence[int] | None = None,
    method: AblationMethod = "zero",
    reference: Input | None = None,
    seed: int = 0,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    reference_mask: Int[Tensor, "batch pos"] | None = None,
) -> Ablation:
    """Returns what a metric changes by when one neuron of an MLP (`mlp.hook_post`) is ablated at all positions.

    Other arguments, methods and errors are those of `ablate_heads`.

    Args:
        bridge: The model.
        input: Text, a list of texts, or token ids `[batch, pos]`.
        metric: As for `ablate_heads`.
        layer: Whose MLP.
        neurons: Which; by default all.
        method: As for `ablate_heads`.
        reference: As for `ablate_heads`.
        seed: As for `ablate_heads`.
        attention_mask: As for `ablate_heads`.
        reference_mask: As for `ablate_heads`.

    Returns:
        Changes `[row, neuron]`, and their mean over rows.

    Raises:
        AbsentPointError: The layer has no neurons of its own, such as in a mixture of experts.
        InvalidArgumentError: A neuron that does not exist, or as for `ablate_heads`.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> ablate_neurons(bridge, "import os", layer=4, neurons=[3, 900]).change.shape
        torch.Size([2])
    """
    (layer,) = _layers(bridge, [layer])
    name = f"blocks.{layer}.mlp.hook_post"
    chosen = _chosen("neuron", neurons, bridge.hook_dict[name].sizes["d_mlp"])
    units = [Unit(name, neuron=neuron) for neuron in chosen]
    found = ablated(bridge, input, metric, units, method, reference, seed, attention_mask, reference_mask)
    return _result(found, {"neuron": tuple(chosen)}, method, metric)


def _result(
    found: tuple[Float[Tensor, "row unit"], Float[Tensor, "row"]],
    axes: Mapping[str, tuple[int | str, ...]],
    method: AblationMethod,
    metric: Metric | None,
) -> Ablation:
    changes, clean = found
    sizes = [len(places) for places in axes.values()]
    name = "next-token loss in nats" if metric is None else "the metric"
    return Ablation(changes.unflatten(1, sizes), clean, axes, method, name)


def _layers(bridge: TransformerBridge, layers: Sequence[int] | None) -> list[int]:
    return _chosen("layer", layers, bridge.cfg.n_layers)


def _chosen(what: str, wanted: Sequence[int] | None, size: int) -> list[int]:
    """Returns the places asked for, each from 0 and once."""
    chosen = list(range(size) if wanted is None else dict.fromkeys(wanted))
    if not chosen:
        raise InvalidArgumentError(f"there is no {what} to ablate", expected=f"{what}s=None for all", got="none")
    for place in chosen:
        if not 0 <= place < size:
            raise InvalidArgumentError(f"there is no {what} {place}", expected=f"0 to {size - 1}", got=str(place))
    return chosen
