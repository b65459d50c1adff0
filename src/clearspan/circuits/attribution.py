"""Attribution patching: what patching each part of a model would change, by gradients and not by a run for each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clearspan._forward.readout import exact
from clearspan.bridge import TransformerBridge
from clearspan.cache import ActivationCache
from clearspan.checks import check_counts, check_flags, check_kind, is_whole
from clearspan.circuits.runs import PairRun, PairRuns, listed, shuffled, swept
from clearspan.components import NormalizationBridge
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Batch, Input
from clearspan.interventions import Patch
from clearspan.model import check_bridge
from clearspan.modes import no_grad
from clearspan.plots import LineChart
from clearspan.points import Address, HookFunction, HookPoint, get_act_name
from clearspan.progress import Progress, shown
from clearspan.results import Columns, Result, counted
from clearspan.shapes import Axes
from clearspan.sweep import Direction, Effects, Grid, Metric, grid
from clearspan.sweep.labels import position_texts

if TYPE_CHECKING:
    import plotly.graph_objects as go

_UNIT_AXES = {
    "pos": "position",
    "q_pos": "position",
    "k_pos": "key_position",
    "head": "head",
    "kv_head": "head",
    "d_mlp": "neuron",
    "expert": "neuron",
}
"""Axes of values whose places are units, with the name that grids of a sweep have for them."""
_POSITIONS = ("position", "key_position")
_QUERIES, _KEYS = ("q", "rot_q"), ("k", "rot_k")

Gradients = Mapping[str, Tensor]
"""Gradients of the metric by the hook point's name."""
UnitEffects = Mapping[str, Callable[[Tensor], Float[Tensor, "row *unit"]]]
"""For each layer, in order: the hook point whose gradient is needed, and the effects of its units given that."""


