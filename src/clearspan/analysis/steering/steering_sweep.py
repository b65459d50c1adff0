"""Steering at many strengths: what it does to a metric, what random directions do, and what it costs on other text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.activations import Positions, layers_of
from clearspan.analysis.metric import Metric, measured, next_token_loss
from clearspan.analysis.places import Input, encoded, padding_of
from clearspan.analysis.progress import Progress, silent
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError

from .steering_result import SteeringSweep
from .steering_vector import SteeringVector


@torch.no_grad()
def steering_sweep(
    bridge: TransformerBridge,
    vector: SteeringVector,
    input: Input,
    metric: Metric | None = None,
    *,
    strengths: Sequence[float] = (-2.0, -1.0, 0.0, 1.0, 2.0),
    positions: Positions = None,
    unrelated: Input | None = None,
    controls: int = 3,
    jointly: bool = False,
    seed: int = 0,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    unrelated_mask: Int[Tensor, "batch pos"] | None = None,
    progress: Progress = silent,
) -> SteeringSweep:
    """Returns a metric under steering at each strength, with that of random directions of the same norm, and the cost.

    The cost is the mean next-token loss on other text, steered at every position: it tells at which strength the model
    no longer predicts anything well. Each point is steered on its own, so that layers can be compared. A run starts at
    the layer that is steered, from the residual stream of the clean run.

    Runs: strengths x points x (1 + controls), and as many on the unrelated text.

    Args:
        bridge: The model.
        vector: With one point or several.
        input: Text, a list of texts, or token ids `[batch, pos]`. Not the texts that the vector was made of, which it
            fits better than others.
        metric: From logits `[batch, pos, d_vocab]` to `[batch]`, or to one number for the batch. By default each row's
            mean next-token loss in nats.
        strengths: Factors of the vector.
        positions: Where the input is steered, as in `SteeringVector.hooks`: in the sequence, padding included.
        unrelated: Text, or texts, on which the cost is measured; by default none.
        controls: Random directions of the same norm.
        jointly: Whether all points of the vector are steered at once.
        seed: Of the random directions, the first of as many.
        attention_mask: 1 for real tokens, where token ids have padding. Texts make their own.
        unrelated_mask: The same of the unrelated text.
        progress: Called after each direction.

    Returns:
        The metric `[row, point, strength]`, and with it that of the controls, and both costs.

    Raises:
        UnknownPointError, InvalidArgumentError: The vector does not fit the model; no strength; a negative number of
            controls; a position that the input does not have; a metric that is not a number for each row.
        NoTokenizerError: Text, and the bridge has no tokenizer.
        PointNotReachedError: Somebody else's hook is on a layer before the one steered.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> vector = SteeringVector({"blocks.2.hook_resid_post": torch.ones(256)})
        >>> found = steering_sweep(bridge, vector, ["import os", "x = 1"], strengths=[0, 4], unrelated="def f(self):")
        >>> found.per_row.shape, found.random_per_row.shape, found.cost.shape    # rows, points, strengths
        (torch.Size([2, 1, 2]), torch.Size([3, 2, 1, 2]), torch.Size([1, 2]))
    """
    vector.check_fits(bridge)
    if not len(strengths) or controls < 0:
        raise InvalidArgumentError(
            "nothing to sweep over",
            expected="one strength or more, and controls >= 0",
            got=f"{len(strengths)} strengths, controls={controls}",
        )
    units = [vector] if jointly else [vector.at(name) for name in vector.names]
    starts = [min(layers_of(unit.names), default=None) for unit in units]
    text = _text(bridge, input, attention_mask, metric, starts)
    other = None if unrelated is None else _text(bridge, unrelated, unrelated_mask, None, starts)
    found, costs = [], []
    for done, (unit, start) in enumerate(zip(units, starts, strict=True)):
        for number, direction in enumerate([unit, *(unit.random_like(seed + i) for i in range(controls))]):
            found.append(_by_strength(bridge, text, direction, strengths, positions, start))
            if other is not None:
                costs.append(_by_strength(bridge, other, direction, strengths, None, start).mean(-1))
            progress("steering", done * (1 + controls) + number + 1, len(units) * (1 + controls))
    # [point * direction, strength, row] to [direction, row, point, strength]
    values = torch.stack(found).unflatten(0, (len(units), -1)).permute(1, 3, 0, 2)
    cost = torch.stack(costs).unflatten(0, (len(units), -1)).transpose(0, 1) if costs else None
    return SteeringSweep(
        points=(f"all {len(vector.names)} points",) if jointly and len(vector.names) > 1 else vector.names,
        strengths=tuple(map(float, strengths)),
        per_row=values[0],
        random_per_row=values[1:],
        clean=text.clean,
        cost=None if cost is None else cost[0],
        random_cost=None if cost is None else cost[1:],
        clean_cost=None if other is None else other.clean.mean().item(),
        metric="next-token loss in nats" if metric is None else "the metric",
        vector=vector.title,
    )


@dataclass(frozen=True, eq=False)
class _Text:
    """A text that is run many times.

    Attributes:
        inputs: What a run that starts at a layer is given; under None, the tokens.
        padding: Their mask, where there is padding.
        metric: What is measured.
        clean: The metric of the clean run.
    """

    inputs: Mapping[int | None, Tensor]
    padding: Int[Tensor, "batch pos"] | None
    metric: Metric
    clean: Float[Tensor, "row"]


def _text(
    bridge: TransformerBridge,
    input: Input,
    mask: Int[Tensor, "batch pos"] | None,
    metric: Metric | None,
    starts: Sequence[int | None],
) -> _Text:
    tokens, mask = encoded(bridge, input, mask)
    padding = None if mask is None else padding_of(mask)
    metric = next_token_loss(tokens, mask) if metric is None else metric
    names = {start: f"blocks.{start}.hook_resid_pre" for start in starts if start is not None}
    kept = list(names.values()) or "hook_logits"  # a filter holds for one point at least
    logits, cache = bridge.run_with_cache(tokens, names_filter=kept, attention_mask=padding)
    inputs: dict[int | None, Tensor] = {None: tokens}
    return _Text(
        inputs | {start: cache[name] for start, name in names.items()}, padding, metric, measured(metric, logits)
    )


def _by_strength(
    bridge: TransformerBridge,
    text: _Text,
    vector: SteeringVector,
    strengths: Sequence[float],
    positions: Positions,
    start: int | None,
) -> Float[Tensor, "strength row"]:
    measured_at = []
    for strength in strengths:
        logits = bridge.run_with_hooks(
            text.inputs[start],
            fwd_hooks=vector.hooks(strength, positions),
            start_at_layer=start,
            attention_mask=text.padding,
        )
        measured_at.append(measured(text.metric, logits))
    return torch.stack(measured_at)
