"""The verification itself: a few short forward passes of the user's own model."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from clearspan._forward.given import prepare
from clearspan._run import runs
from clearspan._run.hooks import Hooked
from clearspan.checks import tensor_of
from clearspan.errors import ClearspanError, InvalidArgumentError, NotFiniteError, UnreadableWeightError
from clearspan.model import Model
from clearspan.points import Address, Derived, HookPoint, template_of
from clearspan.verification.identities import Statement, relative, statements
from clearspan.verification.report import Check, Group, Verification

Level = Literal["quick", "full"]

FULL_PRECISION = 1e-5
"""Relative error allowed in float32 and better. Identities measured at most 2e-6 on all supported architectures."""
QUANTISED = 3e-2
"""Relative error allowed where a map is quantised: 8 bit kernels round their input too. Measured at most 1.2e-2."""
HALF_PRECISION_STEPS = 64
"""Error allowed in half precision, in steps of the dtype's precision."""
LEAST_EFFECT = 1e-6
"""Relative change of the logits below which a write counts as lost."""
ROWS = 16
"""Writes tried in one forward, each in a row of its own."""
LENGTH = 12
"""Tokens in a row."""

_LOST = (
    "The write did not reach what reads the value. If the model was patched, load it as it was published; otherwise "
    "this is a fault of clearspan's adapter: please report it with this table."
)
_UNEQUAL = (
    "The point does not show what its name says on this model. If the model was patched, load it as it was published; "
    "otherwise this is a fault of clearspan's adapter: please report it with this table."
)


_NOT_FINITE = (
    "The model's own forward, without this library, gives logits there that are infinite or not numbers, so there is "
    "nothing to compare."
)
_UNREADABLE = "It computes with a weight whose values cannot be read: offloaded, quantised, or under an adapter."