@no_grad
def attribution_patch(
    bridge: TransformerBridge,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    unit: str = "z",
    *,
    layers: int | Sequence[int] | None = None,
    by_position: bool = True,
    direction: Direction = "denoising",
    qk_fix: bool = False,
    grad_drop: bool = False,
    attention_mask: Int[Tensor, "row pos"] | None = None,
    progress: bool | Progress = True,
) -> "AttributionPatching":
    r"""Returns the approximate effect of patching each part of a model with its value in another run.

    To the first order, putting a value of the source run into the base run changes the metric by

    `(source - base) . d metric(base) / d value`

    which two forwards and one backward give for every part of a kind. Activation patching, which this approximates,
    takes a run for each part: `compared_with_exact` of the result runs it for some, and says how well the two agree.

    The approximation fails where the metric is far from linear in the value (AtP*, Kramár et al.):

    - `qk_fix`: where attention is saturated, a query or key has next to no gradient, although a changed one may change
      the pattern altogether. The changed pattern is then computed, by the model's own attention, and the effect is
      taken to the first order in the pattern: `(changed pattern - pattern) . d metric / d pattern`.
    - `grad_drop`: effects along several paths may cancel. Effects are taken once for each layer, with no gradient
      through what that layer's attention and MLP add, and the result is the mean of their sizes, which has no sign:
      over all layers but the unit's own, through which all of its effect may go (for points of the residual stream,
      over all layers).

    Args:
        bridge: The model, in evaluation mode.
        clean: Any input.
        corrupted: Another, with as many rows, and as many real tokens in each.
        metric: What is measured: a `LogitMetric` such as `LogitDifference`, or a differentiable function from logits
            `[row, pos, d_vocab]` to a number for each row, or one for all.
        unit: Short name of the hook points: `"resid_pre"`, `"attn_out"`, `"mlp_out"`, `"z"`, `"q"`, `"k"`, `"v"`,
            `"post"` (neurons), `"pattern"`, or any other point of a layer. A unit is one head, or one neuron, where the
            points have such an axis; keys and values have those of key/value heads.
        layers: Which, negative from the end; by default all that have the point.
        by_position: Whether each position is a unit of its own, or a unit is patched at all positions.
        direction: `"denoising"`: the corrupted run is the base, and gets clean values. `"noising"`: the reverse.
        qk_fix: Whether the pattern is computed; for queries and keys.
        grad_drop: Whether effects are the mean of sizes over dropped layers.
        attention_mask: 1 for real tokens, of an input that is bare token ids with padding.
        progress: Whether a bar is shown with `grad_drop`, which goes back once for each layer; or a function called as
            `progress(stage, done, total)`.

    Returns:
        Effects by layer, the unit's axes, and row, on the CPU. Positions count among a row's real tokens; a shorter row
        is NaN past its end.

    Raises:
        UnknownPointError, AbsentPointError: The model has no such points.
        InvalidArgumentError: Inputs that do not lie position on position; a metric without a gradient, or whose
            gradient at the base run is zero; `qk_fix` for other points than queries and keys; `grad_drop` with one
            layer; a model in training mode, or with hooks on it.

    Example:
        >>> import clearspan
        >>> from clearspan.sweep import LogitDifference
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> metric = LogitDifference.between(bridge, " os", " re")
        >>> found = attribution_patch(bridge, "import os\nimport", "import re\nimport", metric, by_position=False)
        >>> list(found.axes), found.mean().shape
        (['layer', 'head'], torch.Size([5, 8]))
        >>> found.compared_with_exact(cells=None).agreement.pearson > 0.98
        True

    References:
        Nanda (2023), "Attribution Patching", neelnanda.io. Syed et al. (2023), arXiv:2310.10348. Kramár et al. (2024),
        "AtP*", arXiv:2403.00745: the QK fix and GradDrop (sections 3.1 and 3.2). There effects are means over inputs of
        sizes; here the mean over rows of a plain effect has its sign.
    """
    check_bridge(bridge)
    check_flags(by_position=by_position, qk_fix=qk_fix, grad_drop=grad_drop)
    what = Unit.of(bridge, unit, layers, by_position)
    pair = PairRuns.of(bridge, clean, corrupted, metric, direction, attention_mask)
    pair.check_slope()
    points = what.points
    if qk_fix:
        source = pair.source_run(points)
        effects = _pattern_effects(pair, what, source.cache)
        graded = pair.graded_run(list(effects), source)
    else:
        source, graded = pair.runs(points, points, points)
        effects = _first_order(what, graded.cache, source.cache)
    if grad_drop:
        with shown(progress) as tell:
            by_column = _mean_size(pair, what, effects, source, tell)
    else:
        by_column = _stacked(effects, {point: graded.cache[f"{point}_grad"] for point in effects})
    per_row = _by_position(by_column, ["layer", *what.unit_axes], pair.base)
    if len(graded.value) < len(per_row):  # the metric is one number for all rows
        per_row = per_row.nansum(0, keepdim=True)
    axes = what.places(pair.base.longest)
    return AttributionPatching(
        values={"effect": per_row.movedim(0, -1)},
        axes=axes,
        texts=position_texts(bridge, pair.base, axes),
        units=pair.units,
        pair=pair.of_result(),
        unit=unit,
        units_of=axes,
        before=graded.value,
        after=source.value,
        qk_fix=qk_fix,
        grad_drop=grad_drop,
    )


def _stacked(effects: UnitEffects, gradients: Gradients) -> Float[Tensor, "row layer *unit"]:
    """Returns the effects of all units, on the CPU."""
    every = [effect(exact(gradients[point])) for point, effect in effects.items()]
    return torch.stack([one.to(every[0].device) for one in every], dim=1).cpu()  # which waits for the run, once


