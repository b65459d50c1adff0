"""A model on trial: what all checks of one verification share."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from clearspan._cache.memory import free_bytes
from clearspan._run import runs
from clearspan.cache import ActivationCache
from clearspan.components import BlockBridge
from clearspan.errors import ClearspanError, GenerationRefusedError, UnreadableWeightError, WholeForwardError
from clearspan.model import Model
from clearspan.points import Address, HookPoint
from clearspan.verification.report import Check, Group
from clearspan.verification.statement import Statement, relative

Level = Literal["quick", "full"]

FULL_PRECISION = 1e-5
"""Relative error allowed in float32 and better. Identities measured at most 2e-6 on all supported architectures."""
QUANTISED = 3e-2
"""Relative error allowed where a map is quantised: 8 bit kernels round their input too. Measured at most 1.2e-2."""
HALF_PRECISION_STEPS = 64
"""Error allowed in half precision, in steps of the dtype's precision."""

FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a run can raise where an adapter is wrong: the library's own errors, and those of torch on tensors of other
shapes."""

UNEQUAL = (
    "The point does not show what its name says on this model. If the model was patched, load it as it was published; "
    "otherwise this is a fault of clearspan's adapter: please report it with this table."
)


class Counter:
    """Counts forwards.

    Attributes:
        forwards: How many there were.
    """

    def __init__(self) -> None:
        self.forwards = 0

    @contextlib.contextmanager
    def counting(self, hf_model: nn.Module) -> Iterator[None]:
        """Counts the forwards of a model while the context is open, and those of copies that are made meanwhile."""

        def count(*_: object) -> None:
            self.forwards += 1

        handle = hf_model.register_forward_pre_hook(count)
        try:
            yield
        finally:
            handle.remove()


@dataclass
class Trial:
    """A model, the tokens that it is tried on, and what is known of it so far.

    Attributes:
        model: The model.
        level: How much is tried.
        tokens: Token ids `[batch, pos]`.
        counter: Counts forwards.
        unreadable: Points that cannot be read on this model: what failed is reported once.
        not_exercised: What was not tried, each with the reason.
        statements: The identities of its architecture; those that cannot be checked, or do not hold, are taken out.
    """

    model: Model
    level: Level
    tokens: Tensor
    counter: Counter
    unreadable: set[str] = field(default_factory=set)
    not_exercised: list[str] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    _cache: ActivationCache | None = None
    _control: "Trial | None" = None

    @functools.cached_property
    def base(self) -> Tensor:
        """The unbridged model's logits."""
        return self.model.hf_model(self.tokens, use_cache=False).logits

    def control(self) -> "Trial | None":
        """Returns the trial of a copy of the model in the next better precision; None without room, or a better one.

        Raises:
            AdapterError: The adapter does not fit the copy.
        """
        dtype = torch.float32 if self.is_half else torch.float64
        if self.model.hf_model.dtype == torch.float64 or not self.has_room("what rounding hides", dtype):
            return None
        if self._control is None:
            hf_model = copy.deepcopy(self.model.hf_model)
            nn.Module.to(hf_model, dtype)
            model = type(self.model)(hf_model, self.model.adapter.source(copy.copy(self.model.cfg)))
            self._control = Trial(
                model, self.level, self.tokens, self.counter, set(self.unreadable), self.not_exercised
            )
        return self._control

    @property
    def is_half(self) -> bool:
        """Whether the model computes in less than single precision."""
        return torch.finfo(self.model.hf_model.dtype).eps > torch.finfo(torch.float32).eps

    @property
    def tolerance(self) -> float:
        """Relative error allowed."""
        steps = HALF_PRECISION_STEPS * torch.finfo(self.model.hf_model.dtype).eps
        return steps if self.is_half else FULL_PRECISION

    @property
    def cache(self) -> ActivationCache:
        """The values of the points in the tokens' forward."""
        if self._cache is None:
            self._cache = runs.run_with_cache(self.model, self.tokens, self.is_readable)[1]
        return self._cache

    @cache.setter
    def cache(self, cache: ActivationCache) -> None:
        self._cache = cache

    def is_readable(self, name: str) -> bool:
        """Whether a point can be read, as far as is known."""
        return name not in self.unreadable

    def layers(self) -> list[int]:
        """Returns one layer of each kind; at the full level, all."""
        if self.level == "full":
            return list(range(self.model.cfg.n_layers))
        kinds: dict[object, list[int]] = {}
        named = self.model.cfg.hf.get("layer_types") or [None] * len(self.model.blocks)
        for layer, (block, name) in enumerate(zip(self.model.blocks, named, strict=False)):
            kinds.setdefault((name, _kind(block)), []).append(layer)
        return [there[len(there) // 2] for there in kinds.values()]

    def skip(self, what: str) -> None:
        """Notes once that something was not tried."""
        if what not in self.not_exercised:
            self.not_exercised.append(what)

    def has_room(self, what: str, dtype: torch.dtype) -> bool:
        """Whether a copy of the model's weights fits into free memory; if not, it is noted as not exercised."""
        numbers = sum(parameter.numel() for parameter in self.model.parameters())
        free = free_bytes(self.model.device)
        if free is None or numbers * dtype.itemsize * 1.5 < free:
            return True
        self.skip(f"{what}: a copy of the weights in {dtype} does not fit into free memory")
        return False

    def compared(
        self, group: Group, what: str, found: Tensor, expected: Tensor, tolerance: float | None = None
    ) -> Check:
        """Returns the check that two tensors are equal, but for rounding."""
        allowed = self.tolerance if tolerance is None else tolerance
        error = relative(found, expected)
        return Check(group, what, error <= allowed, error, allowed, "" if error <= allowed else UNEQUAL)


def guarded(group: Group, what: str, checks: Iterable[Check]) -> Iterator[Check]:
    """Yields checks; what is raised under way becomes a check.

    It is a passed one where a weight cannot be read, which the model's owner decided, or where a run is refused that
    this model cannot make; and a failed one otherwise.
    """
    try:
        yield from checks
    except torch.OutOfMemoryError:
        raise
    except FAULTS as error:
        yield fault(group, what, error)


def fault(group: Group, what: str, error: Exception) -> Check:
    """Returns the check of something that raised."""
    if isinstance(error, GenerationRefusedError | UnreadableWeightError | WholeForwardError):
        return Check(group, f"{what}: raises by name", True, explanation=str(error))
    said = str(error) if isinstance(error, ClearspanError) else f"it raised {type(error).__name__}: {error}"
    return Check(group, what, False, explanation=f"{said}\n{UNEQUAL}")


def refused(group: Group, what: str, look: Callable[[], object]) -> Check | None:
    """Returns the check of something that raises, or None where it does not."""
    return next(iter(guarded(group, what, _nothing(look))), None)


def _nothing(look: Callable[[], object]) -> Iterator[Check]:
    look()
    yield from ()


def layer_of(point: HookPoint) -> int | None:
    """Returns the layer that a point is in, or None."""
    return Address.parse(point.name).layer


def _kind(block: BlockBridge) -> tuple[object, ...]:
    """Returns what makes a block one of its kind: its parts, what is known of each, and the shapes of its weights."""
    parts = []
    for part in block.walk():
        settings = {
            name: value for name, value in vars(part).items() if isinstance(value, bool | int | float | str | None)
        }
        places = {"path": None, "module_path": None, "parent_path": None}
        name = part.name if part is not block else None
        shapes = [(key, tuple(one.shape)) for key, one in part.module._parameters.items() if one is not None]
        where = part.path.removeprefix(block.path)
        parts.append(
            (
                type(part),
                where,
                type(part.module),
                *sorted({**settings, **places, "name": name}.items(), key=repr),
                *shapes,
            )
        )
    return tuple(parts)
