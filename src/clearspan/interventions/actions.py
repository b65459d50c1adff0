"""Actions: what becomes of a value. Frozen and hashable, with a JSON form; the arithmetic is beside the data."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.errors import InvalidArgumentError
from clearspan.interventions.functions import function_named
from clearspan.points import nearest
from clearspan.shapes import Axes


class Action(ABC):
    """What becomes of the chosen part of a value."""

    kind: ClassVar[str]
    """Its name in JSON."""

    @property
    def run(self) -> str | None:
        """Name of the source run that it takes values from, or None."""
        return None

    def prepared(self, values: Tensor, axes: Axes, mask: Int[Tensor, "batch pos"] | None) -> Tensor:
        """Returns what a source's value gives, by row and position, before the chosen part is taken.

        Args:
            values: The source's value at the point, with all rows and positions.
            axes: Its axes.
            mask: The source's padding mask, or None where nothing is padded.
        """
        return values

    @abstractmethod
    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns what the chosen part becomes.

        Args:
            value: The part as it is, the batch's axis first.
            source: The same part of what `prepared` gave, or None for an action without a source.
        """

    def to_json(self) -> dict[str, Any]:
        """Returns the action as plain data."""
        return {"kind": self.kind, **asdict(cast("Any", self))}


@dataclass(frozen=True)
class Patch(Action):
    """The value of a source run at the same place takes its place.

    Attributes:
        source: The run's name among the sources.
    """

    source: str = "clean"

    kind: ClassVar[str] = "patch"

    @property
    def run(self) -> str:
        """The source run."""
        return self.source

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the source's part."""
        return _given(source).to(value)


@dataclass(frozen=True)
class Zero(Action):
    """It becomes 0."""

    kind: ClassVar[str] = "zero"

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns zeros."""
        return torch.zeros_like(value)


@dataclass(frozen=True)
class Mean(Action):
    """It becomes its mean over a source run: over rows and real positions, or over rows alone.

    Values of queries by keys are averaged over rows, place by place.

    Attributes:
        source: The run's name among the sources.
        by_position: Whether each position keeps a mean of its own.
    """

    source: str = "clean"
    by_position: bool = False

    kind: ClassVar[str] = "mean"

    @property
    def run(self) -> str:
        """The source run."""
        return self.source

    def prepared(self, values: Tensor, axes: Axes, mask: Int[Tensor, "batch pos"] | None) -> Tensor:
        """Returns the mean, in the shape of the values and without copies of it."""
        exact = values.to(torch.promote_types(values.dtype, torch.float32))
        if self.by_position or axes[1] != "pos":
            _refuse_padding(self, mask)
            mean = exact.mean(0)
        else:
            real = exact.flatten(0, 1) if mask is None else exact[mask.bool().to(values.device)]
            mean = real.mean(0)
        return mean.to(values.dtype).expand_as(values)

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the mean."""
        return _given(source).to(value)


@dataclass(frozen=True)
class Resample(Action):
    """It becomes the value of another row of a source run, at the same position.

    Attributes:
        source: The run's name among the sources; of two rows or more, without padding.
        seed: Of the order of rows, in which none keeps its place.
    """

    source: str = "clean"
    seed: int = 0

    kind: ClassVar[str] = "resample"

    @property
    def run(self) -> str:
        """The source run."""
        return self.source

    def prepared(self, values: Tensor, axes: Axes, mask: Int[Tensor, "batch pos"] | None) -> Tensor:
        """Returns the values with their rows in another order."""
        _refuse_padding(self, mask)
        if len(values) < 2:
            raise InvalidArgumentError("resampling takes the values of another row", expected="two rows or more")
        return values[derangement(len(values), self.seed).to(values.device)]

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the other row's part."""
        return _given(source).to(value)


@dataclass(frozen=True)
class Add(Action):
    """A vector times a number is added.

    Attributes:
        vector: Along the value's last axis.
        scale: The number.
    """

    vector: tuple[float, ...]
    scale: float = 1.0

    kind: ClassVar[str] = "add"

    @classmethod
    def of(cls, vector: Float[Tensor, "d"], scale: float = 1.0) -> Self:
        """Returns the action for a vector as a tensor."""
        return cls(tuple(vector.detach().double().flatten().tolist()), scale)

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the sum."""
        return value + self.scale * _as_tensor(self.vector, value)


@dataclass(frozen=True)
class Scale(Action):
    """It is multiplied by a number."""

    factor: float

    kind: ClassVar[str] = "scale"

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the product."""
        return value * self.factor


