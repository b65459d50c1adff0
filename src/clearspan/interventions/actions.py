"""Actions: what becomes of a value. Frozen and hashable, with a JSON form; the arithmetic comes with the data."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.checks import check_choice, check_counts, check_flags, check_kind, is_whole, number_of, whole, wholes
from clearspan.errors import InvalidArgumentError
from clearspan.interventions.constant import Constant
from clearspan.interventions.functions import function_named
from clearspan.points import Address, HookPoint, nearest
from clearspan.shapes import Axes

Vector = Constant | Sequence[float] | Tensor
"""A vector, in any of the ways in which it can be given."""
Matrix = Constant | Sequence[Sequence[float]] | Tensor
"""A matrix, in any of the ways in which it can be given."""
SourcePosition = int | tuple[int, ...] | tuple[tuple[int, ...], ...] | None
"""Positions of a source: one, several, several for each row, or the ones that are written."""


class Action(ABC):
    """What becomes of the chosen part of a value."""

    kind: ClassVar[str]
    """Its name in JSON."""
    needs_numbers: ClassVar[bool] = False
    """Whether it calculates with the value, which integers do not allow."""
    hides_keys: ClassVar[bool] = False
    """Whether it may leave a query without a key."""
    treats_rows_alone: ClassVar[bool] = True
    """Whether what a row becomes does not depend on which others it is given with."""

    @property
    def run(self) -> str | None:
        """Name of the source run that it takes values from, or None."""
        return None

    @property
    def source_position(self) -> SourcePosition:
        """The position of the source that it reads, whichever is written; None for the one that is written."""
        return None

    def source_point(self, name: str, n_layers: int) -> str:
        """Returns the hook point of the source whose value it takes, for the point that is written."""
        return name

    def check_point(self, point: HookPoint, *, chooses_keys: bool) -> None:
        """Raises InvalidArgumentError where the point cannot take the action, with or without key positions."""
        return

    def is_constant(self, axes: Axes) -> bool:
        """Returns whether it takes one value of all positions of its source, at a point with these axes."""
        return False

    def check_value(self, value: Tensor, name: str) -> None:
        """Raises InvalidArgumentError where the action calculates and the value holds no floating-point numbers."""
        if self.needs_numbers and not value.is_floating_point():
            raise InvalidArgumentError(
                f"{self.kind} calculates with numbers, and {name} holds none",
                expected="floating point",
                got=str(value.dtype),
                where=name,
            )

    def prepared(self, values: Tensor, axes: Axes, lengths: Int[Tensor, "row"]) -> Tensor:
        """Returns what a source's value gives, by row and position, before the chosen part is taken.

        Args:
            values: The source's value at the point: all rows, each row's real positions first.
            axes: Its axes.
            lengths: Real positions of each row.
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
        own = {one.name: getattr(self, one.name) for one in fields(cast("Any", self))}
        return {"kind": self.kind, **{name: _plain(value) for name, value in own.items()}}


@dataclass(frozen=True)
class Patch(Action):
    """The value of a source run takes its place: of the same point and position, or of others (Patchscopes).

    Attributes:
        source: The run's name among the sources.
        layer: The layer of the source that is read; by default the one that is written. Negative from the end.
        position: The position of the source that is read, negative from its last token; or as many as are written, the
            same for all rows or a list for each. By default the one that is written.

    References:
        Ghandeharioun et al. (2024), "Patchscopes", arXiv:2401.06102, for other layers and positions.
    """

    source: str = "clean"
    layer: int | None = None
    position: SourcePosition | Sequence[int] | Sequence[Sequence[int]] = None

    kind: ClassVar[str] = "patch"

    def __post_init__(self) -> None:
        check_kind(str, source=self.source)
        object.__setattr__(self, "layer", layer_of(self.layer))
        object.__setattr__(self, "position", _source_position(self.position))

    @property
    def run(self) -> str:
        """The source run."""
        return self.source

    @property
    def source_position(self) -> SourcePosition:
        """The position that is read."""
        return cast("SourcePosition", self.position)

    def source_point(self, name: str, n_layers: int) -> str:
        """Returns the point in the layer that is read."""
        if self.layer is None:
            return name
        address = Address.parse(name)
        if address.layer is None or not -n_layers <= self.layer < n_layers:
            raise InvalidArgumentError(
                f"a patch cannot read layer {self.layer}", expected=f"-{n_layers} to {n_layers - 1}", where=name
            )
        return str(address.at(self.layer % n_layers))

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the source's part."""
        return _given(source).to(value)


