"""Activation patching: sweeps over one kind of value, and the fifteen sweeps that TransformerLens users know by name.

Each `get_act_patch_...` takes the corrupted run's tokens and the clean run's cache, and returns the metric with one
value of the corrupted run replaced by the clean run's, by cell. They are planned (`clearspan.sweep`), and so give what
one forward for each cell gives, in a fraction of the time. Keys and values have as many heads as the model has. Layers
that lack what is patched, such as attention where a layer has a mixer in its place, are NaN.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.cache import ActivationCache
from clearspan.checks import whole_numbers
from clearspan.effects import Effects
from clearspan.errors import InvalidArgumentError, argument
from clearspan.inputs import Input
from clearspan.interventions import Intervention, Patch
from clearspan.model import check_bridge
from clearspan.points import get_act_name
from clearspan.progress import Progress
from clearspan.sweep import Direction, Grid, Metric, Pair, Sweep, grid

__all__ = [
    "Axis",
    "Patched",
    "activation_patching",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_pre",
    "patching_sweep",
]

Axis = Literal["layer", "position", "head", "neuron", "key_position"]
Patched = Float[Tensor, "*cell"]

_SIZE_OF: Mapping[str, tuple[str, ...]] = {"head": ("head", "kv_head"), "neuron": ("d_mlp", "d_model")}


def activation_patching(
    bridge: TransformerBridge,
    clean: Input,
    corrupted: Input,
    metric: Metric | Mapping[str, Metric],
    point: str | Sequence[str] = "resid_pre",
    by: Axis | Sequence[Axis] = ("layer", "position"),
    *,
    direction: Direction = "denoising",
    background: Sequence[Intervention] = (),
    attention_mask: Int[Tensor, "row pos"] | None = None,
    memory: int | None = None,
    progress: bool | Progress = True,
    **places: Sequence[int],
) -> Effects:
    r"""Returns the effect of each value of one run on another, on pairs of prompts.

    Denoising puts values of the clean run into the corrupted one: what restores the metric suffices for it. Noising
    puts the corrupted run's into the clean one: what breaks it is needed.

    Args:
        bridge: The model.
        clean: The prompts as they are, `[row, pos]`.
        corrupted: The other prompt of each pair, of the same length.
        metric: What is measured, or several by name; see `clearspan.sweep.Sweep`.
        point: A hook point's short name: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, `z`, `q`, `k`,
            `v`, `pattern`, `post`, `result`, ... Or several that have the same places: an axis, `point`, in front.
        by: What a cell is: one place on each of these axes (or this one), and all places of the others.
        direction: Which run's values go into which.
        background: Interventions that are made in every cell.
        attention_mask: 1 for real tokens, where an input is bare token ids with padding: of both.
        memory: Bytes that a batch may take.
        progress: As for `Sweep.run`.
        **places: The places on an axis, such as `layer=[3, 4]`; by default all. Layers without the point, such as
            those with a mixer in place of attention, are left out.

    Returns:
        Metrics by cell and row, with means, standard errors, bootstrap intervals, and `normalised()`: the share of the
        way from the run that is changed to the other.

    Raises:
        InvalidArgumentError: The runs differ in shape, or the point lacks an axis.

    Example:
        >>> import clearspan
        >>> from clearspan.sweep import LogitDifference
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> metric = LogitDifference.between(bridge, " os", " re")
        >>> clean, corrupted = "import os\nimport", "import re\nimport"
        >>> found = activation_patching(bridge, clean, corrupted, metric, "z", ("layer", "head"))
        >>> found.normalised().shape
        torch.Size([5, 8])

    References:
        Heimersheim and Nanda (2024), "How to use and interpret activation patching", arXiv:2404.15255.
    """
    sweep = patching_sweep(
        bridge,
        clean,
        corrupted,
        metric,
        point,
        by,
        direction=direction,
        background=background,
        attention_mask=attention_mask,
        **places,
    )
    return sweep.run(memory, progress=progress)


def patching_sweep(
    bridge: TransformerBridge,
    clean: Input,
    corrupted: Input,
    metric: Metric | Mapping[str, Metric],
    point: str | Sequence[str] = "resid_pre",
    by: Axis | Sequence[Axis] = ("layer", "position"),
    *,
    direction: Direction = "denoising",
    background: Sequence[Intervention] = (),
    attention_mask: Int[Tensor, "row pos"] | None = None,
    **places: Sequence[int],
) -> Sweep:
    r"""Returns the sweep that `activation_patching` runs: to plan, follow, interrupt, save or resume it.

    Args:
        bridge: As for `activation_patching`, like the others.
        clean: As there.
        corrupted: As there.
        metric: As there.
        point: As there.
        by: As there.
        direction: As there.
        background: As there.
        attention_mask: As there.
        **places: As there.

    Raises:
        InvalidArgumentError: The runs differ in shape, or the point lacks an axis.

    Example:
        >>> import clearspan
        >>> from clearspan.sweep import LogitDifference
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> metric = LogitDifference.between(bridge, " os", " re")
        >>> patching_sweep(bridge, "import os\nimport", "import re\nimport", metric).plan().cells
        25
    """
    pair = Pair.of(bridge, clean, corrupted, metric, direction, attention_mask)
    axes = [by] if isinstance(by, str) else by
    if not isinstance(axes, Sequence) or not all(isinstance(axis, str) for axis in axes):
        raise InvalidArgumentError(f"by={by!r}"[:80], expected="axes, such as ('layer', 'position')")
    names = [point] if isinstance(point, str) else _listed(point)
    grids = {name: _grid(bridge, name, axes, pair.source_name, pair.base.longest, places) for name in names}
    cells = grids[point] if isinstance(point, str) else Grid.stacked(grids)
    sources = {pair.source_name: pair.source}
    return Sweep(bridge, pair.base, cells, metric, sources=sources, background=background)


def _listed(points: object) -> Sequence[str]:
    """Returns the short names of several points."""
    if not isinstance(points, list | tuple) or not points or not all(isinstance(point, str) for point in points):
        raise InvalidArgumentError(f"point={points!r}"[:80], expected="a hook point's short name, or a list of several")
    return points


def _grid(
    bridge: TransformerBridge,
    point: str,
    by: Sequence[str],
    source: str,
    length: int,
    places: Mapping[str, Sequence[int]],
) -> Grid:
    """Returns the grid over all places, or those given, of some axes."""
    places = {axis: whole_numbers(axis, given) for axis, given in places.items()}
    layers = bridge.index.layers_with(get_act_name(point, 0)) or range(bridge.cfg.n_layers)
    n_layers = bridge.cfg.n_layers
    first = next(iter(places.get("layer", layers)), 0)
    known = bridge.index.find(get_act_name(point, first % n_layers if -n_layers <= first < 0 else first))
    axes = {}
    for axis in by:
        match axis:
            case "layer":
                every = layers
            case "position" | "key_position":
                every = range(length)
            case "head" | "neuron":
                sizes = [known.sizes[name] for name in _SIZE_OF[axis] if name in known.axes]
                every = range(sizes[0]) if sizes else ()
            case _:
                every = ()
        axes[axis] = tuple(places.get(axis, every))
        if not axes[axis]:
            raise InvalidArgumentError(
                f"{point!r} cannot be patched by {axis}", expected=f"axes of [{', '.join(known.axes)}]"
            )
    if not places.keys() <= set(by):
        raise InvalidArgumentError(
            f"places on axes that no cell has: {', '.join(sorted(places.keys() - set(by)))}", expected=", ".join(by)
        )
    return grid(point, Patch(source), **axes)


# --- under TransformerLens's names -----------------------------------------------------------------------------------


def get_act_patch_resid_pre(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "layer pos"]:
    """Returns the metric with the residual stream entering each layer patched, by position."""
    return _patched(model, corrupted_tokens, clean_cache, patching_metric, "resid_pre", "layer", "position")


def get_act_patch_resid_mid(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "layer pos"]:
    """Returns the metric with the residual stream between the sublayers patched, by layer and position."""
    return _patched(model, corrupted_tokens, clean_cache, patching_metric, "resid_mid", "layer", "position")


def get_act_patch_attn_out(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "layer pos"]:
    """Returns the metric with what attention adds patched, by layer and position."""
    return _patched(model, corrupted_tokens, clean_cache, patching_metric, "attn_out", "layer", "position")


def get_act_patch_mlp_out(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "layer pos"]:
    """Returns the metric with what the MLP adds patched, by layer and position."""
    return _patched(model, corrupted_tokens, clean_cache, patching_metric, "mlp_out", "layer", "position")


def get_act_patch_attn_head_out_by_pos(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "layer pos head"]:
    """Returns the metric with one head's output (`z`) patched at one position."""
    return _patched(model, corrupted_tokens, clean_cache, patching_metric, "z", "layer", "position", "head")


