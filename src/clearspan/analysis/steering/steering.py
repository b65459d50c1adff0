"""Making a steering vector of texts that have something and texts that do not."""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.activations import Activations, Layers, Positions, gathered, points_of
from clearspan.analysis.places import Input
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError

from .steering_vector import SteeringVector

SteeringMethod = Literal["mean_difference", "paired_pca"]


def fit_steering_vector(
    bridge: TransformerBridge,
    positive: Input,
    negative: Input,
    *,
    layers: Layers = None,
    name: str = "resid_post",
    positions: Positions = -1,
    method: SteeringMethod = "mean_difference",
    positive_mask: Int[Tensor, "batch pos"] | None = None,
    negative_mask: Int[Tensor, "batch pos"] | None = None,
    batch_size: int = 32,
) -> SteeringVector:
    """Returns a vector at each point that leads from what the model makes of `negative` to what it makes of `positive`.

    Each text is the mean of its values at `positions`, so that a long text counts no more than a short one.

    - `"mean_difference"`: the mean of the positive texts minus that of the negative ones.
    - `"paired_pca"`: text `i` of one side is paired with text `i` of the other. The direction is the first right
      singular vector `u` of the pairs' differences `D`, not centred, and the vector is `mean(D @ u) u`.

    Either way, a strength of 1 moves a value by the mean difference along the vector.

    Args:
        bridge: The model.
        positive: Text, a list of texts, or token ids `[batch, pos]`.
        negative: The others. The two sides should differ in nothing else than what is looked for.
        layers: One or several, negative from the end, each with its own vector; by default all. The hooks of a vector
            with several points add at all of them.
        name: Short name of a point in each layer (`"resid_post"`, `"attn_out"`, `"z"`), or the full name of one point.
        positions: Where to read: counted among each text's real tokens, negative from the end; None for all. The first
            position is very large in many models, and does not cancel where the sides differ in length: `slice(1,
            None)` leaves it out.
        method: How.
        positive_mask: 1 for real tokens, where token ids have padding. Texts make their own.
        negative_mask: The same of the other side.
        batch_size: Texts run at a time.

    Raises:
        UnknownPointError: There is no such point, or no such layer.
        InvalidArgumentError: A position that a text does not have, a point without positions, an unknown method; for
            `"paired_pca"`, sides of different sizes.
        NotFiniteError: A value is infinite or not a number.
        NoTokenizerError: Text, and the bridge has no tokenizer.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> vector = fit_steering_vector(bridge, ['f("a")', 'x = "b"'], ["f('a')", "x = 'b'"], layers=2, positions=None)
        >>> vector.names, vector.made_by
        (('blocks.2.hook_resid_post',), 'mean difference of 2 positive and 2 negative texts, at all positions')
        >>> double, single = bridge.to_single_token('"'), bridge.to_single_token("'")
        >>> def preference(logits):
        ...     return (logits[0, -1, double] - logits[0, -1, single]).item()
        >>> preference(bridge.run_with_hooks("print(", fwd_hooks=vector.hooks())) > preference(bridge("print(")) + 1
        True

    References:
        Marks and Tegmark (2023), arXiv:2310.06824, and Rimsky et al. (2023), arXiv:2312.06681, for the difference of
        means. Zou et al. (2023), arXiv:2310.01405, for the principal direction of paired differences; there differences
        are normalised, here they are not, and the length is that of the mean difference along it.
    """
    if method not in get_args(SteeringMethod):
        raise InvalidArgumentError(f"unknown method {method!r}", expected="'mean_difference' or 'paired_pca'")
    names = points_of(bridge, name, layers)
    more = gathered(bridge, positive, names, positions=positions, mask=positive_mask, batch_size=batch_size)
    less = gathered(bridge, negative, names, positions=positions, mask=negative_mask, batch_size=batch_size)
    counts = (len(more.texts), len(less.texts))
    if method == "paired_pca" and counts[0] != counts[1]:
        raise InvalidArgumentError(
            "method='paired_pca' takes pairs", expected="as many positive as negative texts", got=f"{counts}"
        )
    return SteeringVector(
        {each: _vector(more.means(each), less.means(each), method) for each in names},
        {each: _mean_norm(more, less, each) for each in names},
        bridge.cfg.model_name or bridge.cfg.architecture,
        f"{method.replace('_', ' ')} of {counts[0]} positive and {counts[1]} negative texts, at {_written(positions)}",
    )


def _vector(
    positive: Float[Tensor, "text *axes"], negative: Float[Tensor, "text *axes"], method: SteeringMethod
) -> Float[Tensor, "*axes"]:
    if method == "mean_difference":
        return positive.mean(0) - negative.mean(0)
    differences = (positive - negative).flatten(1)
    direction = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return ((differences @ direction).mean() * direction).view(positive.shape[1:])


def _mean_norm(more: Activations, less: Activations, name: str) -> float:
    return torch.cat([side.values[name].flatten(1).norm(dim=1) for side in (more, less)]).mean().item()


def _written(positions: Positions) -> str:
    match positions:
        case None:
            return "all positions"
        case int():
            return f"position {positions}"
        case slice():
            return f"positions {positions.start or 0} to {'the end' if positions.stop is None else positions.stop}"
        case _:
            return f"positions {', '.join(map(str, positions))}"
