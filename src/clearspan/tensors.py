"""Tensors and devices as they are given: checked, and named where they are none."""

import contextlib

import torch
from torch import Tensor

from clearspan.errors import InvalidArgumentError


def tensor_of(name: str, given: object) -> Tensor:
    """Returns numbers as a tensor: one, an array of numpy, or lists.

    Args:
        name: The argument, for the error's text.
        given: Its value.

    Raises:
        InvalidArgumentError: They are no numbers.

    Example:
        >>> tensor_of("values", [1, 2])
        tensor([1, 2])
    """
    found: Tensor | None = given if isinstance(given, Tensor) else None
    if not isinstance(given, Tensor | bytes):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            found = torch.as_tensor(given)
    if found is None or found.is_complex():
        raise InvalidArgumentError(f"{name}={given!r}"[:80], expected="a tensor of numbers")
    return found


def device_of(given: object) -> torch.device:
    """Returns a device that is there.

    Raises:
        InvalidArgumentError: It is none, or is not there.
    """
    try:
        if isinstance(given, torch.device | str | int) and not isinstance(given, bool):
            return torch.empty(0, device=given).device
    except (RuntimeError, AssertionError):  # torch's ways of saying that it has no such device
        pass
    raise InvalidArgumentError(f"device={given!r}"[:80], expected="a device that is there, such as 'cpu' or 'cuda:0'")
