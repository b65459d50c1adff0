"""One run for each ablated unit, from the layer in which it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.points import HookFunction

from .corpus import Batch
from .metric import Metric, measured, next_token_loss
from .places import Input, encoded
from .replacements import AblationMethod, Replacement, padding_of, replacements


@dataclass(frozen=True)
class Unit:
    """What is ablated: the value at a hook point, or one index of its third axis.

    Attributes:
        layer: The layer in which it is.
        name: The hook point, of axes `[batch, pos, ...]`.
        index: Head or neuron; None for the whole value.
    """

    layer: int
    name: str
    index: int | None = None


@torch.no_grad()
def ablated(
    bridge: TransformerBridge,
    input: Input,
    metric: Metric | None,
    units: Sequence[Unit],
    method: AblationMethod,
    reference: Input | None,
    seed: int,
    attention_mask: Int[Tensor, "batch pos"] | None,
    reference_mask: Int[Tensor, "batch pos"] | None,
) -> tuple[Float[Tensor, "row unit"], Float[Tensor, "row"]]:
    """Returns what the metric changes by without each unit, and the metric of the clean run, by row.

    Arguments are those of `ablate_heads`.
    """
    if reference is None and reference_mask is not None:
        raise InvalidArgumentError("a reference_mask is given, and no reference", fix="attention_mask, for the input's")
    given = _batch(bridge, input, attention_mask)
    other = given if reference is None else _batch(bridge, reference, reference_mask)
    tokens, mask = given
    metric = next_token_loss(tokens, mask) if metric is None else metric
    names = list(dict.fromkeys(unit.name for unit in units))
    instead = replacements(bridge, names, method, given=given, reference=other, seed=seed)
    residuals = [f"blocks.{layer}.hook_resid_pre" for layer in dict.fromkeys(unit.layer for unit in units)]
    padding = padding_of(mask)
    logits, cache = bridge.run_with_cache(tokens, names_filter=residuals, attention_mask=padding)
    clean = measured(metric, logits)
    found = []
    for unit in units:
        residual = cache[f"blocks.{unit.layer}.hook_resid_pre"]
        logits = bridge.run_with_hooks(
            residual, fwd_hooks=[_hook(unit, instead)], start_at_layer=unit.layer, attention_mask=padding
        )
        found.append(measured(metric, logits) - clean)
    return torch.stack(found, dim=1), clean


def _hook(unit: Unit, instead: Mapping[str, Replacement]) -> tuple[str, HookFunction]:
    replacement, at = instead[unit.name], slice(None) if unit.index is None else unit.index

    def write(value: Tensor, hook: object) -> None:  # noqa: ARG001
        value[:, :, at] = 0 if replacement is None else replacement[:, :, at].to(value.device)

    return unit.name, write


def _batch(bridge: TransformerBridge, input: Input, mask: Int[Tensor, "batch pos"] | None) -> Batch:
    """Returns token ids and their mask, which is 1 throughout where nothing is padded."""
    tokens, found = encoded(bridge, input, mask)
    return tokens, torch.ones_like(tokens) if found is None else found
