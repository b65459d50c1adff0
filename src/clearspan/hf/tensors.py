"""Which of a module's inputs and outputs is the tensor that the field means."""

from typing import Any

from torch import Tensor

INPUT_NAMES = ("hidden_states", "input_ids", "inputs_embeds", "input", "x")


def primary_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns a module's first positional input, or the keyword that stands for it."""
    return args[0] if args else kwargs[_keyword(kwargs)]


def with_input(args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the inputs with the first one replaced."""
    if args:
        return (value, *args[1:]), kwargs
    return args, {**kwargs, _keyword(kwargs): value}


def primary_output(output: Any) -> Tensor:
    """Returns the tensor itself, the first of a tuple, or a model output's logits."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.logits


def with_output(output: Any, value: Tensor) -> Any:
    """Returns the output with that tensor replaced; a model output is changed in place."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, tuple):
        return (value, *output[1:])
    output.logits = value
    return output


def _keyword(kwargs: dict[str, Any]) -> str:
    return next(name for name in INPUT_NAMES if kwargs.get(name) is not None)