def _by_position(
    values: Float[Tensor, "row layer *unit"], axes: Sequence[str], batch: Batch
) -> Float[Tensor, "row layer *unit"]:
    """Returns values by column as values by position: those of a row's real tokens first, and NaN after them."""
    if batch.mask is None:
        return values
    columns = torch.zeros(batch.rows, batch.longest, dtype=torch.long)
    for row, real in enumerate(batch.real_columns):
        columns[row, : len(real)] = torch.tensor(real)
    lacking = torch.arange(batch.longest) >= batch.lengths[:, None]
    for dim, axis in enumerate(axes, start=1):
        if axis in _POSITIONS:
            shape = [1] * values.ndim
            shape[0], shape[dim] = lacking.shape
            sizes = (*values.shape[:dim], batch.longest, *values.shape[dim + 1 :])
            values = values.gather(dim, columns.view(shape).expand(sizes)).masked_fill(lacking.view(shape), torch.nan)
    return values


# --- units -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """What is patched: one place of the unit axes of the value at one hook point of a layer.

    Attributes:
        name: The hook point's short name.
        layers: In which layers.
        axes: The point's axes.
        sizes: Sizes of the axes that the model fixes.
        by_position: Whether each position is a unit, or all positions together.
    """

    name: str
    layers: tuple[int, ...]
    axes: Axes
    sizes: Mapping[str, int]
    by_position: bool

    @classmethod
    def of(cls, bridge: TransformerBridge, name: str, layers: int | Sequence[int] | None, by_position: bool) -> Self:
        """Returns the unit of a short name.

        Raises:
            UnknownPointError, AbsentPointError: The model has no such point.
            InvalidArgumentError: The point is in no layer, or a layer does not exist.
        """
        n_layers = len(bridge.blocks)
        if not isinstance(name, str):
            raise InvalidArgumentError(f"unit={name!r} is no hook point's name", expected="such as 'z'")
        if Address.parse(get_act_name(name, 0)).layer is None:
            raise InvalidArgumentError(f"the point {name!r} is in no layer", fix="unit='resid_pre' for what enters one")
        if layers is None:
            layers = [layer for layer in range(n_layers) if get_act_name(name, layer) in bridge.hook_dict] or [0]
        given = listed("layers", layers, int)
        if not all(is_whole(one) and -n_layers <= one < n_layers for one in given):
            raise InvalidArgumentError(f"layers={given}", expected=f"layers from {-n_layers} to {n_layers - 1}")
        chosen = tuple(dict.fromkeys(int(layer) % n_layers for layer in given))
        points = [bridge.hook_dict[get_act_name(name, layer)] for layer in chosen]
        return cls(name, chosen, points[0].axes, points[0].sizes, by_position)

    def point(self, layer: int) -> str:
        """Returns the hook point's full name in a layer."""
        return get_act_name(self.name, layer)

    @property
    def points(self) -> list[str]:
        """The hook points of all layers."""
        return [self.point(layer) for layer in self.layers]

    @property
    def unit_axes(self) -> list[str]:
        """The axes of units within a layer, in the order of the point's."""
        found = [_UNIT_AXES[axis] for axis in self.axes if axis in _UNIT_AXES]
        return [axis for axis in found if self.by_position or axis not in _POSITIONS]

    @property
    def summed(self) -> list[int]:
        """The point's axes within one unit, over which effects are added up."""
        kept = self.unit_axes
        return [place for place, axis in enumerate(self.axes) if place and _UNIT_AXES.get(axis) not in kept]

    def places(self, longest: int) -> dict[str, tuple[int, ...]]:
        """Returns the places on each axis of effects, for rows of at most so many positions."""
        sizes = dict.fromkeys(_POSITIONS, longest)
        sizes |= {_UNIT_AXES[axis]: size for axis, size in self.sizes.items() if axis in _UNIT_AXES}
        return {"layer": self.layers, **{axis: tuple(range(sizes[axis])) for axis in self.unit_axes}}


def _first_order(unit: Unit, base: ActivationCache, source: ActivationCache) -> UnitEffects:
    """Returns effects to the first order: `(source - base) . gradient` over what is within a unit."""

    def effect(point: str) -> Callable[[Tensor], Tensor]:
        ours, theirs = exact(base[point]), exact(source[point])
        change = theirs - ours
        if "k_pos" in unit.axes:  # masked scores are -inf in both
            change = change.masked_fill_(theirs == ours, 0)
        return lambda gradient: (change * gradient).sum(unit.summed) if unit.summed else change * gradient

    return {point: effect(point) for point in unit.points}


