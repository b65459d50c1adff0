"""Source runs: where interventions take values from. Each is a cache, tensors by name, or an input that is run once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from clearspan.bridge.cache import ActivationCache
from clearspan.bridge.inputs import Input, as_tensor
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Action, Site

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge

Source = ActivationCache | Mapping[str, Tensor] | Input
"""A cache, tensors by hook point's name, or text or token ids that are run when they are needed."""


@dataclass
class Sources:
    """Values of named runs, and what actions make of them. Each is computed once.

    Args:
        values: By the run's name, its values by hook point's name.
        masks: By the run's name, its padding mask, where something is padded.
        rows: Rows that a run must have; one row stands for all.
        length: Positions that it must have.
    """

    values: Mapping[str, Mapping[str, Tensor]]
    masks: Mapping[str, Tensor]
    rows: int
    length: int
    _prepared: dict[tuple[str, Action], Tensor] = field(default_factory=dict)

    def of(self, site: Site) -> Tensor | None:
        """Returns what a site's action takes from its source run, or None for an action without one."""
        run = site.action.run
        if run is None:
            return None
        key = (site.name, site.action)
        if key not in self._prepared:
            values = self.values[run][site.name]
            prepared = site.action.prepared(values, site.axes, self.masks.get(run))
            self._check(prepared, site)
            self._prepared[key] = prepared
        return self._prepared[key]

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
    for run, names in needed.items():
        if run not in sources:
            raise InvalidArgumentError(
                f"an intervention takes values from the run {run!r}, which is not given",
                got=", ".join(map(repr, sources)) or "no sources",
                fix=f"sources={{{run!r}: its tokens, text, or cache}}",
            )
        values[run], mask = _values(bridge, sources[run], list(names))
        if mask is not None:
            masks[run] = mask
    return Sources(values, masks, rows, length)


def _values(
    bridge: "TransformerBridge", source: Source, names: list[str]
) -> tuple[Mapping[str, Tensor], Tensor | None]:
    match source:
        case ActivationCache():
            return {name: source[name] if source.has_batch_dim else source[name][None] for name in names}, None
        case Mapping():
            return cast("Mapping[str, Tensor]", source), None
        case _:
            tokens, mask = as_tensor(bridge, source, None, None)
            _, cache = bridge.run_with_cache(tokens, names_filter=names, attention_mask=mask, return_type=None)
            return {name: cache[name] for name in names}, mask