class _Verifier:
    """One verification under way.

    Args:
        bridge: The bridge.
        level: How much is tried.
        tokens: Token ids `[batch, pos]`.
    """

    def __init__(self, model: Model, level: Level, tokens: Tensor) -> None:
        self.model = model
        self.level = level
        self.tokens = tokens
        self.forwards = 0
        self.statements = list(statements(model))
        self.unreadable: set[str] = set()
        precision = torch.finfo(model.hf_model.dtype)
        full = torch.finfo(torch.float32).eps
        self.is_half = precision.eps > full
        self.tolerance = HALF_PRECISION_STEPS * precision.eps if self.is_half else FULL_PRECISION

    def checks(self) -> Iterator[Check]:
        """Yields all checks."""
        base = self._hf()
        if not base.isfinite().all():
            raise NotFiniteError(
                "the model's own logits are not finite, so there is nothing to verify",
                where=f"{type(self.model.hf_model).__name__} in {self.model.hf_model.dtype}, without this library",
                fix="bridge.to(torch.float32), or other tokens=",
            )
        yield self._compared("parity", "logits with nothing listening, bit for bit", self._forward(), base, 0.0)
        yield from self._reads(base)
        points = []
        for point in self._written():
            if _needs_what_cannot_be_read(point):
                yield Check("writes", f"{point.name}: raises by name", True, explanation=_UNREADABLE)
            else:
                points.append(point)
        for first in range(0, len(points), ROWS):
            yield from self._writes(points[first : first + ROWS], in_place=bool(first // ROWS % 2))
        if self.level == "full":
            for first in range(0, len(points), ROWS):
                yield from self._writes(points[first : first + ROWS], in_place=not first // ROWS % 2)
        yield from self._padding()
        if self.is_half:
            yield from self._precision(base)

    def _hf(self) -> Tensor:
        self.forwards += 1
        return self.model.hf_model(self.tokens, use_cache=False).logits

    def _forward(self) -> Tensor:
        self.forwards += 1
        return runs.forward(self.model, self.tokens)

    def _compared(
        self,
        group: Group,
        what: str,
        found: Tensor,
        expected: Tensor,
        tolerance: float,
    ) -> Check:
        error = relative(found, expected)
        return Check(group, what, error <= tolerance, error, tolerance, "" if error <= tolerance else _UNEQUAL)

    def _reads(self, base: Tensor) -> Iterator[Check]:
        """Yields that every point fires with the value that the cache has, and that the identities hold."""
        self.unreadable = set()
        for name, reason in self._out_of_reach():
            self.unreadable.add(name)
            yield Check("reads", name, False, explanation=f"{reason}\n{_UNEQUAL}")
        self.forwards += 2
        logits, cache = runs.run_with_cache(self.model, self.tokens, self._is_readable)
        yield self._compared("parity", "logits with everything cached", logits, base, self.tolerance)
        heard: dict[str, Tensor] = {}

        def hear(value: Tensor, hook: HookPoint) -> None:
            heard[hook.name] = value.clone()

        points = []
        for point in filter(lambda point: self._is_readable(point.name), self.model.index):
            failed = _refused("reads", point.name, lambda point=point: cache[point.name])
            if failed is None:
                points.append(point)
            else:
                self.unreadable.add(point.name)
                yield failed
        logits = runs.run_with_hooks(self.model, self.tokens, fwd_hooks=[(point.name, hear) for point in points])
        yield self._compared("parity", "logits with everything listened to", logits, base, self.tolerance)
        known = {"batch": len(self.tokens), **dict.fromkeys(("pos", "q_pos", "k_pos"), self.tokens.shape[1])}
        for point in points:
            if point.name not in heard or point.name not in cache:
                yield Check("reads", point.name, False, explanation=f"{point.place} was not passed. {_UNEQUAL}")
                continue
            shape = tuple({**known, **point.sizes}.get(axis, -1) for axis in point.axes)
            if heard[point.name].shape != shape or cache[point.name].shape != shape:
                got = f"axes {point.axes} should be {list(shape)}, got {list(heard[point.name].shape)}"
                yield Check("reads", point.name, False, explanation=f"{got}. {_UNEQUAL}")
            else:
                pair = _unmasked(heard[point.name]), _unmasked(cache[point.name])
                yield self._compared("reads", point.name, *pair, self.tolerance)
        self.statements = [one for one in self.statements if all(name in cache for name in one.points)]
        for statement in tuple(self.statements):
            failed = _refused("identities", statement.text, lambda statement=statement: statement.error(cache))
            if failed is not None:
                self.statements.remove(statement)
                yield failed
                continue
            error = statement.error(cache)
            tolerance = self._tolerance(statement)
            passed = error <= tolerance
            yield Check("identities", statement.text, passed, error, tolerance, "" if passed else _UNEQUAL)

    def _tolerance(self, statement: Statement) -> float:
        is_quantised = statement.through is not None and statement.through.is_quantised
        return max(self.tolerance, QUANTISED) if is_quantised else self.tolerance

    def _is_readable(self, name: str) -> bool:
        return name not in self.unreadable

    def _out_of_reach(self) -> Iterator[tuple[str, str]]:
        """Yields points at which a run fails, each with what it raised. They are looked for only if one does."""
        model = self.model
        try:
            runs.run_with_cache(model, self.tokens)
            return
        except ClearspanError:
            pass
        finally:
            self.forwards += 1
        for point in model.index:
            self.forwards += 1
            try:
                runs.run_with_cache(model, self.tokens, point.name)
            except ClearspanError as error:
                yield point.name, str(error)

    def _written(self) -> Iterator[HookPoint]:
        """Yields the points to write: of all layers, or of one layer of each kind, besides those outside the blocks.

        Those that must not be written in one run together come in different stretches.
        """
        layers = self._layers()
        readable = [point for point in self.model.index if point.name not in self.unreadable]
        chosen = [point for point in readable if _layer(point) in (None, *layers)]
        beside = [
            point for point in chosen if isinstance(point.access, Derived) and not point.access.derivation.is_in_series
        ]
        rest = [point for point in chosen if point not in beside]
        filler = -len(rest) % ROWS
        yield from rest
        yield from rest[:filler]
        yield from beside

    def _layers(self) -> Sequence[int]:
        if self.level == "full":
            return range(self.model.cfg.n_layers)
        kinds: dict[frozenset[str], list[int]] = {}
        for layer in range(self.model.cfg.n_layers):
            names = (point.name for point in self.model.index if _layer(point) == layer)
            kinds.setdefault(frozenset(map(template_of, names)), []).append(layer)
        return [there[len(there) // 2] for there in kinds.values()]

    def _writes(self, points: Sequence[HookPoint], *, in_place: bool) -> Iterator[Check]:
        """Yields that writes to these points, each in a row of its own, move the logits and reach what reads them."""
        model = self.model
        tokens = self.tokens[:1].expand(len(points), -1).contiguous()
        rows = {point.name: row for row, point in enumerate(points)}

        def write(value: Tensor, hook: HookPoint) -> Tensor | None:
            row = rows[hook.name]
            edited = value if in_place else value.clone()
            edited[row] = _changed(value[row], hook)
            return None if in_place else edited

        self.forwards += 2
        base = runs.forward(model, tokens)
        noise = relative(base, self._alone[: len(points)])
        try:
            with Hooked(model, [(point.name, write) for point in points]):
                logits, cache = runs.run_with_cache(model, tokens, self._is_readable)
        except ClearspanError as error:
            for point in points:
                yield Check("writes", point.name, False, explanation=f"the run raised: {error}")
            return
        way = "in place" if in_place else "returned"
        for point, row in zip(points, range(len(points)), strict=True):
            effect = relative(logits[row], base[row])
            least = max(LEAST_EFFECT, 3 * noise)
            computed = self._computed_of(point)
            lost = [statement for statement in computed if statement.error(cache, row) > self._tolerance(statement)]
            passed = effect > least and not lost
            if lost:
                why = f"with the point written, this does not hold: {lost[0].text}. {_LOST}"
            else:
                why = "" if passed else f"the logits changed by {effect:.1e}, no more than noise. {_LOST}"
            yield Check("writes", f"{point.name}, {way}", passed, effect, least, why)

    def _computed_of(self, point: HookPoint) -> Iterable[Statement]:
        names = {point.name, *point.aliases}
        return (statement for statement in self.statements if names & set(statement.causes))

    @property
    def _alone(self) -> Tensor:
        """The first row's logits, in as many rows as a forward of writes has."""
        self.forwards += 1
        return runs.forward(self.model, self.tokens[:1]).expand(ROWS, -1, -1)

    def _padding(self) -> Iterator[Check]:
        """Yields that rows of different lengths, padded on either side, have the logits that they have alone."""
        length = self.tokens.shape[1]
        lengths = [length, length - 3]
        alone = []
        for row, n in enumerate(lengths):
            self.forwards += 1
            alone.append(runs.forward(self.model, self.tokens[row : row + 1, :n])[0])
        for side in ("left", "right"):
            padded, mask = torch.zeros_like(self.tokens[:2]), torch.zeros_like(self.tokens[:2])
            places = [slice(length - n, length) if side == "left" else slice(0, n) for n in lengths]
            for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
                padded[row, place], mask[row, place] = self.tokens[row, :n], 1
            self.forwards += 1
            logits = runs.forward(self.model, padded, attention_mask=mask)
            own = logits if logits.isfinite().all() else self._hf_padded(padded, mask)
            for row, place in enumerate(places):
                what = f"row of {lengths[row]} tokens padded on the {side} to {length}"
                if own[row, place].isfinite().all():
                    yield self._compared("padding", what, logits[row, place], alone[row], self.tolerance)
                else:
                    yield Check("padding", what, True, explanation=_NOT_FINITE)

    def _hf_padded(self, padded: Tensor, mask: Tensor) -> Tensor:
        """Returns the logits that the model itself gives for padded rows, called as a run calls it."""
        self.forwards += 1
        return self.model.hf_model(**prepare(self.model, padded, attention_mask=mask).kwargs).logits

    def _precision(self, base: Tensor) -> Iterator[Check]:
        """Yields how far the logits are from a copy of the model in float32, and that the identities hold there."""
        control = copy.deepcopy(self.model.hf_model).float()
        model = type(self.model)(control, type(self.model.adapter)(copy.copy(self.model.cfg)))
        self.forwards += 1
        logits, cache = runs.run_with_cache(model, self.tokens)
        error = relative(base, logits)
        yield Check("precision", f"logits in {self.model.hf_model.dtype} against float32", True, error, None)
        for statement in statements(model):
            found = statement.error(cache)
            passed = found <= FULL_PRECISION
            what = f"in float32: {statement.text}"
            yield Check("precision", what, passed, found, FULL_PRECISION, "" if passed else _UNEQUAL)


def verify(model: Model, level: Level, tokens: Tensor | None) -> Verification:
    """Verifies a bridge. The arguments are those of `TransformerBridge.verify`."""
    if level not in ("quick", "full"):
        raise InvalidArgumentError(f"unknown level {level!r}", expected="'quick' or 'full'")
    if tokens is None:
        drawn = torch.randint(0, model.cfg.d_vocab, (2, LENGTH), generator=torch.Generator().manual_seed(0))
        tokens = drawn.to(model.device)
    else:
        tokens = tensor_of("tokens", tokens)
    if tokens.ndim != 2 or tokens.shape[0] < 2 or tokens.shape[1] < 4:
        raise InvalidArgumentError(
            "too few tokens to verify on", expected="at least 2 rows of 4", got=str(list(tokens.shape))
        )
    was_training = model.hf_model.training
    model.eval()
    try:
        with torch.no_grad():
            verifier = _Verifier(model, level, tokens)
            checks = tuple(verifier.checks())
    finally:
        model.train(was_training)
    return Verification(
        model=model.cfg.model_name,
        architecture=model.cfg.architecture,
        level=level,
        dtype=str(model.hf_model.dtype).removeprefix("torch."),
        checks=checks,
        forwards=verifier.forwards,
    )


def _refused(group: Group, what: str, look: Callable[[], object]) -> Check | None:
    """Returns the check of something that raises, or None where it does not.

    It is passed where a weight cannot be read, which the model's owner decided, and failed otherwise.
    """
    try:
        look()
    except UnreadableWeightError as error:
        return Check(group, f"{what}: raises by name", True, explanation=str(error))
    except ClearspanError as error:
        return Check(group, what, False, explanation=f"{error}\n{_UNEQUAL}")
    return None


def _needs_what_cannot_be_read(point: HookPoint) -> bool:
    """Whether a write to the point computes with a weight that is offloaded or quantised, or that adapters hide."""
    try:
        weights = point.access.derivation.weights_to_write() if isinstance(point.access, Derived) else ()
    except UnreadableWeightError:
        return True
    return any(weight.is_meta or not weight.is_floating_point() for weight in weights)


def _layer(point: HookPoint) -> int | None:
    return Address.parse(point.name).layer


def _unmasked(value: Tensor) -> Tensor:
    """Returns a value with zeros where a mask hides it."""
    if not value.is_floating_point():
        return value
    return torch.where(value > torch.finfo(value.dtype).min / 2, value, 0)


def _changed(value: Tensor, hook: HookPoint) -> Tensor:
    """Returns a change of one row's value that a norm does not undo."""
    if not value.is_floating_point():
        return value.flip(-1) if hook.axes[-1] == "pos" else (value + 1) % hook.sizes.get("expert", 2)
    if hook.axes[-1] == "k_pos":
        back = torch.linspace(1, 0, value.shape[-1], dtype=value.dtype, device=value.device)
        return value * 0.5 + back * (value > torch.finfo(value.dtype).min / 2) * 0.25
    uneven = torch.linspace(0.5, 1.5, value.shape[-1], dtype=value.dtype, device=value.device)
    return value * (1.5 if value.shape[-1] == 1 else uneven) + 0.25 * value.abs().mean()
