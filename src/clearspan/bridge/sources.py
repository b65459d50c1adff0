"""Source runs: where interventions take values from. Each is a cache, tensors by name, or an input that is run once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.bridge.cache import ActivationCache
from clearspan.bridge.inputs import Input, as_tensor
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Action, Site

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge


@dataclass(frozen=True, eq=False)
class MaskedInput:
    """Token ids of which some are padding.

    Attributes:
        tokens: The ids.
        attention_mask: 1 for real tokens.
    """

    tokens: Int[Tensor, "row pos"]
    attention_mask: Int[Tensor, "row pos"] | None


Source = ActivationCache | Mapping[str, Tensor] | Input | MaskedInput
"""A cache, tensors by hook point's name, or text or token ids that are run when they are needed."""


def input_of(bridge: "TransformerBridge", source: Source) -> tuple[Tensor, Tensor | None] | None:
    """Returns the ids and the mask of a source that is run, or None for one that was."""
    match source:
        case Mapping():
            return None
        case MaskedInput(tokens, mask):
            return tokens.to(bridge.device), None if mask is None else mask.to(bridge.device)
        case _:
            return as_tensor(bridge, source, None, None)


@dataclass
class Sources:
    """Values of named runs, and what actions make of them, which is computed once.

    Args:
        values: By the run's name, its values by hook point's name.
        masks: By the run's name, its padding mask, where something is padded.
        logits: By the run's name, what the model returned, where the run was an input.
        rows: Rows that a run must have; one row stands for all.
        length: Positions that it must have.
    """

    values: Mapping[str, Mapping[str, Tensor]]
    masks: Mapping[str, Tensor]
    logits: Mapping[str, Tensor]
    rows: int
    length: int
    _prepared: dict[tuple[str, Action], Tensor] = field(default_factory=dict)

    def of(self, site: Site) -> Tensor | None:
        """Returns what a site's action takes from its source run, or None for an action without one."""
        run = site.action.run
        if run is None:
            return None
        key = (site.name, site.action)
        if key in self._prepared:
            return self._prepared[key]
        values = self.values[run][site.name]
        prepared = site.action.prepared(values, site.axes, self.masks.get(run))
        self._check(prepared, site)
        if prepared is not values:
            self._prepared[key] = prepared
        return prepared

    def _check(self, values: Tensor, site: Site) -> None:
        sizes = dict(zip(site.axes, values.shape, strict=True))
        along = [axis for axis in ("pos", "q_pos", "k_pos") if axis in sizes]
        if sizes["batch"] not in (1, self.rows) or any(sizes[axis] != self.length for axis in along):
            raise InvalidArgumentError(
                f"the source run {site.action.run!r} does not fit the run that is changed",
                expected=f"{self.rows} rows (or one) of {self.length} positions",
                got=f"[{', '.join(f'{axis}={size}' for axis, size in sizes.items())}]",
                where=site.name,
            )


@torch.no_grad()
def gathered(
    bridge: "TransformerBridge",
    sites: Iterable[Site],
    sources: Mapping[str, Source],
    *,
    rows: int,
    length: int,
) -> Sources:
    """Returns the source runs that sites name, with the values that these need.

    Args:
        bridge: The model.
        sites: Which values are needed.
        sources: Runs by name.
        rows: Rows of the run that is changed.
        length: Its positions.

    Raises:
        InvalidArgumentError: A run is not given.
    """
    needed: dict[str, dict[str, None]] = {}
    for site in sites:
        if site.action.run is not None:
            needed.setdefault(site.action.run, {})[site.name] = None
    values: dict[str, Mapping[str, Tensor]] = {}
    masks: dict[str, Tensor] = {}
    logits: dict[str, Tensor] = {}
    for run, names in needed.items():
        if run not in sources:
            raise InvalidArgumentError(
                f"an intervention takes values from the run {run!r}, which is not given",
                got=", ".join(map(repr, sources)) or "no sources",
                fix=f"sources={{{run!r}: its tokens, text, or cache}}",
            )
        match sources[run]:
            case ActivationCache() as cache:
                values[run] = {name: cache[name] if cache.has_batch_dim else cache[name][None] for name in names}
            case Mapping() as tensors:
                values[run] = cast("Mapping[str, Tensor]", tensors)
            case given:
                found = input_of(bridge, given)
                assert found is not None, "a source that is no mapping is run"
                tokens, mask = found
                logits[run], cache = bridge.run_with_cache(tokens, names_filter=list(names), attention_mask=mask)
                values[run] = {name: cache[name] for name in names}
                if mask is not None:
                    masks[run] = mask
    return Sources(values, masks, logits, rows, length)
