"""Writes: a write to a point moves the logits, and is in everything that is computed of the point."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from clearspan._run import runs
from clearspan._run.hooks import Hooked
from clearspan.cache import ActivationCache
from clearspan.components import BlockBridge, GatedMLPBridge
from clearspan.errors import UnreadableWeightError
from clearspan.points import Derived, HookPoint, InPlace, ReadOnly
from clearspan.verification.identities import statements
from clearspan.verification.reads import held, tolerance_of, unmasked
from clearspan.verification.report import Check
from clearspan.verification.statement import Statement, relative
from clearspan.verification.trial import FAULTS, Trial, layer_of

LEAST_EFFECT = 1e-6
"""Relative change of the logits below which a write counts as lost."""
ROWS = 16
"""Writes tried in one forward, each in a row of its own."""
GATE = 1e-4
"""Relative error allowed where a product of branches is compared with its factors."""

_LOST = (
    "The write did not reach what reads the value. If the model was patched, load it as it was published; otherwise "
    "this is a fault of clearspan's adapter: please report it with this table."
)
_UNREADABLE = "It computes with a weight whose values cannot be read: offloaded, quantised, or under an adapter."


class Writes:
    """The writes of one trial.

    Args:
        trial: The model on trial; its statements are those that hold.
    """

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        if not trial.statements:
            trial.statements = [one for one in statements(trial.model) if held(trial, one).passed]

    def checks(self) -> Iterator[Check]:
        """Yields the checks of all writes."""
        points = []
        for point in self._written():
            if _needs_what_cannot_be_read(point):
                yield Check("writes", f"{point.name}: raises by name", True, explanation=_UNREADABLE)
            else:
                points.append(point)
        tokens = self._trial.tokens[:1].expand(ROWS, -1).contiguous()
        base = runs.forward(self._trial.model, tokens)
        noise = relative(base, self._trial.cache["hook_logits"][:1].expand_as(base))
        stretches = [points[first : first + ROWS] for first in range(0, len(points), ROWS)]
        for turn in (0, 1) if self._trial.level == "full" else (0,):
            for number, stretch in enumerate(stretches):
                in_place = bool((number + turn) % 2)
                yield from self._of_stretch(stretch, tokens, base, noise, in_place=in_place)

    def _written(self) -> Iterator[HookPoint]:
        """Yields the points to write: of all layers, or of one layer of each kind, besides those outside the blocks.

        Those that must not be written in one run together come in different stretches.
        """
        layers = self._trial.layers()
        writable = [point for point in self._trial.model.index if not isinstance(point.access, ReadOnly)]
        readable = [point for point in writable if self._trial.is_readable(point.name)]
        chosen = [point for point in readable if layer_of(point) in (None, *layers)]
        beside = [
            point for point in chosen if isinstance(point.access, Derived) and not point.access.derivation.is_in_series
        ]
        rest = [point for point in chosen if point not in beside]
        filler = -len(rest) % ROWS
        yield from rest
        yield from rest[:filler]
        yield from beside

    def _of_stretch(
        self, points: Sequence[HookPoint], tokens: Tensor, base: Tensor, noise: float, *, in_place: bool
    ) -> Iterator[Check]:
        """Yields that writes to these points, each in a row of its own, move the logits and reach what reads them."""
        rows = {point.name: row for row, point in enumerate(points)}

        def write(value: Tensor, hook: HookPoint) -> Tensor | None:
            row = rows[hook.name]
            edited = value if in_place else value.clone()
            edited[row] = changed(value[row], hook)
            return None if in_place else edited

        try:
            with Hooked(self._trial.model, [(point.name, write) for point in points]):
                logits, cache = runs.run_with_cache(self._trial.model, tokens, self._trial.is_readable)
        except FAULTS as error:
            for point in points:
                yield Check("writes", point.name, False, explanation=f"the run raised: {error}")
            return
        way = "in place" if in_place else "returned"
        for row, point in enumerate(points):
            effect, least = relative(logits[row], base[row]), max(LEAST_EFFECT, 3 * noise)
            why = self._lost(point, row, cache)
            if not why and not max(effect, self._norm_moved(point, row, cache)) > least:
                why = f"the logits changed by {effect:.1e}, no more than noise. {_LOST}"
            yield Check("writes", f"{point.name}, {way}", not why, effect, least, why)

    def _lost(self, point: HookPoint, row: int, cache: ActivationCache) -> str:
        """Returns what does not hold with a point written; nothing where all does."""
        for statement in self._computed_of(point):
            if not statement.error(cache, row) <= tolerance_of(self._trial, statement):
                return f"with the point written, this does not hold: {statement.text}. {_LOST}"
        return self._not_linear(point, row, cache) or self._overwritten(point, row, cache)

    def _norm_moved(self, point: HookPoint, row: int, cache: ActivationCache) -> float:
        """Returns how far a norm's output moved with its scale: another norm after it may undo that in the logits."""
        norm, _, name = point.name.rpartition(".")
        out = f"{norm}.hook_out"
        is_scale = name == "hook_scale" and out in cache
        return relative(cache[out][row], self._trial.cache[out][0]) if is_scale else 0.0

    def _overwritten(self, point: HookPoint, row: int, cache: ActivationCache) -> str:
        """Returns which value before the point its write in place has changed; nothing where none is."""
        if not isinstance(point.access, InPlace) or self._trial.is_half:
            return ""
        layer = layer_of(point)
        assert layer is not None, "streams that are written in place are in blocks"
        before = tuple(_before(self._trial.model.blocks[layer], point.name))
        for name in (one.name for one in self._trial.model.index if one.name.startswith(before)):
            if not self._trial.is_readable(name):
                continue
            plain = self._trial.cache[name]
            if plain.is_floating_point() and not relative(unmasked(cache[name][row]), unmasked(plain[0])) <= GATE:
                return f"the write is in {name} too, which comes before it: `output_is_overwritten` is missing there"
        return ""

    def _not_linear(self, point: HookPoint, row: int, cache: ActivationCache) -> str:
        """Returns why an MLP's linear branch is none; nothing where it is, or the point is something else."""
        path, _, name = point.name.rpartition(".")
        if name != "hook_pre_linear" or self._trial.is_half or f"{path}.norm.hook_in" in self._trial.model.hook_dict:
            return ""
        post, plain = f"{path}.hook_post", self._trial.cache
        mlp = next((part for block in self._trial.model.blocks for part in block.walk() if part.path == path), None)
        if post not in cache or not isinstance(mlp, GatedMLPBridge):
            return ""
        before, after = mlp.branch(plain[point.name][0]), mlp.branch(cache[point.name][row])
        left, right = cache[post][row] * before, plain[post][0] * after
        if relative(left, right) <= GATE:
            return ""
        return f"{post} does not grow as {point.name} does: that is no linear branch, such as when it is the gate"

    def _computed_of(self, point: HookPoint) -> Iterable[Statement]:
        names = {point.name, *point.aliases}
        return (statement for statement in self._trial.statements if names & set(statement.causes))