def get_act_patch_attn_head_q_by_pos(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "layer pos head"]:
    """Returns the metric with one head's query patched at one position."""
    return _patched(model, corrupted_tokens, clean_cache, patching_metric, "q", "layer", "position", "head")


def get_act_patch_attn_head_k_by_pos(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "layer pos kv_head"]:
    """Returns the metric with one head's key patched at one position."""
    return _patched(model, corrupted_tokens, clean_cache, patching_metric, "k", "layer", "position", "head")


def get_act_patch_attn_head_v_by_pos(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "layer pos kv_head"]:
    """Returns the metric with one head's value patched at one position."""
    return _patched(model, corrupted_tokens, clean_cache, patching_metric, "v", "layer", "position", "head")


def get_act_patch_attn_head_pattern_by_pos(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "layer head dest_pos"]:
    """Returns the metric with one head's attention patched at one query position."""
    return _patched(model, corrupted_tokens, clean_cache, patching_metric, "pattern", "layer", "head", "position")


def get_act_patch_attn_head_pattern_dest_src_pos(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "layer head dest_pos src_pos"]:
    """Returns the metric with one head's attention from one position to another patched."""
    axes = ("layer", "head", "position", "key_position")
    return _patched(model, corrupted_tokens, clean_cache, patching_metric, "pattern", *axes)