# --- GradDrop --------------------------------------------------------------------------------------------------------


def _mean_size(
    pair: PairRuns, unit: Unit, effects: UnitEffects, source: PairRun, tell: Progress
) -> Float[Tensor, "row layer *unit"]:
    """Returns the mean size of effects over dropped layers."""
    n_layers, is_stream = pair.bridge.cfg.n_layers, unit.name.startswith("resid_")
    if n_layers == 1 and not is_stream:
        raise InvalidArgumentError(
            "with one layer there is none to drop but the unit's own", fix="grad_drop=False, or unit='resid_pre'"
        )
    total: Tensor | float = 0.0
    for dropped, gradients in enumerate(dropped_gradients(pair, list(effects), source)):
        found = _stacked(effects, gradients).abs()
        counts = torch.tensor([is_stream or layer != dropped for layer in unit.layers])
        total = total + found * counts.view(1, -1, *[1] * (found.ndim - 2))
        tell("layers", dropped + 1, n_layers)
    assert isinstance(total, Tensor), "a model has layers"
    return total / (n_layers if is_stream else n_layers - 1)


def dropped_gradients(pair: PairRuns, names: Sequence[str], source: PairRun) -> Iterator[Gradients]:
    """Yields, for each layer, the metric's gradients at the base run when none flows through what that layer adds.

    The base is run once, and goes back once for each layer, with the gradients at the outputs of its sublayers set
    to zero. So effects that go through them, which may cancel others, are left out.

    Args:
        pair: The runs.
        names: Hook points whose gradients are wanted.
        source: The other run.
    """
    n_layers = pair.bridge.cfg.n_layers
    dropped: set[int] = set()
    found: dict[str, Tensor] = {}
    leaf = torch.zeros(pair.base.rows, pair.base.width, pair.bridge.cfg.d_model, requires_grad=True)

    def keep(gradient: Tensor, hook: HookPoint) -> None:
        found[hook.name] = gradient

    def drop(layer: int) -> HookFunction:
        return lambda gradient, hook: torch.zeros_like(gradient) if layer in dropped else None

    sublayers = [sublayer for block in pair.bridge.blocks for sublayer in block.sublayers]
    with torch.enable_grad():
        output = pair.bridge.run_with_hooks(
            pair.base,
            stop_at_layer=pair.stop,
            fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: value + leaf.to(value))],
            bwd_hooks=[
                *((name, keep) for name in names),
                *((sublayer.hook_out, drop(sublayer.layer)) for sublayer in sublayers),
            ],
        )
        total = pair.of_output(output, source).sum()
    for layer in range(n_layers):
        dropped.clear()
        dropped.add(layer)
        found.clear()
        torch.autograd.grad(total, leaf, retain_graph=True)
        yield dict(found)


# --- the QK fix ------------------------------------------------------------------------------------------------------

Pattern = Float[Tensor, "*variant row head q_pos k_pos"]
"""Patterns, their gradients, or scores."""
Which = Bool[Tensor, "variant pos head"]
"""The queries or keys that are changed, in each of several variants of a run."""


def _pattern_effects(pair: PairRuns, unit: Unit, source: ActivationCache) -> UnitEffects:
    """Returns the effects of queries or keys, through the pattern that the changed ones give, to the first order in it.

    Args:
        pair: The runs.
        unit: Queries or keys.
        source: The run that gives values, with the unit's points.
    """
    if unit.name not in (*_QUERIES, *_KEYS):
        raise InvalidArgumentError(
            f"the QK fix is about queries and keys, and not {unit.name!r}", expected=", ".join((*_QUERIES, *_KEYS))
        )
    names = [f"blocks.{layer}.hook_resid_pre" for layer in unit.layers]
    _, base = pair.bridge.run_with_cache(pair.base, names, stop_at_layer=max(unit.layers) + 1)
    layers = [
        _Layer(pair, unit, source[unit.point(layer)], base[name], layer)
        for layer, name in zip(unit.layers, names, strict=True)
    ]
    return {layer.point("pattern"): layer.effect() for layer in layers}