@dataclass(frozen=True)
class PatchSubspace(Patch):
    """What lies in a subspace is taken from a source run: `value + (source - value) @ basis @ basis.T`.

    Attributes:
        basis: Orthonormal columns `[d, k]`, in the space of the value at a position, its chosen heads or neurons
            flattened.
    """

    basis: Constant = field(kw_only=True)

    kind: ClassVar[str] = "patch_subspace"
    needs_numbers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "basis", Constant.of(self.basis))

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the value with the source's part in the subspace."""
        return exchanged(value, _given(source), self.basis.tensor)


def exchanged(value: Tensor, source: Tensor, basis: Float[Tensor, "d k"]) -> Tensor:
    """Returns a value with what lies in a subspace taken from a source, computed in float32 at least.

    Args:
        value: `[row, pos, *axes]`, the axes flattened to `d`.
        source: The same of the source.
        basis: Orthonormal columns; gradients reach it.
    """
    exact = value.to(torch.promote_types(value.dtype, torch.float32))
    change = (source.to(exact) - exact).flatten(2)
    columns = basis.to(exact)
    return (exact + (change @ columns @ columns.T).view_as(exact)).to(value.dtype)


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
    needs_numbers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_kind(str, source=self.source)
        check_flags(by_position=self.by_position)

    @property
    def run(self) -> str:
        """The source run."""
        return self.source

    def is_constant(self, axes: Axes) -> bool:
        """Returns whether all positions get one mean."""
        return not self.by_position and axes[1] == "pos"

    def prepared(self, values: Tensor, axes: Axes, lengths: Int[Tensor, "row"]) -> Tensor:
        """Returns the mean, `[1, pos, ...]`, or `[1, 1, ...]` where it is the same at every position."""
        exact = values.to(torch.promote_types(values.dtype, torch.float32))
        if not self.is_constant(axes):
            _check_one_length(self, lengths)
            mean = exact.mean(0, keepdim=True)
        else:
            is_real = torch.arange(values.shape[1]) < lengths[:, None]
            mean = exact[is_real.to(values.device)].mean(0)[None, None]
        return mean.to(values.dtype)

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the mean."""
        return _given(source).to(value)


@dataclass(frozen=True)
class Resample(Action):
    """It becomes the value of another row of a source run, at the same position.

    Attributes:
        source: The run's name among the sources; of two rows or more, all of one length.
        seed: Of the order of rows, in which none keeps its place.
    """

    source: str = "clean"
    seed: int = 0

    kind: ClassVar[str] = "resample"

    def __post_init__(self) -> None:
        check_kind(str, source=self.source)
        check_counts(0, seed=self.seed)

    @property
    def run(self) -> str:
        """The source run."""
        return self.source

    def prepared(self, values: Tensor, axes: Axes, lengths: Int[Tensor, "row"]) -> Tensor:
        """Returns the values with their rows in another order."""
        _check_one_length(self, lengths)
        if len(values) < 2:
            raise InvalidArgumentError("resampling takes the values of another row", expected="two rows or more")
        return values[derangement(len(values), self.seed).to(values.device)]

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the other row's part."""
        return _given(source).to(value)