def get_act_patch_attn_head_out_all_pos(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "layer head"]:
    """Returns the metric with one head's output (`z`) patched at all positions."""
    return _patched(model, corrupted_tokens, clean_cache, patching_metric, "z", "layer", "head")


def get_act_patch_attn_head_q_all_pos(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "layer head"]:
    """Returns the metric with one head's queries patched at all positions."""
    return _patched(model, corrupted_tokens, clean_cache, patching_metric, "q", "layer", "head")


def get_act_patch_attn_head_k_all_pos(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "layer kv_head"]:
    """Returns the metric with one head's keys patched at all positions."""
    return _patched(model, corrupted_tokens, clean_cache, patching_metric, "k", "layer", "head")


def get_act_patch_attn_head_v_all_pos(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "layer kv_head"]:
    """Returns the metric with one head's values patched at all positions."""
    return _patched(model, corrupted_tokens, clean_cache, patching_metric, "v", "layer", "head")


def get_act_patch_attn_head_pattern_all_pos(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "layer head"]:
    """Returns the metric with one head's attention patched at all positions."""
    return _patched(model, corrupted_tokens, clean_cache, patching_metric, "pattern", "layer", "head")


def get_act_patch_attn_head_all_pos_every(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "kind=5 layer head"]:
    """Returns the sweeps over heads at all positions of output, query, key, value and pattern, in this order.

    Where there are fewer key/value heads than query heads, the places of those that do not exist are NaN.
    """
    return _every(
        model,
        [
            get_act_patch_attn_head_out_all_pos(model, corrupted_tokens, clean_cache, patching_metric),
            get_act_patch_attn_head_q_all_pos(model, corrupted_tokens, clean_cache, patching_metric),
            get_act_patch_attn_head_k_all_pos(model, corrupted_tokens, clean_cache, patching_metric),
            get_act_patch_attn_head_v_all_pos(model, corrupted_tokens, clean_cache, patching_metric),
            get_act_patch_attn_head_pattern_all_pos(model, corrupted_tokens, clean_cache, patching_metric),
        ],
    )


def get_act_patch_attn_head_by_pos_every(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "kind=5 layer pos head"]:
    """Returns the sweeps over heads by position of output, query, key, value and pattern, in this order.

    Where there are fewer key/value heads than query heads, the places of those that do not exist are NaN.
    """
    pattern = get_act_patch_attn_head_pattern_by_pos(model, corrupted_tokens, clean_cache, patching_metric)
    return _every(
        model,
        [
            get_act_patch_attn_head_out_by_pos(model, corrupted_tokens, clean_cache, patching_metric),
            get_act_patch_attn_head_q_by_pos(model, corrupted_tokens, clean_cache, patching_metric),
            get_act_patch_attn_head_k_by_pos(model, corrupted_tokens, clean_cache, patching_metric),
            get_act_patch_attn_head_v_by_pos(model, corrupted_tokens, clean_cache, patching_metric),
            pattern.transpose(1, 2),
        ],
    )


def get_act_patch_block_every(
    model: TransformerBridge, corrupted_tokens: Input, clean_cache: ActivationCache, patching_metric: Metric
) -> Float[Tensor, "kind=3 layer pos"]:
    """Returns the sweeps by layer and position of `resid_pre`, `attn_out` and `mlp_out`, in this order.

    Layers without attention, or without an MLP, are NaN there.
    """
    return torch.stack(
        [
            get_act_patch_resid_pre(model, corrupted_tokens, clean_cache, patching_metric),
            get_act_patch_attn_out(model, corrupted_tokens, clean_cache, patching_metric),
            get_act_patch_mlp_out(model, corrupted_tokens, clean_cache, patching_metric),
        ]
    )


def _patched(
    model: TransformerBridge,
    corrupted_tokens: Input,
    clean_cache: ActivationCache,
    metric: Metric,
    point: str,
    *by: str,
) -> Patched:
    check_bridge(model)
    with argument("corrupted_tokens"):
        batch = model.to_batch(corrupted_tokens)
    cells = _grid(model, point, by, "clean", batch.longest, {})
    sweep = Sweep(model, batch, cells, metric, sources={"clean": clean_cache})
    found = sweep.run(progress=False).mean()
    layers = model.index.layers_with(get_act_name(point, 0))
    if len(layers) == model.cfg.n_layers:
        return found
    every = found.new_full((model.cfg.n_layers, *found.shape[1:]), torch.nan)
    every[layers] = found
    return every


def _every(model: TransformerBridge, sweeps: Sequence[Patched]) -> Patched:
    """Returns sweeps of heads as one tensor, with NaN in the places of heads that do not exist."""
    n_heads = model.cfg.n_heads
    padded = [torch.nn.functional.pad(one, (0, n_heads - one.shape[-1]), value=torch.nan) for one in sweeps]
    return torch.stack(cast("list[Tensor]", padded))
