"""How attention uses queries and keys, found by looking at the product itself, against what the adapter says."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clearspan._run import runs
from clearspan.cache import ActivationCache
from clearspan.components import (
    GeneralAttentionBridge,
    LatentAttentionBridge,
    OpaqueAttentionBridge,
    PosEmbedBridge,
    SharedKeysAttentionBridge,
)
from clearspan.hf.attention import Call, Observer
from clearspan.hf.observers import observed
from clearspan.hf.tensors import as_tokens
from clearspan.points import Layout, Side
from clearspan.verification.reads import is_visible
from clearspan.verification.report import Check
from clearspan.verification.statement import relative
from clearspan.verification.trial import UNEQUAL, Trial, guarded

NOISE = 1e-4
"""Relative error allowed. Measured at most 5e-6; a rotation, a norm or another head changes queries by 0.1 and more."""
LENGTH = 5e-3
"""Relative error allowed in the length of queries. Measured 7e-4 where sines and cosines were rounded to bfloat16."""


@dataclass
class Seen:
    """What one attention used in a forward; each `[batch, head, pos, d_head]` or `[batch, head, q_pos, k_pos]`.

    Attributes:
        layouts: How these lie in the tensors that the model computes with.
        rows: The batch's rows.
        sides: What was seen.
    """

    layouts: Mapping[Side, Layout]
    rows: int
    sides: dict[Side, Tensor] = field(default_factory=dict)

    def observe(self, call: Call) -> object:
        """Runs a call, and keeps what it shows."""
        return call.run_watched({side: self._keep(side) for side in _WATCHED})

    def _keep(self, side: Side) -> Callable[[Tensor], Tensor]:
        def keep(tensor: Tensor) -> Tensor:
            layout = self.layouts[side]
            if tensor.ndim == 4 or layout.joins_rows:  # BLOOM multiplies with rows and heads in one axis
                shown = as_tokens(tensor.detach().clone(), layout, self.rows)
                self.sides[side] = shown if layout.is_square else shown.transpose(1, 2)
            return tensor

        return keep


_NAMES = {"q": "queries", "k": "keys"}
_WATCHED = (Side.QUERY, Side.KEY, Side.SCORES, Side.PATTERN)


def attention(trial: Trial) -> Iterator[Check]:
    """Yields the checks of all attentions that show queries and keys of their own."""
    model = trial.model
    attentions = [part for part in model.attentions if trial.is_readable(f"{part.path}.hook_pattern")]
    if not attentions:
        return
    rows = len(trial.tokens)
    seen = {part.path: Seen({side: part.inside(side).layout for side in _WATCHED}, rows) for part in attentions}
    norms = ("q_norm.hook_in", "k_norm.hook_in", "q_norm.hook_out", "k_norm.hook_out")
    ends = ("hook_q", "hook_k", *norms, "kv_a.hook_out", "k_rope_norm.hook_out")
    wanted = {f"{part.path}.{end}" for part in attentions for end in ends}
    names = [name for name in model.hook_dict if name in wanted and trial.is_readable(model.hook_dict[name].name)]
    with observed(_observers(attentions, seen)):
        _, cache = runs.run_with_cache(model, trial.tokens, names)
    biased = []
    for part in attentions:
        found = seen[part.path].sides
        yield from guarded("attention", part.path, _of_layer(cache, part, found))
        if not part.has_rotary:
            biased += [_bias(cache, part, found)]
    yield from guarded("attention", "positions", _of_positions(trial, biased))


def _observers(attentions: Sequence[GeneralAttentionBridge], seen: Mapping[str, Seen]) -> dict[nn.Module, Observer]:
    """Returns what observes each module that attends in the next forward, in all of its calls."""
    calls: dict[nn.Module, dict[int, Observer]] = {}
    for part in attentions:
        calls.setdefault(part.core_module, {})[part.call or 0] = seen[part.path].observe
    return {module: _in_turn(there) for module, there in calls.items()}


def _in_turn(observers: Mapping[int, Observer]) -> Observer:
    """Returns an observer that hands each call on to the one who observes it."""
    numbers = itertools.count()

    def observe(call: Call) -> object:
        return observers.get(next(numbers), type(call).run)(call)

    return observe


def _of_layer(
    cache: ActivationCache, attention: GeneralAttentionBridge, seen: Mapping[Side, Tensor]
) -> Iterator[Check]:
    yield _sinks(attention, seen[Side.PATTERN])
    if Side.QUERY not in seen:  # one function multiplies and adds a bias (BLOOM)
        yield _scores(cache, attention, seen[Side.SCORES])
        return
    if isinstance(attention, LatentAttentionBridge):
        yield _latent_rotation(cache, attention, seen[Side.KEY])
    for side, key in ((Side.QUERY, "q"), (Side.KEY, "k")):
        expected = _expected(cache, attention, key)
        if expected is not None:
            used = seen[side]
            if attention.norms_rotated:
                entered = _by_head(cache[f"{attention.path}.{key}_norm.hook_in"], expected)
                by_head = cache[f"{attention.path}.hook_{key}"].transpose(1, 2)
                moved = bool(_moved(entered, by_head).any())
                yield _rotation(
                    attention, f"{_NAMES[key]} before their norm", turns=attention.has_rotary, is_turned=moved
                )
            yield from _of_side(attention, key, used, _repeated(expected, used))


def _expected(cache: ActivationCache, attention: GeneralAttentionBridge, key: str) -> Tensor | None:
    """Returns queries or keys as the adapter says that they enter the product, but for rotation and scale."""
    path = attention.path
    if isinstance(attention, LatentAttentionBridge):
        # The rotated channels may change places.
        return None if key == "k" else cache[f"{path}.hook_q"].transpose(1, 2)[..., : attention.d_head_nope]
    if isinstance(attention, SharedKeysAttentionBridge) and key == "k":
        return None
    by_head = cache[f"{path}.hook_{key}"].transpose(1, 2)
    if f"{key}_norm" in attention.submodules:
        return _by_head(cache[f"{path}.{key}_norm.hook_out"], by_head)
    return by_head


def _by_head(value: Tensor, like: Tensor) -> Tensor:
    """Returns a norm's input or output, flat or by head, as `[batch, head, pos, d_head]`."""
    return value.reshape(*value.shape[:2], like.shape[1], -1).transpose(1, 2)


