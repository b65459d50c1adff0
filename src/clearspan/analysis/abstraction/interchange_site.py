"""Interchange sites: where in a model values are exchanged, and hooks that exchange all of them or a subspace."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.analysis.activations import Layers, points_of
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Intervention, Patch, located
from clearspan.points import HookFunction, HookPoint

Vectors = Float[Tensor, "*place d"]
Exchange = Callable[[Vectors, Vectors], Vectors]
"""From the base's vectors and the source's, in float32 at least, to what takes the base's place."""
Places = int | Sequence[int] | None
"""One head or neuron, several, or all (None)."""


@dataclass(frozen=True)
class InterchangeSite:
    """A hook point, or some of its heads or neurons, whose value at a position is taken as one vector.

    Attributes:
        name: The point, a value at each position.
        shape: Of its value at a position.
        heads: Which heads; for keys and values, which key/value heads. None for all.
        neurons: Which neurons of an MLP, or coordinates of the residual stream. None for all.
    """

    name: str
    shape: tuple[int, ...]
    heads: tuple[int, ...] | None = None
    neurons: tuple[int, ...] | None = None

    @classmethod
    def all_of(
        cls, bridge: TransformerBridge, name: str, layers: Layers, heads: Places, neurons: Places
    ) -> tuple[Self, ...]:
        """Returns the site in each layer, or the one site of a full name.

        Raises:
            UnknownPointError: There is no such point, or no such layer.
            InvalidArgumentError: Heads or neurons that it does not have, or a point that is not a value at each
                position.
        """
        return tuple(cls.of(bridge, point, heads, neurons) for point in points_of(bridge, name, layers))

    @classmethod
    def of(cls, bridge: TransformerBridge, name: str, heads: Places, neurons: Places) -> Self:
        """Returns the site of a point's full name."""
        point = bridge.hook_dict[name]
        chosen = Intervention(name, Patch(), heads=_tuple(heads), neurons=_tuple(neurons))
        laid = located(chosen, bridge.index.find, bridge.cfg.n_layers, 1)  # one position: these are chosen later
        places = dict(zip(point.axes[1:], laid.places, strict=True))
        shape = tuple(point.sizes[axis] for axis in point.axes[2:])
        own_heads = next((places[axis] for axis in ("head", "kv_head") if axis in places), None)
        own_neurons = places[point.axes[-1]] if neurons is not None else None
        return cls(name, shape, own_heads, own_neurons)

    @cached_property
    def coordinates(self) -> Int[Tensor, "d"]:
        """Places of the vector's numbers in the flattened value."""
        numbers = torch.arange(prod(self.shape)).view(self.shape)
        numbers = numbers if self.heads is None else numbers[list(self.heads)]
        return (numbers if self.neurons is None else numbers[..., list(self.neurons)]).flatten()

    @property
    def width(self) -> int:
        """Length of the vector."""
        return len(self.coordinates)

    def __str__(self) -> str:
        chosen = {"heads": self.heads, "neurons": self.neurons}
        said = [f"{name} {', '.join(map(str, places))}" for name, places in chosen.items() if places is not None]
        return f"{self.name} ({'; '.join(said)})" if said else self.name

    def vectors(self, value: Float[Tensor, "*place axes"]) -> Vectors:
        """Returns the vectors of values `[*place, *shape]`, in float32 at least."""
        flat = value.flatten(value.ndim - len(self.shape))
        return flat[..., self.coordinates.to(flat.device)].to(_exact(flat))

    def hooks(
        self, source: Float[Tensor, "batch place d"], positions: Int[Tensor, "batch place"], exchange: Exchange
    ) -> list[tuple[str, HookFunction]]:
        """Returns the hook that exchanges vectors with a source's, each row at its own positions.

        In generation, and on a KV cache, it writes in the forward in which a position is.

        Args:
            source: The source's vectors.
            positions: In the sequence, from 0, padding included.
            exchange: What takes the base's place.
        """

        def write(value: Tensor, hook: HookPoint) -> None:
            at = positions - hook.position
            inside = (at >= 0) & (at < value.shape[1])
            if len(value) != len(source) or (hook.step is None and not inside.all()):
                raise InvalidArgumentError(
                    "the interchange does not fit this run",
                    expected=f"{len(source)} rows, and positions {sorted(set(positions.flatten().tolist()))}",
                    got=f"{len(value)} rows, and positions {hook.position} to {hook.position + value.shape[1] - 1}",
                    where=hook.name,
                )
            rows, places = inside.nonzero(as_tuple=True)
            flat = value.flatten(2)  # a view: what a hook is given is dense
            index = (rows[:, None], at[rows, places][:, None], self.coordinates)
            base = flat[index].to(_exact(flat))
            flat[index] = exchange(base, source[rows, places].to(base)).to(flat.dtype)

        return [(self.name, write)]


def whole(base: Vectors, source: Vectors) -> Vectors:  # noqa: ARG001
    """Returns the source's vectors: everything is exchanged."""
    return source


def within(basis: Float[Tensor, "d k"]) -> Exchange:
    """Returns the exchange of what lies in a subspace: `base + (source - base) @ basis @ basis.T`.

    Args:
        basis: Orthonormal columns.

    Example:
        >>> first = within(torch.tensor([[1.0], [0.0]]))
        >>> first(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
        tensor([3., 2.])
    """

    def exchange(base: Vectors, source: Vectors) -> Vectors:
        columns = basis.to(base)
        return base + (source - base) @ columns @ columns.T

    return exchange


def checked_basis(basis: Float[Tensor, "d k"], site: InterchangeSite) -> Float[Tensor, "d k"]:
    """Returns the basis of a subspace of a site's vectors.

    Raises:
        InvalidArgumentError: It is of another width, or its columns are not orthonormal.
    """
    if basis.ndim != 2 or basis.shape[0] != site.width:
        raise InvalidArgumentError(
            "the subspace is of another space than the vectors",
            expected=f"[d={site.width}, k]",
            got=str(list(basis.shape)),
            where=str(site),
        )
    exact = basis.detach().double()
    apart = (exact.T @ exact - torch.eye(basis.shape[1]).to(exact)).abs().max().item() if basis.shape[1] else 0.0
    if not apart < 1e-3:
        raise InvalidArgumentError(
            "the columns of the subspace's basis are not orthonormal",
            expected="basis.T @ basis = 1",
            got=f"another by {apart:.2g}",
            fix="torch.linalg.qr(basis).Q",
        )
    return basis


def _tuple(places: Places) -> tuple[int, ...] | None:
    match places:
        case None:
            return None
        case int():
            return (places,)
        case _:
            return tuple(places)


def _exact(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
