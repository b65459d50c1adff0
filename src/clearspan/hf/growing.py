"""A batch that grows inside one forward: rows join in front of blocks, and masks and positions are laid out for all."""

import contextlib
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clearspan.hf.keywords import is_kv_cache
from clearspan.hf.segments import stopping_at
from clearspan.hf.tensors import primary_input, with_input
from clearspan.hf.torch_hooks import before
from clearspan.scopes import HERE

Path = tuple[int | str, ...]
"""Where an argument of a block is: its position or name, and the way into tuples, lists and dictionaries."""
_SAME_FOR_ALL_ROWS = (type(None), bool, int, float, str, torch.dtype, torch.device)


class UnfitForGrowth(Exception):  # noqa: N818 (it says which way a sweep takes, and is no error)
    """What a model gives its blocks cannot be laid out for more rows, for the reason in its message."""


@dataclass(frozen=True)
class Given:
    """What a model gives each of its blocks besides the residual stream, for some rows.

    Attributes:
        shapes: The shapes of tensors by block and path.
    """

    shapes: Mapping[tuple[int, Path], torch.Size]

    def axis_of_rows(self, block: int, path: Path, tensor: Tensor) -> int | None:
        """Returns the axis of a tensor for half the rows that has the rows, or None where all rows have the same.

        Raises:
            UnfitForGrowth: There is not one such axis.
        """
        twice = self.shapes.get((block, path))
        name = ".".join(map(str, path))
        if twice is None or len(twice) != tensor.ndim:
            raise UnfitForGrowth(f"argument {name!r} of a block is not the same kind of tensor for all rows")
        axes = [axis for axis, (now, then) in enumerate(zip(tensor.shape, twice, strict=True)) if now != then]
        if len(axes) > 1 or any(twice[axis] != 2 * tensor.shape[axis] for axis in axes):
            raise UnfitForGrowth(f"argument {name!r} of a block depends on the rows in more ways than one")
        return axes[0] if axes else None


def given_to(blocks: Sequence[nn.Module], run: Callable[[], object]) -> Given:
    """Returns what a model gives its blocks in a run, which ends after the last one.

    Args:
        blocks: The model's blocks.
        run: Runs the model.
    """
    shapes: dict[tuple[int, Path], torch.Size] = {}
    own = HERE.get()

    def looking_at(block: int) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            def note(path: Path, tensor: Tensor) -> Tensor:
                shapes[block, path] = tensor.shape
                return tensor

            if HERE.get() is own:
                _replaced(args, kwargs, note)

        return look

    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(before(block, looking_at(index)).remove)
        stack.enter_context(stopping_at(blocks, len(blocks)))
        run()
    return Given(shapes)


@contextlib.contextmanager
def growing(
    blocks: Sequence[nn.Module], joining: Mapping[int, Tensor], rows: int, given: Given, join: Callable[..., Tensor]
) -> Iterator[None]:
    """While the context is open, rows join the batch of its own forwards in front of blocks.

    The model is given so many rows, and makes masks and positions of these. The first block at which rows join has
    these alone.

    Args:
        blocks: The model's blocks.
        joining: The rows that join, `rows` or a multiple of them, by block.
        rows: Rows that the model is given.
        given: What it gives its blocks for twice the rows.
        join: Returns the stream that a block gets: of the one that reaches it, or None, and rows that join.
    """
    own, start = HERE.get(), min(joining)
    laid_out: dict[int, tuple[Tensor, int, Tensor]] = {}  # by the tensor's id: the tensor, the rows, what it became

    def fitting(block: int, count: int) -> Callable[[Path, Tensor], Tensor]:
        def fit(path: Path, tensor: Tensor) -> Tensor:
            axis = given.axis_of_rows(block, path, tensor)
            if axis is None or count == rows:
                return tensor
            known = laid_out.get(id(tensor))
            if known is None or known[1] != count:
                known = laid_out[id(tensor)] = tensor, count, _times(tensor, axis, count // rows)
            return known[2]

        return fit

    def entering(block: int) -> Callable[..., Any]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            if HERE.get() is not own:
                return None
            stream, new = primary_input(args, kwargs), joining.get(block)
            if new is not None:
                stream = join(None if block == start else stream, new)
            count = sum(len(one) for at, one in joining.items() if at <= block)
            args, kwargs = with_input(args, kwargs, stream)
            return _replaced(args, kwargs, fitting(block, count))

        return enter

    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks[start:], start):
            # Before the hooks of points at the block's input, which show all rows.
            stack.callback(before(block, entering(index), first=True).remove)
        yield


def _times(tensor: Tensor, axis: int, copies: int) -> Tensor:
    """Returns a tensor several times over along an axis; one place stays one in memory."""
    if tensor.shape[axis] == 1:
        return tensor.expand([copies if at == axis else -1 for at in range(tensor.ndim)])
    return tensor.repeat([copies if at == axis else 1 for at in range(tensor.ndim)])


def _replaced(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], function: Callable[[Path, Tensor], Tensor]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Returns a block's arguments with a function of all tensors besides the residual stream."""
    stream = primary_input(args, kwargs)

    def new(name: int | str, value: Any) -> Any:
        return value if value is stream else _mapped(value, function, (name,))

    return tuple(new(at, one) for at, one in enumerate(args)), {name: new(name, one) for name, one in kwargs.items()}


def _mapped(value: Any, function: Callable[[Path, Tensor], Tensor], path: Path) -> Any:
    """Returns an argument with a function of each tensor in it.

    Raises:
        UnfitForGrowth: There is something in it of which nothing is known.
    """
    match value:
        case Tensor():
            return function(path, value)
        case tuple() if type(value) is tuple:
            return tuple(_mapped(one, function, (*path, at)) for at, one in enumerate(value))
        case list():
            return [_mapped(one, function, (*path, at)) for at, one in enumerate(value)]
        case dict():
            return {name: _mapped(one, function, (*path, name)) for name, one in value.items()}
    # A `UserDict` is what blocks leave for later ones, such as keys, of the rows that ran there.
    if isinstance(value, (*_SAME_FOR_ALL_ROWS, UserDict)) or is_kv_cache(value):
        return value
    raise UnfitForGrowth(f"a block is given a {type(value).__name__}, which cannot be laid out for more rows")