@dataclass(frozen=True)
class KeyChange:
    """What the change of one key at a time does to the pattern, in every row of it.

    When the probability of a key goes from `p` to `p'`, those of the others keep their proportions. So the effect is
    `(p' - p) * (gradient at the key - its mean over the others)`, summed over queries.

    Attributes:
        pattern: Of the base run.
        change: `p' - p` of each key, were it the only one changed.
        likeliest: The likeliest key of each query.
        others: The pattern with that key left out.
    """

    pattern: Pattern
    change: Pattern
    likeliest: Tensor
    others: Pattern

    @classmethod
    def of(cls, before: Pattern, after: Pattern) -> Self:
        """Returns what follows from the scores of the base run, and from those with all keys changed.

        The score of a query and a key depends on no other key.
        """
        pattern, likeliest = before.softmax(-1), before.argmax(-1, keepdim=True)
        rest = before.scatter(-1, likeliest, -torch.inf)
        # 1 - p loses its digits where p is near 1, which only the likeliest key's can be.
        of_others = before.logsumexp(-1, keepdim=True) + torch.log1p(-pattern)
        of_others = of_others.scatter(-1, likeliest, rest.logsumexp(-1, keepdim=True))
        return cls(pattern, (after - of_others).sigmoid() - pattern, likeliest, rest.softmax(-1).nan_to_num())

    def __call__(self, gradient: Pattern) -> Float[Tensor, "*variant row head pos"]:
        """Returns the effect by position of the key."""
        weighted = gradient * self.pattern
        mean = (weighted.sum(-1, keepdim=True) - weighted) / (1 - self.pattern)
        mean = mean.scatter(-1, self.likeliest, (self.others * gradient).sum(-1, keepdim=True))
        return (self.change * (gradient - mean)).sum(-2)