@dataclass(frozen=True)
class Add(Action):
    """A vector times a number is added, in float32 at least.

    Attributes:
        vector: Along the value's last axis, or of the shape of its last axes.
        scale: The number.
    """

    vector: Constant
    scale: float = 1.0

    kind: ClassVar[str] = "add"
    needs_numbers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", Constant.of(self.vector))
        object.__setattr__(self, "scale", number_of("scale", self.scale))

    @classmethod
    def of(cls, vector: Vector, scale: float = 1.0) -> Self:
        """Returns the action for a vector, such as a tensor."""
        return cls(Constant.of(vector), scale)

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the sum."""
        exact = _exact(value)
        return (exact + self.scale * self.vector.like(exact)).to(value.dtype)


@dataclass(frozen=True)
class Inject(Action):
    """A vector takes the value's place, or is added to it, with its own norm or with the norm of the value.

    Attributes:
        vector: Along the value's last axis, or of the shape of its last axes.
        norm: `"own"`, the vector as it is; `"stream"`, the vector scaled to the norm of the value that is there.
        scale: What the vector is multiplied by after that.
        add: Whether it is added; otherwise it takes the value's place.
    """

    vector: Constant
    norm: Literal["own", "stream"] = "own"
    scale: float = 1.0
    add: bool = False

    kind: ClassVar[str] = "inject"
    needs_numbers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", Constant.of(self.vector))
        check_choice(("own", "stream"), norm=self.norm)
        object.__setattr__(self, "scale", number_of("scale", self.scale))
        check_flags(add=self.add)
        if self.norm == "stream" and not self.vector.tensor.any():
            raise InvalidArgumentError("a vector of length 0 has no direction", fix="norm='own'")

    @classmethod
    def of(cls, vector: Vector, norm: Literal["own", "stream"] = "own", scale: float = 1.0, add: bool = False) -> Self:
        """Returns the action for a vector, such as a tensor."""
        return cls(Constant.of(vector), norm, scale, add)

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the vector, or its sum with the value."""
        exact = _exact(value)
        vector = self.vector.like(exact).expand_as(exact)
        if self.norm == "stream":
            axes = tuple(range(-self.vector.tensor.ndim, 0))
            there, own = (torch.linalg.vector_norm(one, dim=axes, keepdim=True) for one in (exact, vector))
            vector = vector * (there / own)
        vector = vector * self.scale
        return (exact + vector if self.add else vector).to(value.dtype)


@dataclass(frozen=True)
class Scale(Action):
    """It is multiplied by a number."""

    factor: float

    kind: ClassVar[str] = "scale"
    needs_numbers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", number_of("factor", self.factor))

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the product."""
        return value * self.factor


@dataclass(frozen=True)
class ProjectOut(Action):
    """Its component along a direction is taken away, in float32 at least.

    Attributes:
        direction: Along the value's last axis, or of the shape of its last axes; of any length but 0.
    """

    direction: Constant

    kind: ClassVar[str] = "project_out"
    needs_numbers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", Constant.of(self.direction))
        if not self.direction.tensor.any():
            raise InvalidArgumentError("a direction of length 0 cannot be projected out")

    @classmethod
    def of(cls, direction: Vector) -> Self:
        """Returns the action for a direction, such as a tensor."""
        return cls(Constant.of(direction))

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the value less its projection."""
        exact = _exact(value)
        axes = self.direction.tensor.ndim
        unit = torch.nn.functional.normalize(self.direction.like(exact).flatten(), dim=0)
        flat = exact.flatten(exact.ndim - axes)
        return (flat - (flat @ unit)[..., None] * unit).view_as(exact).to(value.dtype)


