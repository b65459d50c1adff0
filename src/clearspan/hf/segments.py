"""Running some of the blocks: skipped ones are stepped over, and the run ends after the last one asked for."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clearspan.hf.tensors import primary_output, with_input


class Stopped(Exception):  # noqa: N818 (it ends a run as asked, and is no error)
    """Ends a forward at a block's boundary, with the residual stream there."""

    def __init__(self, residual: Tensor) -> None:
        super().__init__("the forward was stopped at a block's boundary")
        self.residual = residual


@contextlib.contextmanager
def starting_at(
    blocks: Sequence[nn.Module], start: int, residual: Tensor, *, returns_tuple: bool = False
) -> Iterator[None]:
    """Has the residual stream enter block `start`; the blocks before it are not run while the context is open.

    Args:
        blocks: The model's blocks.
        start: The first one run.
        residual: The residual stream entering it.
        returns_tuple: Whether blocks return a tuple, the residual stream first.
    """
    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks[:start]):
            stack.enter_context(_stepped_over(block, residual if index == start - 1 else None, returns_tuple))
        if start == 0:

            def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return with_input(args, kwargs, residual)

            stack.callback(blocks[0].register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove)
        yield


@contextlib.contextmanager
def stopping_at(blocks: Sequence[nn.Module], stop: int) -> Iterator[None]:
    """Has the forward raise `Stopped` with the residual stream before block `stop`, or after the last block."""
    if stop == 0:

        def on_entry(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise Stopped(args[0] if args else kwargs["hidden_states"])

        handle = blocks[0].register_forward_pre_hook(on_entry, with_kwargs=True)
    else:

        def on_exit(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            raise Stopped(primary_output(output))

        handle = blocks[stop - 1].register_forward_hook(on_exit)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def narrowed(module: nn.Module, positions: Sequence[int]) -> Iterator[None]:
    """Has a module that treats each position alone compute some positions only, while the context is open.

    Its output is zero at the others, which nobody may read.

    Args:
        module: From one tensor `[batch, pos, ...]` to another.
        positions: Which, in the tensor that it is given.
    """
    own = vars(module).get("forward")
    run = module.forward

    def forward(value: Tensor) -> Tensor:
        index = torch.tensor(positions, device=value.device)
        found = run(value.index_select(1, index))
        return found.new_zeros(*value.shape[:2], *found.shape[2:]).index_copy_(1, index, found)

    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


@contextlib.contextmanager
def _stepped_over(block: nn.Module, replacement: Tensor | None, returns_tuple: bool) -> Iterator[None]:
    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        left = hidden_states if replacement is None else replacement
        return (left, None) if returns_tuple else left

    own = vars(block).get("forward")  # where another library has put one
    vars(block)["forward"] = forward
    try:
        yield
    finally:
        del vars(block)["forward"]
        if own is not None:
            vars(block)["forward"] = own
