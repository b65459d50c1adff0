"""What draws change: actions at places, as data, and what each is on a value. Written anew, with plain torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .reference import Edit, Reference, full_name
from .rows import Rows, laid_out

AXES = {
    **dict.fromkeys(
        ["embed", "pos_embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in"], "pos model"
    ),
    **dict.fromkeys(["q", "z", "result", "q_input"], "pos head width"),
    **dict.fromkeys(["k", "v", "k_input", "v_input"], "pos group width"),
    **dict.fromkeys(["pattern", "attn_scores"], "head q k"),
    **dict.fromkeys(["pre", "pre_linear", "post"], "pos neuron"),
    **dict.fromkeys(["ln1.normalized", "ln2.normalized", "ln_final.normalized"], "pos model"),
    **dict.fromkeys(["ln1.scale", "ln2.scale", "ln_final.scale"], "pos one"),
    "logits": "pos vocab",
}
"""The axes of each point after the batch's."""

FUNCTIONS = {
    "brute: negate": lambda value: -value,
    "brute: halve": lambda value: value / 2,
    "brute: positive part": lambda value: value.clamp(min=0),
}
"""Functions that keep zeros, so that what padding holds does not matter."""


@dataclass(frozen=True, eq=False)
class Source:
    """A run that values are taken from.

    Attributes:
        rows: Its input.
        values: What it had, by the point's full name.
    """

    rows: Rows
    values: Mapping[str, Tensor]


@dataclass(frozen=True)
class Action:
    """What becomes of the chosen part of a row's value."""

    def new(self, part: Tensor, source: Tensor | None) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Zero(Action):
    def new(self, part: Tensor, source: Tensor | None) -> Tensor:
        return torch.zeros_like(part)


@dataclass(frozen=True)
class Scale(Action):
    factor: float

    def new(self, part: Tensor, source: Tensor | None) -> Tensor:
        return part * self.factor


@dataclass(frozen=True)
class Add(Action):
    vector: tuple[float, ...] = field(repr=False)
    scale: float = 1.0

    def new(self, part: Tensor, source: Tensor | None) -> Tensor:
        return part + self.scale * torch.tensor(self.vector, dtype=part.dtype)


@dataclass(frozen=True)
class ProjectOut(Action):
    direction: tuple[float, ...] = field(repr=False)

    def new(self, part: Tensor, source: Tensor | None) -> Tensor:
        along = torch.tensor(self.direction, dtype=part.dtype)
        return part - (part @ along)[..., None] * along / (along @ along)


@dataclass(frozen=True)
class Inject(Action):
    vector: tuple[float, ...] = field(repr=False)
    norm: str = "own"
    scale: float = 1.0
    add: bool = False

    def new(self, part: Tensor, source: Tensor | None) -> Tensor:
        vector = torch.tensor(self.vector, dtype=part.dtype).expand_as(part)
        if self.norm == "stream":
            vector = vector / vector.norm(dim=-1, keepdim=True) * part.norm(dim=-1, keepdim=True)
        return self.scale * vector + (part if self.add else 0)


@dataclass(frozen=True)
class Apply(Action):
    function: str

    def new(self, part: Tensor, source: Tensor | None) -> Tensor:
        return FUNCTIONS[self.function](part)


@dataclass(frozen=True)
class Mask(Action):
    def new(self, part: Tensor, source: Tensor | None) -> Tensor:
        return torch.full_like(part, torch.finfo(part.dtype).min)


@dataclass(frozen=True)
class Patch(Action):
    source: str = "clean"
    layer: int | None = None
    position: int | None = None

    def new(self, part: Tensor, source: Tensor | None) -> Tensor:
        assert source is not None
        return source.expand_as(part)


@dataclass(frozen=True)
class Mean(Action):
    source: str = "clean"
    by_position: bool = False

    def new(self, part: Tensor, source: Tensor | None) -> Tensor:
        assert source is not None
        return source