@dataclass(frozen=True)
class ProjectOut(Action):
    """Its component along a direction of the last axis is taken away.

    Attributes:
        direction: Of any length but 0.
    """

    direction: tuple[float, ...]

    kind: ClassVar[str] = "project_out"

    def __post_init__(self) -> None:
        if not any(self.direction):
            raise InvalidArgumentError("a direction of length 0 cannot be projected out")

    @classmethod
    def of(cls, direction: Float[Tensor, "d"]) -> Self:
        """Returns the action for a direction as a tensor."""
        return cls(tuple(direction.detach().double().flatten().tolist()))

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the value less its projection."""
        exact = value.to(torch.promote_types(value.dtype, torch.float32))
        unit = torch.nn.functional.normalize(_as_tensor(self.direction, exact), dim=0)
        return (exact - (exact @ unit)[..., None] * unit).to(value.dtype)


@dataclass(frozen=True)
class Apply(Action):
    """A registered function of it takes its place.

    Attributes:
        function: The name under which `register_function` made it known.
    """

    function: str

    kind: ClassVar[str] = "apply"

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns what the function returns."""
        found = function_named(self.function)(value)
        if not isinstance(found, Tensor) or found.shape != value.shape:
            raise InvalidArgumentError(
                f"the function {self.function!r} returned something of another shape",
                expected=str(list(value.shape)),
                got=str(list(found.shape)) if isinstance(found, Tensor) else type(found).__name__,
            )
        return found.to(value)


KINDS: Mapping[str, type[Action]] = {
    kind.kind: kind for kind in (Patch, Zero, Mean, Resample, Add, Scale, ProjectOut, Apply)
}
"""Actions by their name in JSON."""


def parse_action(data: Mapping[str, Any]) -> Action:
    """Returns the action of its JSON form.

    Raises:
        InvalidArgumentError: An unknown kind or field.

    Example:
        >>> parse_action({"kind": "scale", "factor": 2.0})
        Scale(factor=2.0)
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise InvalidArgumentError(
            f"unknown action {kind!r}", expected=", ".join(KINDS), nearest=nearest(str(kind), KINDS)
        )
    known = KINDS[kind].__annotations__.keys() - {"kind"}
    if not fields.keys() <= known:
        raise InvalidArgumentError(
            f"unknown fields of the action {kind!r}: {', '.join(sorted(fields.keys() - known))}",
            expected=", ".join(sorted(known)) or "none",
        )
    values = {
        name: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in fields.items()
    }
    return KINDS[kind](**values)


def derangement(size: int, seed: int) -> Int[Tensor, "row"]:
    """Returns a random order in which nothing keeps its place, each such order as likely as any other.

    Example:
        >>> derangement(2, seed=5)
        tensor([1, 0])
    """
    assert size > 1, "one thing alone keeps its place"
    generator = torch.Generator().manual_seed(seed)
    while True:  # one draw in e has no fixed point
        order = torch.randperm(size, generator=generator)
        if not (order == torch.arange(size)).any():
            return order


def _given(source: Tensor | None) -> Tensor:
    assert source is not None, "an action with a source run is handed its value"
    return source


def _refuse_padding(action: Action, mask: Tensor | None) -> None:
    if mask is not None and not bool(mask.all()):
        raise InvalidArgumentError(
            f"{action.kind} takes values at the same position",
            expected="rows of one length",
            got="rows with padding",
            where=f"source {action.run!r}",
        )


def _as_tensor(vector: Sequence[float], value: Tensor) -> Tensor:
    if len(vector) != value.shape[-1]:
        raise InvalidArgumentError(
            "the vector does not fit the value's last axis", expected=f"[{value.shape[-1]}]", got=f"[{len(vector)}]"
        )
    return torch.tensor(vector, dtype=value.dtype, device=value.device)