def _repeated(expected: Tensor, used: Tensor) -> Tensor:
    return expected.repeat_interleave(max(1, used.shape[1] // expected.shape[1]), dim=1)


def _of_side(attention: GeneralAttentionBridge, key: str, used: Tensor, expected: Tensor) -> Iterator[Check]:
    what = _NAMES[key]
    point = f"{attention.path}.{key}_norm" if f"{key}_norm" in attention.submodules else f"{attention.path}.hook_{key}"
    turns = attention.has_rotary and not attention.norms_rotated
    if isinstance(attention, LatentAttentionBridge):
        used, turns = used[..., : attention.d_head_nope], False
    if used.shape != expected.shape:
        why = f"the product uses {list(used.shape)}, the adapter shows {list(expected.shape)}. {UNEQUAL}"
        yield Check("attention", f"{what} of {point} are used in the product", False, explanation=why)
        return
    if key == "q" and attention.scales_queries:
        there, here = (torch.linalg.vector_norm(one, dim=(0, 1, 3), keepdim=True) for one in (used, expected))
        used = used * (here / there)
    moved = _moved(used, expected)
    constant = torch.where(moved, _ratio(used, expected, moved), _ratio(used, expected, ~moved))
    error = relative(used[:, :, 0], (expected * constant)[:, :, 0])
    why = f"At the first position they are not proportional: a norm is missing, or others are used. {UNEQUAL}"
    yield Check(
        "attention",
        f"{what} of {point} are used in the product",
        error <= NOISE,
        error,
        NOISE,
        "" if error <= NOISE else why,
    )
    lengths = relative(used.norm(dim=-1), (expected * constant).norm(dim=-1))
    why = f"Something else than a rotation acts on them, by position. {UNEQUAL}"
    yield Check(
        "attention",
        f"{what} of {point} keep their lengths",
        lengths <= LENGTH,
        lengths,
        LENGTH,
        "" if lengths <= LENGTH else why,
    )
    yield _rotation(attention, what, turns=turns, is_turned=bool(moved.any()))


def _rotation(attention: GeneralAttentionBridge, what: str, *, turns: bool, is_turned: bool) -> Check:
    said, found = ("are rotated" if yes else "are not rotated" for yes in (turns, is_turned))
    why = (
        "" if turns == is_turned else f"In the product they {found} by position. `has_rotary` of the adapter is wrong."
    )
    return Check("attention", f"{what} of {attention.path} {said} by position", not why, explanation=why)


def _latent_rotation(cache: ActivationCache, attention: LatentAttentionBridge, used: Tensor) -> Check:
    """Returns the check of the keys' rotated channels, which all heads share, and which may change places."""
    is_normed = "k_rope_norm" in attention.submodules
    raw = cache[f"{attention.path}.{'k_rope_norm' if is_normed else 'kv_a'}.hook_out"]
    raw = raw.flatten(2)[..., -attention.d_head_rope :]
    shown = used[:, 0, :, attention.d_head_nope :]
    is_turned = relative(shown.sort(-1).values, raw.sort(-1).values) > 10 * NOISE
    return _rotation(attention, "keys", turns=attention.has_rotary, is_turned=is_turned)


def _moved(used: Tensor, expected: Tensor) -> Tensor:
    """Returns which channels change with the position, `[d_head]`: times a constant of their own they do not fit."""
    constant = (used * expected).sum((0, 1, 2)) / expected.square().sum((0, 1, 2)).clamp(min=1e-30)
    left = (used - expected * constant).abs().amax((0, 1, 2))
    return left > 10 * NOISE * used.abs().max()


def _ratio(used: Tensor, expected: Tensor, channels: Tensor) -> Tensor:
    """Returns the one number that these channels are multiplied by: at the first position, where none is rotated."""
    here, there = used[:, :, 0, channels], expected[:, :, 0, channels]
    return (here * there).sum() / there.square().sum().clamp(min=1e-30)


def _sinks(attention: GeneralAttentionBridge, pattern: Tensor) -> Check:
    share = (1 - pattern.double().sum(-1)).abs().max().item()
    has_share = share > NOISE
    takes = attention.has_sinks and not attention.sink_scales_z
    passed = has_share == takes
    said = "a sink takes a share of" if takes else "no sink takes a share of"
    why = "" if passed else f"Rows of the pattern are up to {share:.1e} from 1. `has_sinks` of the adapter is wrong."
    return Check("attention", f"{said} {attention.path}.hook_pattern", passed, explanation=why)


# --- positions as a bias ---------------------------------------------------------------------------------------------


def _scores(cache: ActivationCache, attention: GeneralAttentionBridge, scores: Tensor) -> Check:
    """Returns the check that scores are the product of queries and keys, times a constant, but for a bias by position.

    The difference of two rows of the batch has no such bias.
    """
    product, seen = _difference(cache, attention, scores)
    constant = (product * seen).sum() / product.square().sum().clamp(min=1e-30)
    error = relative(seen, product * constant)
    text = f"scores of {attention.path} are its queries times its keys, but for a bias by position"
    return Check("attention", text, error <= NOISE, error, NOISE, "" if error <= NOISE else UNEQUAL)


def _difference(cache: ActivationCache, attention: GeneralAttentionBridge, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how far products and scores of the first two rows are apart, zero where a mask hides them."""
    product = _product(cache, attention)
    visible = is_visible(scores).all(0)
    return (product[0] - product[1]) * visible, torch.where(visible, scores[0] - scores[1], 0)


def _product(cache: ActivationCache, attention: GeneralAttentionBridge) -> Tensor:
    queries, keys = (_expected(cache, attention, key) for key in ("q", "k"))
    assert queries is not None, "queries are shown"
    assert keys is not None, "keys are shown"
    return queries @ _repeated(keys, queries).transpose(-1, -2)


def _bias(cache: ActivationCache, attention: GeneralAttentionBridge, seen: Mapping[Side, Tensor]) -> bool | None:
    """Returns whether scores of a layer without rotation have a bias by position; None where that cannot be told."""
    if Side.SCORES not in seen or isinstance(attention, LatentAttentionBridge):
        return None
    scores = seen[Side.SCORES]
    if Side.QUERY in seen:
        product = seen[Side.QUERY] @ _repeated(seen[Side.KEY], seen[Side.QUERY]).transpose(-1, -2)
    else:
        product = _product(cache, attention)
    visible = is_visible(scores).all(0).expand_as(scores)
    apart = (product[0] - product[1])[visible[0]], (scores[0] - scores[1])[visible[0]]
    constant = (apart[0] * apart[1]).sum() / apart[0].square().sum().clamp(min=1e-30)
    return relative(scores[visible], (product * constant)[visible]) > 10 * NOISE


def _of_positions(trial: Trial, biased: list[bool | None]) -> Iterator[Check]:
    """Yields the check of the config's kind of positions, where neither rotation nor an embedding tells it."""
    said = trial.model.cfg.positional_embedding_type
    has_embedding = any(isinstance(part, PosEmbedBridge) for part in trial.model.components)
    parts = itertools.chain.from_iterable(block.walk() for block in trial.model.blocks)
    is_hidden = any(isinstance(part, OpaqueAttentionBridge) for part in parts)  # its queries may be rotated
    if has_embedding or is_hidden or len(biased) < len(trial.model.attentions) or None in biased:
        return
    found = "alibi" if any(biased) else "none"
    why = "" if said == found else f"By the scores of attention it should be {found!r}."
    yield Check("attention", f"cfg.positional_embedding_type is {said!r}", not why, explanation=why)
