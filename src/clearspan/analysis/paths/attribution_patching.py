"""Attribution patching: what patching each part of a model would change, by gradients and not by a run for each."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.metric import Metric
from clearspan.analysis.places import Input
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError

from .attribution_patching_result import AttributionPatching
from .grad_drop import dropped_gradients
from .patching_pair import PatchingDirection, PatchingPair, PatchingRun
from .patching_unit import Effects, PatchingUnit, first_order
from .query_key_fix import fixed


@torch.no_grad()
def attribution_patch(
    bridge: TransformerBridge,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    unit: str = "z",
    *,
    layers: Sequence[int] | None = None,
    by_position: bool = True,
    direction: PatchingDirection = "denoising",
    qk_fix: bool = False,
    grad_drop: bool = False,
    attention_mask: Int[Tensor, "row pos"] | None = None,
) -> AttributionPatching:
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
        clean: A text, texts, or token ids.
        corrupted: The other input, position on position with the clean one.
        metric: What is measured: a `LogitMetric` such as `LogitDifference`, or a differentiable function from logits
            `[row, pos, d_vocab]` to a number for each row, or one for all.
        unit: Short name of the hook points: `"resid_pre"`, `"attn_out"`, `"mlp_out"`, `"z"`, `"q"`, `"k"`, `"v"`,
            `"post"` (neurons), `"pattern"`, or any other point of a layer. A unit is one head, or one neuron, where the
            points have such an axis; keys and values have those of key/value heads.
        layers: Which; by default all that have the point.
        by_position: Whether each position is a unit of its own, or a unit is patched at all positions.
        direction: `"denoising"`: the corrupted run is the base, and gets clean values. `"noising"`: the reverse.
        qk_fix: Whether the pattern is computed; for queries and keys.
        grad_drop: Whether effects are the mean of sizes over dropped layers.
        attention_mask: 1 for real tokens, where token ids have padding.

    Returns:
        Effects by row, layer, and the unit's axes, on the CPU: positions and heads as in the hook point's axes.

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
        >>> list(found.axes), found.scores.shape
        (['layer', 'head'], torch.Size([5, 8]))
        >>> found.compared_with_exact(cells=None).agreement.pearson > 0.98
        True

    References:
        Nanda (2023), "Attribution Patching", neelnanda.io. Syed et al. (2023), arXiv:2310.10348. Kramár et al. (2024),
        "AtP*", arXiv:2403.00745: the QK fix and GradDrop (sections 3.1 and 3.2). There effects are means over inputs of
        sizes; here the mean over rows of a plain effect has its sign.
    """
    what = PatchingUnit.of(bridge, unit, layers, by_position)
    pair = PatchingPair.of(bridge, clean, corrupted, metric, direction, attention_mask)
    pair.check_slope()
    source = pair.source_run(what.points)
    if qk_fix:
        effects = fixed(pair, what, source.cache)
        graded = pair.graded_run(effects.points, source)
    else:
        graded = pair.graded_run(what.points, source)
        effects = first_order(what, graded.cache, source.cache)
    if grad_drop:
        per_row = _mean_size(pair, what, effects, source)
    else:
        per_row = effects({point: graded.cache[f"{point}_grad"] for point in effects.points})
    if len(graded.value) < len(per_row):  # the metric is one number for all rows
        per_row = per_row.sum(0, keepdim=True)
    return AttributionPatching(
        per_row, what.labels(pair.base.shape[1]), graded.value, source.value, pair, unit, qk_fix, grad_drop
    )


def _mean_size(
    pair: PatchingPair, unit: PatchingUnit, effects: Effects, source: PatchingRun
) -> Float[Tensor, "row layer *unit"]:
    """Returns the mean size of effects over dropped layers."""
    n_layers, is_stream = pair.bridge.cfg.n_layers, unit.name.startswith("resid_")
    if n_layers == 1 and not is_stream:
        raise InvalidArgumentError(
            "with one layer there is none to drop but the unit's own", fix="grad_drop=False, or unit='resid_pre'"
        )
    total: Tensor | float = 0.0
    for dropped, gradients in enumerate(dropped_gradients(pair, effects.points, source)):
        found = effects(gradients).abs()
        counts = torch.tensor([is_stream or layer != dropped for layer in unit.layers])
        total = total + found * counts.view(1, -1, *[1] * (found.ndim - 2))
    assert isinstance(total, Tensor), "a model has layers"
    return total / (n_layers if is_stream else n_layers - 1)
