"""Ablation as a sweep: each unit is a cell."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from clearspan._run.sources import MaskedInput
from clearspan.analysis.corpus import Batch
from clearspan.analysis.metric import check_predicted
from clearspan.analysis.places import Input, encoded, padding_of
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Action, Intervention
from clearspan.sweep import Grid, Metric, NextTokenLoss, Sweep

from .replacements import REFERENCE, AblationMethod, action_of


@dataclass(frozen=True)
class Unit:
    """What is ablated: the value at a hook point, or one index of its third axis.

    Attributes:
        name: The hook point, of axes `[batch, pos, ...]`.
        head: Which head; None for all.
        neuron: Which neuron; None for all.
    """

    name: str
    head: int | None = None
    neuron: int | None = None

    def intervention(self, action: Action) -> Intervention:
        """Returns what is done to it."""
        return Intervention(self.name, action, heads=self.head, neurons=self.neuron)


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
    if metric is None:
        check_predicted(*given)
    action = action_of(method, given=given, reference=other, seed=seed)
    found = Sweep(
        bridge,
        given[0],
        Grid.of({str(number): unit.intervention(action) for number, unit in enumerate(units)}),
        {"metric": NextTokenLoss() if metric is None else metric},
        sources={REFERENCE: MaskedInput(other[0], padding_of(other[1]))} if action.run else {},
        attention_mask=padding_of(given[1]),
    ).run(progress=False)
    return found.change().T, found.base["metric"]


def _batch(bridge: TransformerBridge, input: Input, mask: Int[Tensor, "batch pos"] | None) -> Batch:
    """Returns token ids and their mask, which is 1 throughout where nothing is padded."""
    tokens, found = encoded(bridge, input, mask)
    return tokens, tokens.new_ones(tokens.shape) if found is None else found
