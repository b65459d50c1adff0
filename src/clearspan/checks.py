"""Checks of arguments: numbers, tensors, choices, kinds, paths, devices. Each names the argument in its error."""

import contextlib
import os
from collections.abc import Collection, Mapping
from numbers import Integral
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from clearspan.errors import InvalidArgumentError


def check_positive(**sizes: float) -> None:
    """Raises InvalidArgumentError unless all sizes are numbers above 0.

    Example:
        >>> check_positive(learning_rate=0)
        Traceback (most recent call last):
        clearspan.errors.InvalidArgumentError: learning_rate=0
          expected: learning_rate > 0
    """
    for name, size in sizes.items():
        if not isinstance(size, int | float) or not size > 0:
            raise InvalidArgumentError(f"{name}={size!r}", expected=f"{name} > 0")


def is_whole(value: object) -> TypeGuard[int]:
    """Returns whether a value is a whole number, of Python's or numpy's; True and False are none."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def whole(given: object) -> int | None:
    """Returns one whole number, also that of a tensor or array without axes, as Python's; None for anything else."""
    one = _plain(given)
    return int(one) if is_whole(one) else None


def wholes(given: object) -> tuple[int, ...] | None:
    """Returns one whole number or several (a sequence, an array, a tensor) as a tuple, or None for anything else."""
    several = _plain(given)
    if is_whole(several):
        return (int(several),)
    if isinstance(several, list | tuple | range) and all(map(is_whole, several)):
        return tuple(map(int, several))
    return None


def whole_numbers(name: str, given: object) -> list[int]:
    """Returns one whole number or several as a list.

    Raises:
        InvalidArgumentError: They are no whole numbers.
    """
    found = wholes(given)
    if found is None:
        raise InvalidArgumentError(f"{name}={given!r}", expected="a whole number, or several")
    return list(found)


def _plain(given: object) -> object:
    """Returns numbers of a tensor or of numpy as Python's, anything else as it is."""
    tolist = getattr(type(given), "tolist", None)
    return given if tolist is None else tolist(given)


def check_counts(least: int = 1, /, **counts: int) -> None:
    """Raises InvalidArgumentError unless all counts are whole numbers, `least` or more.

    Example:
        >>> check_counts(batch_size=2.5)
        Traceback (most recent call last):
        clearspan.errors.InvalidArgumentError: batch_size=2.5
          expected: a whole number, batch_size >= 1
    """
    for name, count in counts.items():
        if not is_whole(count) or count < least:
            raise InvalidArgumentError(f"{name}={count!r}", expected=f"a whole number, {name} >= {least}")


def check_flags(**flags: bool) -> None:
    """Raises InvalidArgumentError unless all flags are True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise InvalidArgumentError(f"{name}={flag!r}", expected="True or False")


def number_of(name: str, given: object) -> float:
    """Returns a number of Python's or numpy's, or that of a tensor without axes; True and False are none.

    Raises:
        InvalidArgumentError: It is no number.
    """
    found = _plain(given)
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise InvalidArgumentError(f"{name}={given!r}"[:80], expected="a number")
    return found


def check_kind(*kinds: type, **given: object) -> None:
    """Raises InvalidArgumentError unless all values are of one of some types.

    Example:
        >>> check_kind(str, name=3)
        Traceback (most recent call last):
        clearspan.errors.InvalidArgumentError: name=3
          expected: str
          got: int
    """
    for name, value in given.items():
        if not isinstance(value, kinds):
            raise InvalidArgumentError(
                f"{name}={value!r}"[:80],
                expected=" or ".join(kind.__name__ for kind in kinds),
                got=type(value).__name__,
            )


def check_choice(choices: Collection[str], /, **given: str) -> None:
    """Raises InvalidArgumentError unless all values are among the texts that there are."""
    for name, value in given.items():
        if not isinstance(value, str) or value not in choices:
            raise InvalidArgumentError(f"unknown {name} {value!r}"[:80], expected=" or ".join(map(repr, choices)))


def check_fields(what: str, data: object, *names: str) -> None:
    """Raises InvalidArgumentError unless data is a mapping that has some names."""
    if not isinstance(data, Mapping) or not set(names) <= data.keys():
        raise InvalidArgumentError(f"this is no {what}", expected=", ".join(names), got=repr(data)[:80])


def path_of(path: str | os.PathLike[str]) -> Path:
    """Returns a path.

    Raises:
        InvalidArgumentError: It is none.
    """
    if not isinstance(path, str | os.PathLike):
        raise InvalidArgumentError(f"path={path!r}"[:80], expected="a path")
    return Path(path)


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


def dtype_of(given: object) -> torch.dtype:
    """Returns a dtype of real numbers, also one given by torch's name.

    Raises:
        InvalidArgumentError: It is none.
    """
    found = vars(torch).get(given) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidArgumentError(f"dtype={given!r}"[:80], expected="a dtype of real numbers, such as torch.float32")
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
