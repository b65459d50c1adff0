"""The QK fix of AtP*: what a changed query or key does to its attention pattern is computed, and not approximated."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clearspan.analysis.attribution.readout import exact
from clearspan.cache import ActivationCache
from clearspan.components import NormalizationBridge
from clearspan.errors import InvalidArgumentError

from .patching_pair import PatchingPair
from .patching_unit import Effects, LayerEffect, PatchingUnit

QUERIES, KEYS = ("q", "rot_q"), ("k", "rot_k")

Pattern = Float[Tensor, "*variant row head q_pos k_pos"]
"""Patterns, their gradients, or scores."""
Which = Bool[Tensor, "variant pos head"]
"""The queries or keys that are changed, in each of several variants of a run."""


def fixed(pair: PatchingPair, unit: PatchingUnit, source: ActivationCache) -> Effects:
    """Returns the effects of queries or keys, through the pattern that the changed ones give, to the first order in it.

    Args:
        pair: The runs.
        unit: Queries or keys.
        source: The run that gives values, with the unit's points.

    Raises:
        InvalidArgumentError: The unit is neither.
    """
    if unit.name not in (*QUERIES, *KEYS):
        raise InvalidArgumentError(
            f"the QK fix is about queries and keys, and not {unit.name!r}", expected=", ".join((*QUERIES, *KEYS))
        )
    streams = pair.base_run([f"blocks.{layer}.hook_resid_pre" for layer in unit.layers])
    layers = [
        _Layer(pair, unit, source[unit.point(layer)], streams["resid_pre", layer], layer) for layer in unit.layers
    ]
    return Effects([layer.point("pattern") for layer in layers], [layer.effect() for layer in layers])


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
    def of(cls, before: Pattern, after: Pattern) -> "KeyChange":
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

    pair: PatchingPair
    unit: PatchingUnit
    source: Float[Tensor, "row pos head d_head"]
    stream: Float[Tensor, "row pos d_model"]
    layer: int

    def point(self, name: str) -> str:
        return f"blocks.{self.layer}.attn.hook_{name}"

    def effect(self) -> LayerEffect:
        is_single_key = self.unit.name in KEYS and self.unit.by_position
        if is_single_key and self.pair.bridge.blocks[self.layer].attn.has_sinks:
            # A sink is part of a row's maximum, which the model takes from its scores: they are not comparable.
            return self._by_positions
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

    @torch.no_grad()
    def _inside(self, name: str, which: Which) -> tuple[Pattern, Pattern]:
        """Returns scores or patterns of the base run `[row, ...]`, and with changes `[variant, row, ...]`."""
        bridge, mask, (rows, positions, heads) = self.pair.bridge, self.pair.mask, self.source.shape[:3]
        which = torch.cat([torch.zeros(1, positions, heads, dtype=torch.bool), which]).to(self.source.device)
        count = len(which)
        chosen = which.repeat_interleave(rows, 0)[..., None]
        values = self.source.repeat(count, 1, 1, 1)
        with bridge.hooks([(self.unit.point(self.layer), lambda value, hook: torch.where(chosen, values, value))]):
            _, cache = bridge.run_with_cache(
                self.stream.repeat(count, 1, 1),
                self.point(name),
                attention_mask=None if mask is None else mask.repeat(count, 1),
                start_at_layer=self.layer,
                stop_at_layer=self.layer + 1,
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

    def _by_positions(self, gradient: Pattern) -> Float[Tensor, "row pos head"]:
        """Returns the effects of single keys, each of which is changed in a run of its own."""
        assert not self._couples_heads, "no model has sinks and a norm over all heads' keys"
        positions, heads = self.source.shape[1:3]
        before, after = self._inside("pattern", torch.eye(positions, dtype=torch.bool)[..., None].expand(-1, -1, heads))
        return self._by_unit(((after - before) * gradient).sum((-2, -1)).movedim(0, -1)[None])
