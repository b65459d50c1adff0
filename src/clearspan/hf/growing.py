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
class Extent:
    """How much a forward computes, on which the shapes of what a model gives its blocks depend.

    Attributes:
        rows: Rows that the model is given.
        positions: Positions that it is given.
        length: Positions of the whole sequence.
    """

    rows: int
    positions: int
    length: int


Shapes = Mapping[tuple[int, Path], torch.Size]
"""The shapes of the tensors that blocks are given besides the residual stream, by block and path."""


@dataclass(frozen=True)
class Given:
    """What a model gives its blocks besides the residual stream, as seen in two runs.

    Attributes:
        extent: Of the first run.
        once: What blocks were given there.
        twice: What they were given for twice the rows.
    """

    extent: Extent
    once: Shapes
    twice: Shapes

    def axis_of_rows(self, block: int, path: Path, shape: torch.Size, extent: Extent) -> int | None:
        """Returns the axis of a tensor that has the rows, or None where all rows have the same.

        Args:
            block: The block that is given the tensor.
            path: Where it is among the block's arguments.
            shape: Its shape, in a run of any extent.
            extent: That run's.

        Raises:
            UnfitForGrowth: There is not one such axis; or the tensor is not as it was seen, only larger or smaller.
        """
        once, twice = (shapes.get((block, path), torch.Size()) for shapes in (self.once, self.twice))
        name = ".".join(map(str, path))
        if not len(shape) == len(once) == len(twice):
            raise UnfitForGrowth(f"argument {name!r} of a block is not the same kind of tensor for all rows")
        axes = [axis for axis, (one, two) in enumerate(zip(once, twice, strict=True)) if one != two]
        if len(axes) > 1 or any(twice[axis] != 2 * once[axis] for axis in axes):
            raise UnfitForGrowth(f"argument {name!r} of a block depends on the rows in more ways than one")
        for axis, (seen, size) in enumerate(zip(once, shape, strict=True)):
            if not self._is_same(seen, size, extent, has_rows=axis in axes):
                raise UnfitForGrowth(f"argument {name!r} of a block has another shape than its rows and positions tell")
        return axes[0] if axes else None

    def _is_same(self, seen: int, size: int, extent: Extent, *, has_rows: bool) -> bool:
        """Whether the size of an axis in a run of some extent is the one that was seen: so many rows or positions."""
        own = self.extent
        if has_rows:
            by_rows, by_token = (size * own.rows, seen * extent.rows), (own.positions, extent.positions)
            return by_rows[0] == by_rows[1] or by_rows[0] * by_token[0] == by_rows[1] * by_token[1]
        counted = (own.positions, extent.positions), (own.length, extent.length)
        return seen == size or (seen, size) in counted


def shapes_given(blocks: Sequence[nn.Module], run: Callable[[], object]) -> Shapes:
    """Returns the shapes of what a model gives its blocks in a run, which ends after the last one.

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
    return shapes


@contextlib.contextmanager
def growing(
    blocks: Sequence[nn.Module],
    joining: Mapping[int, Tensor],
    extent: Extent,
    given: Given,
    join: Callable[..., Tensor],
) -> Iterator[None]:
    """While the context is open, rows join the batch of its own forwards in front of blocks.

    The model is given the rows of its input, and makes masks and positions of these. The first block at which rows join
    has these alone.

    Args:
        blocks: The model's blocks.
        joining: The rows that join, as many as the model is given or a multiple of them, by block.
        extent: What the model is given.
        given: What it gives its blocks.
        join: Returns the stream that a block gets: of the one that reaches it, or None, and rows that join.
    """
    own, start, rows = HERE.get(), min(joining), extent.rows
    laid_out: dict[int, tuple[Tensor, int, Tensor]] = {}  # by the tensor's id: the tensor, the rows, what it became

    def fitting(block: int, count: int) -> Callable[[Path, Tensor], Tensor]:
        def fit(path: Path, tensor: Tensor) -> Tensor:
            axis = given.axis_of_rows(block, path, tensor.shape, extent)
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
