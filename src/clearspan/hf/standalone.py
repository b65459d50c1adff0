"""What a module needs beside its input when it is called alone: masks and positions, as the model makes them."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clearspan.hf.segments import starting_at


class _Reached(Exception):  # noqa: N818 (it ends a run as asked, and is no error)
    """Ends a forward at a module, with what that was called with."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__("the forward was stopped at a module's input")
        self.args = args
        self.kwargs = kwargs


def arguments_of(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    module: nn.Module,
    value: Tensor,
    *,
    embedding_width: int,
    returns_tuple: bool,
) -> dict[str, Any]:
    """Returns what the model's own forward hands a module of a block beside its first input.

    The model is run on a residual stream of zeros of the value's shape, over the blocks before and up to the module. A
    residual stream that the module would add to its result is zero.

    Args:
        model: The Hugging Face model.
        blocks: Its blocks.
        module: The module, a block or in one.
        value: Its input `[batch, pos, d_model]`.
        embedding_width: Width of the token embedding.
        returns_tuple: Whether blocks return a tuple.
    """
    first, *others = inspect.signature(type(module).forward).parameters.values()
    taken = [one.name for one in others if one.kind is not inspect.Parameter.VAR_KEYWORD][1:]
    if not taken:
        return {}

    def reached(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args, kwargs)

    layer = next(index for index, block in enumerate(blocks) if any(part is module for part in block.modules()))
    embeddings = value.new_zeros(*value.shape[:2], embedding_width)
    handle = module.register_forward_pre_hook(reached, with_kwargs=True)
    try:
        with torch.no_grad(), starting_at(blocks, layer, torch.zeros_like(value), returns_tuple=returns_tuple):
            model(inputs_embeds=embeddings, use_cache=False)
    except _Reached as there:
        bound = inspect.signature(type(module).forward).bind(module, *there.args, **there.kwargs)
        named = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        skipped = {first.name, others[0].name, "kwargs"}
        found = {name: what for name, what in named.items() if name not in skipped}
        return {**found, **({"residual": torch.zeros_like(value)} if "residual" in found else {})}
    finally:
        handle.remove()
    raise AssertionError("the forward passes every block")
