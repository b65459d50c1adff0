"""Runs with interventions: sites as hook functions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from clearspan.bridge.hooks import Hooks
from clearspan.bridge.inputs import ModelInput
from clearspan.bridge.sources import Source, Sources, gathered
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Intervention, Site, located
from clearspan.points import HookFunction

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge

Placed = tuple[Site, slice]
"""A site, and the rows of the batch in which it is written."""


def intervention_hooks(
    bridge: "TransformerBridge",
    given: ModelInput,
    interventions: Sequence[Intervention],
    sources: Mapping[str, Source],
) -> Hooks:
    """Returns interventions as forward hooks of one run.

    Args:
        bridge: The model.
        given: The run's input.
        interventions: What is done, in order where several are at one point.
        sources: Runs by name.
    """
    rows, length = given.size
    sites = sites_of(bridge, interventions, length)
    found = gathered(bridge, sites, sources, rows=rows, length=length)
    return hooks_of([(site, slice(None)) for site in sites], found)


def sites_of(bridge: "TransformerBridge", interventions: Iterable[Intervention], length: int) -> list[Site]:
    """Returns interventions laid on a model and the positions of a run."""
    found = []
    for intervention in interventions:
        if not isinstance(intervention, Intervention):
            raise InvalidArgumentError(
                "this is no intervention", expected="clearspan.Intervention(point, action, ...)", got=repr(intervention)
            )
        found.append(located(intervention, bridge.index.find, bridge.cfg.n_layers, length))
    return found


def hooks_of(placed: Iterable[Placed], sources: Sources) -> Hooks:
    """Returns one hook for each point at which something is written, sites in their order."""
    by_point: dict[str, list[Placed]] = {}
    for site, rows in placed:
        by_point.setdefault(site.name, []).append((site, rows))
    return [(name, _writer(there, sources)) for name, there in by_point.items()]


def _writer(placed: Sequence[Placed], sources: Sources) -> HookFunction:
    def write(value: Tensor, hook: object) -> None:  # noqa: ARG001
        for site, rows in placed:
            site.write(value, sources.of(site), rows)

    return write
