"""Which of a module's inputs and outputs is the tensor that the field means, and how rows and positions lie in it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from clearspan.points import Layout

INPUT_NAMES = ("hidden_states", "input_ids", "inputs_embeds", "input", "x")


def primary_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns a module's first positional input, or the keyword in its place."""
    return args[0] if args else kwargs[_keyword(kwargs)]


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str, position: int) -> Tensor:
    """Returns a module's argument by name; `position` is its place among those that are not named."""
    return args[position] if position < len(args) else kwargs[name]


def with_argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str, position: int, value: Tensor
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Returns a module's arguments with one replaced."""
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


def with_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Tensor, also: Mapping[str, int] = MappingProxyType({})
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Returns the inputs with the first one replaced.

    Args:
        args: The inputs by position.
        kwargs: The inputs by keyword.
        value: What replaces the first one.
        also: Further inputs that it replaces, by name, each with its position.
    """
    args, kwargs = ((value, *args[1:]), kwargs) if args else (args, {**kwargs, _keyword(kwargs): value})
    for name, position in also.items():
        args, kwargs = with_argument(args, kwargs, name, position, value)
    return args, kwargs


def _keyword(kwargs: Mapping[str, Any]) -> str:
    """Returns the name of the tensor that the module reads: a usual one, or that of the first tensor."""
    usual = (name for name in INPUT_NAMES if kwargs.get(name) is not None)
    return next(usual, None) or next(name for name, value in kwargs.items() if isinstance(value, Tensor))


def primary_output(output: Any, item: int = 0) -> Tensor:
    """Returns the output if it is a tensor, an item of a tuple or list, or the logits of a model output."""
    if isinstance(output, Tensor):
        return output
    return output[item] if isinstance(output, tuple | list) else output.logits


def with_output(output: Any, value: Tensor, item: int = 0) -> Any:
    """Returns the output with that tensor replaced; a model output is changed in place."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, tuple | list):
        parts = (*output[:item], value, *output[item + 1 :])
        return type(output)(parts) if type(output) in (tuple, list) else type(output)(*parts)  # a named tuple
    output.logits = value
    return output


def as_tokens(raw: Tensor, layout: Layout, rows: int, positions: int | None = None) -> Tensor:
    """Returns a view of a raw tensor with rows and positions first; one of queries by keys stays as it is.

    Args:
        raw: The raw tensor.
        layout: How rows and positions lie in it.
        rows: The batch's rows.
        positions: How many tokens go into the forward; None where that is not known, and no layout needs it.
    """
    match layout:
        case Layout.TOKENS | Layout.ROWS_BY_ROWS:
            return raw
        case Layout.HEADS_FIRST:
            return raw.transpose(1, 2)
        case Layout.STREAMS_FIRST:
            return raw.permute(1, 2, 0, *range(3, raw.ndim))
        case Layout.ONE_ROW:
            return raw.unsqueeze(0)
        case Layout.FLAT:
            return raw if raw.ndim > 2 else raw.unflatten(0, (rows, -1))
        case Layout.JOINED_HEADS:
            return raw.unflatten(0, (rows, -1)).transpose(1, 2)
        case Layout.JOINED_SQUARE:
            return raw if raw.ndim > 3 else raw.unflatten(0, (rows, -1))
        case Layout.POS_FIRST:
            return raw.transpose(0, 1)
        case Layout.LAST | Layout.FIRST | Layout.SECOND:
            width = raw.shape[1] if positions is None else min(positions, raw.shape[1])
            return raw.narrow(1, _start(layout, raw, width), width)
        case Layout.FIRST_OF_SEVERAL:
            return raw[:, 0]


def from_tokens(value: Tensor, layout: Layout, raw: Tensor) -> Tensor:
    """Inverse of `as_tokens`: returns `value` laid out as `raw` is."""
    match layout:
        case Layout.TOKENS | Layout.ROWS_BY_ROWS:
            return value
        case Layout.HEADS_FIRST:
            return value.transpose(1, 2)
        case Layout.STREAMS_FIRST:
            return value.permute(2, 0, 1, *range(3, value.ndim))
        case Layout.ONE_ROW:
            # What is added to the rows of a batch may have as many rows itself.
            return value[0] if len(value) == 1 else value
        case Layout.FLAT | Layout.JOINED_SQUARE:
            return value if value.ndim == raw.ndim else value.flatten(0, 1)
        case Layout.JOINED_HEADS:
            return value.transpose(1, 2).flatten(0, 1)
        case Layout.POS_FIRST:
            return value.transpose(0, 1)
        case Layout.LAST | Layout.FIRST | Layout.SECOND:
            start = _start(layout, raw, value.shape[1])
            return torch.cat([raw[:, :start], value, raw[:, start + value.shape[1] :]], 1)
        case Layout.FIRST_OF_SEVERAL:
            return torch.cat([value.unsqueeze(1), raw[:, 1:]], 1)


def _start(layout: Layout, raw: Tensor, positions: int) -> int:
    """Returns where the tokens begin among the positions of a tensor that has others too."""
    match layout:
        case Layout.LAST:
            return raw.shape[1] - positions
        case Layout.SECOND if raw.shape[1] > positions:
            return positions
    return 0
