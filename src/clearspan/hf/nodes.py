"""Nodes: raw tensors as nodes of their own in the graph of one forward, where gradients are read by one torch hook.

A tap offers a value to listeners, and puts what it made of it back. Where nobody listens and a point shows the raw
tensor in another layout at most, the gradient at the raw tensor says all, for each point of the place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clearspan.errors import PointNotReachedError
from clearspan.hf.modules import arguments_at
from clearspan.hf.tensors import as_tokens, primary_input, primary_output, with_input, with_output
from clearspan.hf.torch_hooks import after, before
from clearspan.points import Converted, HookPoint, Place, Side, Whole, read
from clearspan.scopes import HERE


@dataclass(frozen=True)
class Node:
    """A raw tensor in the graph, at which the gradient of a point is read.

    Attributes:
        point: The point.
        output: The raw tensor, in the model's graph.
        rows: Rows of the forward.
        positions: Its positions.
    """

    point: HookPoint
    output: Tensor
    rows: int
    positions: int

    def gradient(self, at_output: Tensor) -> Tensor:
        """Returns the gradient at the point, a view of that at the raw tensor where the layouts allow one."""
        raw = as_tokens(at_output, self.point.place.layout, self.rows, self.positions)
        return read(self.point.access, raw, self.rows, {})


def has_node(point: HookPoint) -> bool:
    """Returns whether a point's gradient is that of its raw tensor, in another layout at most."""
    place = point.place
    match point.access:
        case Whole():
            moves = True
        case Converted(conversion):
            moves = conversion.only_moves
        case _:
            moves = False
    is_end = place.side in (Side.INPUT, Side.OUTPUT) and bool(place.module)
    return moves and is_end and not (place.is_overwritten or place.argument) and place.call is None


def put_node(place: Place, module: nn.Module, name: str, keep: Callable[[Tensor], None]) -> RemovableHandle:
    """Has a module's forwards in the present scope take or give a node, until the handle is removed.

    Args:
        place: The module's input or output.
        module: The module.
        name: The point's name, for errors.
        keep: Is given each node.
    """
    owner, also = HERE.get(), arguments_at(module, place.also) if place.also else {}

    def node_of(raw: Tensor) -> Tensor:
        if not raw.is_floating_point():
            return raw
        if not torch.is_grad_enabled():
            raise no_gradient(name)
        node = raw.view_as(raw) if raw.requires_grad else raw.detach().requires_grad_()
        keep(node)
        return node

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if HERE.get() is not owner:
            return None
        return with_input(args, kwargs, node_of(primary_input(args, kwargs)), also)

    def leave(_: nn.Module, __: Any, ___: Any, output: Any = None) -> Any:
        if HERE.get() is not owner:
            return None
        return with_output(output, node_of(primary_output(output, place.item)), place.item)

    # Before other torch hooks, which may give the module a copy.
    return before(module, enter, first=True) if place.side is Side.INPUT else after(module, leave, is_for_one=True)


def no_gradient(name: str) -> PointNotReachedError:
    """Returns the error for a forward without a graph in which a gradient is asked for."""
    return PointNotReachedError(
        "a backward hook cannot fire: no gradient flows through the value",
        where=f"{name} (under no_grad)",
        fix="run with gradients enabled",
    )