@dataclass(frozen=True)
class _Layer:
    """One layer, run alone on the base run's stream, with some of its queries or keys changed.

    Attributes:
        pair: The runs.
        unit: Queries or keys.
        source: Their values in the source run.
        stream: The residual stream that enters the layer in the base run.
        layer: Its number.
    """

    pair: PairRuns
    unit: Unit
    source: Float[Tensor, "row pos head d_head"]
    stream: Float[Tensor, "row pos d_model"]
    layer: int

    def point(self, name: str) -> str:
        return f"blocks.{self.layer}.attn.hook_{name}"

    def effect(self) -> Callable[[Tensor], Float[Tensor, "row *unit"]]:
        is_single_key = self.unit.name in _KEYS and self.unit.by_position
        if is_single_key and self.pair.bridge.blocks[self.layer].attn.has_sinks:
            # A sink takes a share of each query's attention, and its score is not among those of the keys.
            return self._by_single_keys
        which = self._heads_by_heads()
        before, after = self._inside("attn_scores" if is_single_key else "pattern", which)
        if is_single_key:
            change = KeyChange.of(before, after)
            return lambda gradient: self._by_unit(change(gradient))
        return lambda gradient: self._by_unit(((after - before) * gradient).sum(-1))

    def _heads_by_heads(self) -> Which:
        """Returns all heads' queries or keys, or each head's on its own where changing one changes the others."""
        positions, heads = self.source.shape[1:3]
        if not self._couples_heads:
            return torch.ones(1, positions, heads, dtype=torch.bool)
        return torch.eye(heads, dtype=torch.bool)[:, None].expand(-1, positions, -1)

    @property
    def _couples_heads(self) -> bool:
        """Whether a norm comes after the point that runs over all heads."""
        norm = self.pair.bridge.blocks[self.layer].attn.submodules.get(f"{self.unit.name}_norm")
        return isinstance(norm, NormalizationBridge) and "head" not in norm.input_axes.replace("kv_head", "head")

    @no_grad
    def _inside(self, name: str, which: Which) -> tuple[Pattern, Pattern]:
        """Returns scores or patterns of the base run `[row, ...]`, and with changes `[variant, row, ...]`."""
        rows, positions, heads = self.source.shape[:3]
        which = torch.cat([torch.zeros(1, positions, heads, dtype=torch.bool), which]).to(self.source.device)
        count = len(which)
        chosen = which.repeat_interleave(rows, 0)[..., None]
        values = self.source.repeat(count, 1, 1, 1)
        _, cache = self.pair.bridge.run_with_cache(
            self.pair.base.entering(self.stream.repeat(count, 1, 1)),
            self.point(name),
            start_at_layer=self.layer,
            stop_at_layer=self.layer + 1,
            fwd_hooks=[(self.unit.point(self.layer), lambda value, hook: torch.where(chosen, values, value))],
        )
        found = exact(cache[self.point(name)]).unflatten(0, (count, rows))
        return found[0], found[1:]

    def _by_unit(self, found: Float[Tensor, "variant row head pos"]) -> Float[Tensor, "row *unit"]:
        """Returns effects through the patterns of all heads as those of the unit's heads, by position or together."""
        if self._couples_heads:
            by_head = found.sum(2).transpose(0, 1)
        else:
            by_head = found[0].unflatten(1, (self.source.shape[2], -1)).sum(2)
        return by_head.transpose(1, 2) if self.unit.by_position else by_head.sum(-1)

    def _by_single_keys(self, gradient: Pattern) -> Float[Tensor, "row pos head"]:
        """Returns the effects of single keys, each changed in a run of its own."""
        assert not self._couples_heads, "no model has sinks and a norm over all heads' keys"
        positions, heads = self.source.shape[1:3]
        before, after = self._inside("pattern", torch.eye(positions, dtype=torch.bool)[..., None].expand(-1, -1, heads))
        return self._by_unit(((after - before) * gradient).sum((-2, -1)).movedim(0, -1)[None])