def _before(block: BlockBridge, stream: str) -> Iterator[str]:
    """Yields how names of points begin that come before a residual stream inside a block."""
    yield block.enters
    for sublayer in block.sublayers:
        if block.stream_before(sublayer.stage) == stream:
            return
        yield from (f"{sublayer.part.path}.", sublayer.hook_out)
        yield from (f"{block.path}.{name}." for name in block.fed_by.get(sublayer.name, ()))
        if sublayer.norm is not None:
            yield f"{sublayer.norm.path}."


def _needs_what_cannot_be_read(point: HookPoint) -> bool:
    """Whether a write to the point computes with a weight that is offloaded or quantised, or that adapters hide."""
    try:
        weights = point.access.derivation.weights_to_write() if isinstance(point.access, Derived) else ()
    except UnreadableWeightError:
        return True
    return any(weight.is_meta or not weight.is_floating_point() for weight in weights)


def changed(value: Tensor, hook: HookPoint) -> Tensor:
    """Returns a change of one row's value that a norm does not undo."""
    if not value.is_floating_point():
        turned = value.flip(-1)
        if hook.axes[-1] == "pos" and not torch.equal(turned, value):  # types of tokens may all be the same
            return turned
        return (value + 1) % hook.sizes.get("expert", 2)
    if hook.axes[-1] == "k_pos":
        back = torch.linspace(1, 0, value.shape[-1], dtype=value.dtype, device=value.device)
        return value * 0.5 + back * (value > torch.finfo(value.dtype).min / 2) * 0.25
    if hook.name.endswith(".hook_gate"):  # which may be bounded
        return value * torch.linspace(0.2, 0.9, value.shape[-1], dtype=value.dtype, device=value.device)
    uneven = torch.linspace(0.5, 1.5, value.shape[-1], dtype=value.dtype, device=value.device)
    if hook.axes[-2:] == ("stream", "d_model"):  # streams that are the same become different ones
        value = value * torch.linspace(1, 2, value.shape[-2], dtype=value.dtype, device=value.device).unsqueeze(-1)
    return value * (1.5 if value.shape[-1] == 1 else uneven) + 0.25 * value.abs().mean()