@dataclass(frozen=True)
class AddMapped(Action):
    """A linear map of it, of low rank, is added: `value + (value @ reads) @ writes`, in float32 at least.

    With orthonormal columns `Q`, `AddMapped.of(Q, -Q.T)` takes away what lies in their span.

    Attributes:
        reads: `[d, k]`, along the value's last axis.
        writes: `[k, d]`.
    """

    reads: Constant
    writes: Constant

    kind: ClassVar[str] = "add_mapped"
    needs_numbers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("reads", "writes"):
            object.__setattr__(self, name, Constant.of(getattr(self, name)))
        shape, other = self.reads.tensor.shape, self.writes.tensor.shape
        if len(shape) != 2 or shape != other[::-1]:
            raise InvalidArgumentError(
                "the two sides of a map do not fit",
                expected="reads [d, k] and writes [k, d]",
                got=f"{list(shape)} and {list(other)}",
            )

    @classmethod
    def of(cls, reads: Matrix, writes: Matrix) -> Self:
        """Returns the action for two matrices, such as tensors."""
        return cls(Constant.of(reads), Constant.of(writes))

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the sum."""
        exact = _exact(value)
        writes = self.writes.like(exact[..., None, :].expand(*exact.shape[:-1], len(self.writes.tensor), -1))
        return (exact + exact @ self.reads.tensor.to(exact) @ writes).to(value.dtype)


@dataclass(frozen=True)
class Mask(Action):
    """Scores become the least number of their dtype, so that the softmax gives these keys nothing, and renormalises.

    It goes with the point `attn_scores`, and with `key_positions`.
    """

    kind: ClassVar[str] = "mask"
    needs_numbers: ClassVar[bool] = True
    hides_keys: ClassVar[bool] = True

    def check_point(self, point: HookPoint, *, chooses_keys: bool) -> None:
        """Raises unless the point holds scores and some keys are chosen."""
        if Address.parse(point.name).leaf != "hook_attn_scores":
            raise InvalidArgumentError(
                "Mask hides keys from the softmax, whose input the scores are",
                expected="the point 'attn_scores'",
                got=point.name,
                fix="Zero() for a pattern, which is not renormalised then",
            )
        if not chooses_keys:
            raise InvalidArgumentError(
                "Mask without key positions hides every key", expected="key_positions=...", where=point.name
            )

    def new(self, value: Tensor, source: Tensor | None) -> Tensor:
        """Returns the least number of the dtype."""
        return torch.full_like(value, torch.finfo(value.dtype).min)


@dataclass(frozen=True)
class Apply(Action):
    """A registered function of it takes its place.

    Attributes:
        function: The name under which `register_function` made it known.
    """

    function: str

    kind: ClassVar[str] = "apply"
    treats_rows_alone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_kind(str, function=self.function)

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
    kind.kind: kind
    for kind in (Patch, PatchSubspace, Zero, Mean, Resample, Add, Inject, Scale, ProjectOut, AddMapped, Mask, Apply)
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
    check_kind(Mapping, data=data)
    own = dict(data)
    kind = own.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise InvalidArgumentError(
            f"unknown action {kind!r}", expected=", ".join(KINDS), nearest=nearest(str(kind), KINDS)
        )
    known = {one.name for one in fields(cast("Any", KINDS[kind]))}
    if not own.keys() <= known:
        raise InvalidArgumentError(
            f"unknown fields of the action {kind!r}: {', '.join(sorted(own.keys() - known))}",
            expected=", ".join(sorted(known)) or "none",
        )
    return KINDS[kind](**own)


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


def layer_of(given: object) -> int | None:
    """Returns a layer as it is kept.

    Raises:
        InvalidArgumentError: It is no whole number.
    """
    layer = whole(given)
    if layer is None and given is not None:
        raise InvalidArgumentError(f"layer={given!r} is no layer", expected="a whole number, or None")
    return layer


def _source_position(given: object) -> SourcePosition:
    """Returns positions of a source in the one form in which they are kept.

    Raises:
        InvalidArgumentError: They are not whole numbers, there is none, or rows have different numbers of them.
    """
    if given is None:
        return None
    numbers = wholes(given)
    if numbers:
        return numbers[0] if len(numbers) == 1 else numbers
    value = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    rows = [() if is_whole(row) else wholes(row) or () for row in value] if isinstance(value, tuple | list) else []
    if rows and all(rows) and len(set(map(len, rows))) == 1:
        return tuple(rows)
    raise InvalidArgumentError(
        f"position={given!r} tells no positions of a source",
        expected="a whole number, several, or as many for each row",
    )


def _given(source: Tensor | None) -> Tensor:
    assert source is not None, "an action with a source run gets its value"
    return source


def _check_one_length(action: Action, lengths: Int[Tensor, "row"]) -> None:
    if len(set(lengths.tolist())) > 1:
        raise InvalidArgumentError(
            f"{action.kind} takes values at the same position",
            expected="rows of one length",
            got=f"rows of {lengths.tolist()} real tokens",
            where=f"source {action.run!r}",
        )


def _exact(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _plain(value: object) -> object:
    if isinstance(value, Constant):
        return value.tensor.tolist()
    return list(value) if isinstance(value, tuple) else value