# --- agreement with exact patching -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Agreement(Result):
    """Approximate and exact effects of the same cells, means over rows, on the CPU.

    Attributes:
        approximate: The approximation.
        exact: What it approximates.
        labels: A name for each cell.
        total: How many cells there are; these are all of them, or a sample.

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

    def chart(self) -> LineChart:
        """Returns each cell as a point, its exact value across and the approximate one up."""
        exact, approximate = self.exact.tolist(), self.approximate.tolist()
        return LineChart({"cells": approximate}, exact, "exact", "approximate", self.title, is_joined=False)

    def plot(self) -> "go.Figure":
        """Returns a plotly figure of it, with a line where both are equal."""
        ends = [float(self.exact.min()), float(self.exact.max())]
        figure = super().plot()
        figure.update_traces(text=list(self.labels), hovertemplate="%{text}<br>%{x:.4g}, %{y:.4g}")
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
    if count is not None:
        check_counts(0, cells=count)
    if count is not None and count < 2:
        raise InvalidArgumentError("no correlation can be known", expected="two cells or more", got=str(count))
    return sorted(shuffled(total, seed)[:count])


def compared(agreement: Agreement | None) -> str:
    """Returns how an approximation agrees with exact patching, or that nobody has looked."""
    return "not compared with exact patching" if agreement is None else agreement.summary


# --- the result ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AttributionPatching(Effects):
    """Approximate changes of a metric when one part of a model is patched at a time.

    Attributes:
        pair: The runs.
        unit: Short name of what is patched.
        units_of: The axes of all units; `select` and `top` keep some of them.
        before: The metric of the run that is patched, for each row.
        after: The metric of the run that gives values.
        qk_fix: Whether changed patterns were computed.
        grad_drop: Whether effects are mean sizes over dropped layers, without sign.
        agreement: How some cells compare with exact patching, once `compared_with_exact` has run it.
    """

    pair: PairRuns
    unit: str
    units_of: Mapping[str, tuple[int, ...]]
    before: Float[Tensor, "row"]
    after: Float[Tensor, "row"]
    qk_fix: bool
    grad_drop: bool
    agreement: Agreement | None = None

    @property
    def grid(self) -> Grid:
        """The cells of exact patching that these effects approximate, on the same axes."""
        return grid(self.unit, Patch(self.pair.source_name), **self.units_of)

    def compared_with_exact(self, cells: int | None = 64, seed: int = 0) -> Self:
        """Returns the same result with its agreement with exact patching, which is run.

        Args:
            cells: How many cells are run, chosen at random; None for all.
            seed: Of the choice.
        """
        chosen = sampled(self.mean().numel(), cells, seed)
        patch, places = Patch(self.pair.source_name), [self._place(number) for number in chosen]
        units = {_label(at): grid(self.unit, patch, **{axis: [at[axis]] for axis in at}).cells[0] for at in places}
        return self._compared(swept(self.pair, Grid.of(units)), chosen)

    def compared_with(self, patched: Effects) -> Self:
        """Returns the same result with its agreement with a sweep over `grid`.

        Args:
            patched: What `Sweep(bridge, input, found.grid, metric, sources=...).run()` found.

        Raises:
            InvalidArgumentError: The sweep has other axes.
        """
        check_kind(Effects, patched=patched)
        if dict(patched.axes) != dict(self.units_of):
            raise InvalidArgumentError(
                "the sweep is of other cells",
                expected=_described(self.units_of),
                got=_described(patched.axes),
                fix="found.grid",
            )
        return self._compared(patched, list(range(self.mean().numel())))

    def _compared(self, patched: Effects, chosen: Sequence[int]) -> Self:
        if dict(self.axes) != dict(self.units_of):
            raise InvalidArgumentError("these are some of the effects", fix="compare before select or top")
        change = (patched.change().abs() if self.grad_drop else patched.change()).nanmean(-1).flatten()
        # Where the metric is one number for all rows, only units that all rows have were patched.
        is_known = change.isfinite()
        numbers = torch.tensor(chosen)[is_known].tolist()
        labels = [_label(self._place(number)) for number in numbers]
        effects = self.mean().flatten()
        return replace(self, agreement=Agreement(effects[numbers], change[is_known], labels, len(effects)))

    def _place(self, number: int) -> dict[str, int]:
        """Returns where the unit of a number is on each axis, the last axis running fastest."""
        index = np.unravel_index(number, [len(places) for places in self.units_of.values()])
        return {axis: places[int(at)] for (axis, places), at in zip(self.units_of.items(), index, strict=True)}

    @property
    def _what(self) -> str:
        return self.what or f"one {', '.join(self.units_of)}"

    @property
    def method(self) -> str:
        """What was computed, in words."""
        extras = ["QK fix"] * self.qk_fix + ["GradDrop"] * self.grad_drop
        return "attribution patching" + (f" with {' and '.join(extras)}" if extras else "")

    @property
    def title(self) -> str:
        """What was approximated, and how it agrees with what it approximates."""
        what, pair = "size of the change" if self.grad_drop else "change", self.pair
        return (
            f"{self.method}: approximate {what} of {pair.metric_name} with {self._what} of {self.unit} "
            f"taken from the {pair.source_name} run; {pair.described(self.before, self.after)}; "
            f"mean over {counted(self.of().shape[-1], 'row')}; {compared(self.agreement)}"
        )


def _label(places: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {at}" for axis, at in places.items())


def _described(axes: Mapping[str, tuple[Any, ...]]) -> str:
    return ", ".join(
        f"{axis}={list(places)}" if len(places) < 8 else f"{axis}: {len(places)}" for axis, places in axes.items()
    )