@dataclass(frozen=True)
class Resample(Action):
    source: str = "clean"
    seed: int = 0

    def new(self, part: Tensor, source: Tensor | None) -> Tensor:
        assert source is not None
        return source

    def order(self, rows: int) -> list[int]:
        """Returns the first of torch's random orders of this seed in which no row keeps its place."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(rows, generator=generator).tolist()
            if all(row != other for row, other in enumerate(order)):
                return order


Positions = int | slice | tuple[int, ...] | tuple[tuple[int, ...], ...] | None
"""All, one, a stretch, several, or several for each row."""


@dataclass(frozen=True)
class Change:
    """An action at places of a point.

    Attributes:
        point: The point's short name.
        action: What becomes of the value.
        layer: The layer, negative from the end; None where the point is in no block.
        positions: Among each row's real tokens.
        heads: Heads, or key and value heads.
        neurons: Neurons, or coordinates of the stream.
        key_positions: Among each row's real tokens, for scores and patterns.
        columns: Columns in place of positions, which are real in every row.
    """

    point: str
    action: Action
    layer: int | None = None
    positions: Positions = None
    heads: tuple[int, ...] | None = None
    neurons: tuple[int, ...] | None = None
    key_positions: Positions = None
    columns: tuple[int, ...] | None = None

    def name(self, n_layers: int) -> str:
        """Returns the point's full name."""
        return full_name(self.point, None if self.layer is None else self.layer % n_layers)

    def source_name(self, n_layers: int) -> str:
        """Returns the full name of the point that the action takes values from."""
        layer = getattr(self.action, "layer", None)
        return self.name(n_layers) if layer is None else full_name(self.point, layer % n_layers)

    @property
    def axes(self) -> list[str]:
        """The axes of the point after the batch's."""
        return AXES[self.point].split()

    def is_lacking(self, rows: Rows, row: int) -> bool:
        """Whether a row lacks a position."""
        length = rows.lengths[row]
        each = [positions_of(one, row, length) or () for one in (self.positions, self.key_positions)]
        chosen = [*each[0], *each[1]]
        return any(not -length <= place < length for place in chosen)

    def edit(self, rows: Rows, n_layers: int, sources: Mapping[str, Source]) -> Edit:
        """Returns the change of a run as what becomes of the value at its point."""
        return self.name(n_layers), lambda value: self.applied(value, rows, n_layers, sources)

    def applied(self, value: Tensor, rows: Rows, n_layers: int, sources: Mapping[str, Source]) -> Tensor:
        """Returns the value with the change made in each row."""
        new = value.clone()
        source = self._prepared(rows, n_layers, sources)
        for row in range(rows.size[0]):
            if self.is_lacking(rows, row):
                continue
            index = self._index(rows, row, value.shape[1:])
            part = value[row][index]
            taken = None if source is None else source[row][index]
            new[row][index] = self.action.new(part, taken).to(value.dtype)
        return new

    def _index(self, rows: Rows, row: int, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """Returns the product of the places on all axes, as an index of a row's value."""
        chosen = []
        for axis, size in zip(self.axes, sizes, strict=True):
            match axis:
                case "pos" | "q":
                    places = self.columns or self._columns(self.positions, rows, row)
                case "k":
                    places = self._columns(self.key_positions, rows, row)
                case "head" | "group":
                    places = self.heads
                case "neuron" | "model":
                    places = self.neurons
                case _:
                    places = None
            chosen.append(
                torch.arange(size)
                if places is None
                else torch.tensor([place % size for place in places], dtype=torch.long)
            )
        return torch.meshgrid(*chosen, indexing="ij")

    def _columns(self, positions: Positions, rows: Rows, row: int) -> list[int] | None:
        """Returns columns, None for all. A source has values for real tokens alone."""
        places = positions_of(positions, row, rows.lengths[row])
        if places is None:
            return rows.columns[row] if hasattr(self.action, "source") else None
        return [rows.column(row, place) for place in places]

    def _prepared(self, rows: Rows, n_layers: int, sources: Mapping[str, Source]) -> Tensor | None:
        """Returns what the source run gives, in the columns of the run that is changed."""
        name = getattr(self.action, "source", None)
        if name is None:
            return None
        source = sources[name]
        value = source.values[self.source_name(n_layers)]
        along = tuple(place + 1 for place, axis in enumerate(self.axes) if axis in ("pos", "q", "k"))
        match self.action:
            case Mean(by_position=False) if along == (1,):
                mean = source.rows.real(value).mean(0)
                return mean.expand(rows.size[0], rows.size[1], *mean.shape)
            case Mean():
                return laid_out(source.rows, rows, value.mean(0, keepdim=True).expand_as(value), along)
            case Resample() as action:
                return laid_out(source.rows, rows, value[action.order(len(value))], along)
            case Patch(position=position) if position is not None:
                places = [source.rows.column(row, position) for row in range(len(value))]
                taken = torch.stack([value[row, place] for row, place in enumerate(places)])
                return taken[:, None].expand(-1, rows.size[1], *taken.shape[1:])
        if len(value) == 1 < rows.size[0]:
            return value.expand(rows.size[0], *value.shape[1:])
        return laid_out(source.rows, rows, value, along)


def positions_of(positions: Positions, row: int, length: int) -> tuple[int, ...] | None:
    """Returns the positions of a row of some length; None for all."""
    match positions:
        case None:
            return None
        case slice():
            return tuple(range(length)[positions])
        case int():
            return (positions,)
        case (tuple(), *_):
            return positions[row]
    return positions


def sources_of(
    reference: Reference, changes: Sequence[Change], inputs: Mapping[str, Rows], edits: Sequence[Edit] = ()
) -> dict[str, Source]:
    """Returns the source runs that changes take values from, each run whole.

    Args:
        reference: The model.
        changes: What takes values.
        inputs: The inputs of the runs, by name.
        edits: What is changed in these runs: by hooks that are on the model already.
    """
    found = {}
    for name, rows in inputs.items():
        keep = {
            change.source_name(reference.n_layers)
            for change in changes
            if getattr(change.action, "source", None) == name
        }
        found[name] = Source(rows, reference.run(rows, edits, sorted(keep)).values)
    return found
