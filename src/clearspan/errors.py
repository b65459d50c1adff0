"""What can go wrong. Every error says, one fact a line, what, expected, got, where, nearest, why and the fix."""

import os
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Protocol, TypeGuard, runtime_checkable

__all__ = [
    "AbsentPointError",
    "CacheTooLargeError",
    "CheckpointNotFoundError",
    "ClearspanError",
    "CompiledModelError",
    "ConflictingWritesError",
    "EditedEntryError",
    "HookFailedError",
    "HookTypeError",
    "HookValueError",
    "InexactProcessingError",
    "InputError",
    "InvalidArgumentError",
    "MissingWeightError",
    "NoTokenizerError",
    "NotCachedError",
    "NotFiniteError",
    "NotSeenError",
    "PointNotReachedError",
    "TiedWeightWarning",
    "TokenRangeError",
    "UnknownArgumentError",
    "UnknownPointError",
    "UnplannableError",
    "UnreadableWeightError",
    "UnsupportedArchitectureError",
    "UnwritableError",
]


class ClearspanError(Exception):
    """Root of the library's errors.

    Args:
        what: What could not be done, with the value that stood in the way.
        expected: What was expected instead.
        got: What was given.
        where: Model, point, axes or module concerned.
        nearest: Valid names close to the one given.
        reason: Why.
        fix: The remedy, as one call where there is one.

    Example:
        >>> print(ClearspanError("cannot fly", expected="wings", got="legs"))
        cannot fly
          expected: wings
          got: legs
    """

    def __init__(
        self,
        what: str,
        *,
        expected: str | None = None,
        got: str | None = None,
        where: str | None = None,
        nearest: Sequence[str] = (),
        reason: str | None = None,
        fix: str | None = None,
    ) -> None:
        facts = {
            "expected": expected,
            "got": got,
            "where": where,
            "nearest": ", ".join(nearest) or None,
            "reason": reason,
            "fix": fix,
        }
        self.reason = reason
        self.message = "\n".join([what, *(f"  {label}: {fact}" for label, fact in facts.items() if fact is not None)])
        super().__init__(self.message)

    def __str__(self) -> str:  # KeyError would show the message's repr
        return self.message


class UnknownPointError(ClearspanError, KeyError):
    """A hook point's name that no architecture has."""


class AbsentPointError(UnknownPointError):
    """A hook point that this architecture does not have."""


class PointNotReachedError(ClearspanError, RuntimeError):
    """A listener that cannot fire, or did not fire, in the run it was given to."""


class HookValueError(ClearspanError, ValueError):
    """A hook function returned a value of the wrong shape or device."""


class HookTypeError(ClearspanError, TypeError):
    """A hook function is not callable, or returned something that is not a tensor of the point's dtype."""


class HookFailedError(ClearspanError, RuntimeError):
    """A hook function raised what would end a loop or a stream without a word."""


class UnwritableError(ClearspanError, RuntimeError):
    """A write that could not reach everything that reads the value."""


class ConflictingWritesError(ClearspanError, RuntimeError):
    """Two writes in one run of which one would hide the other."""


class CompiledModelError(ClearspanError, RuntimeError):
    """A compiled model or module, which drops torch hooks quietly."""


class InexactProcessingError(ClearspanError, ValueError):
    """A step of weight processing that would change what the model computes."""


class NotSeenError(ClearspanError, RuntimeError):
    """An attention module in which no softmax followed by a product was seen while someone listened."""


class UnknownArgumentError(ClearspanError, TypeError):
    """A keyword that neither clearspan nor the model's forward has."""


class InvalidArgumentError(ClearspanError, ValueError):
    """An argument of the wrong value."""


class InputError(ClearspanError, ValueError):
    """Text or token ids that the model cannot take."""


class TokenRangeError(InputError, IndexError):
    """Token ids outside the vocabulary."""


class NoTokenizerError(ClearspanError, ValueError):
    """Text given to a bridge that has no tokenizer."""


class UnsupportedArchitectureError(ClearspanError, ValueError):
    """A model for which there is no adapter."""


class CheckpointNotFoundError(ClearspanError, FileNotFoundError):
    """A name that is neither a checkpoint folder nor a model that can be fetched."""


class NotCachedError(ClearspanError, KeyError):
    """A name that exists but is not in this cache."""


class CacheTooLargeError(ClearspanError, MemoryError):
    """A cache for which there is not enough memory."""


class UnplannableError(ClearspanError, RuntimeError):
    """A model whose forward must be run for its shapes to be known."""


class EditedEntryError(ClearspanError, RuntimeError):
    """A cache entry whose storage was written after it was kept."""


class UnreadableWeightError(ClearspanError, RuntimeError):
    """A weight that is there, but whose values cannot be read: offloaded, or quantised."""


class MissingWeightError(ClearspanError, AttributeError):
    """A weight that this architecture or checkpoint does not have."""


class NotFiniteError(ClearspanError, ArithmeticError):
    """Values that are infinite or not numbers, from which nothing can be read."""


class TiedWeightWarning(UserWarning):
    """A write into a parameter that is another weight too."""


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
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole(given: object) -> int | None:
    """Returns one whole number, also that of a tensor or array without axes, as Python's; None for anything else."""
    one = given.tolist() if isinstance(given, _Array) else given
    return int(one) if is_whole(one) else None


def wholes(given: object) -> tuple[int, ...] | None:
    """Returns one whole number or several (a sequence, an array, a tensor) as a tuple, or None for anything else."""
    several = given.tolist() if isinstance(given, _Array) else given
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


@runtime_checkable
class _Array(Protocol):
    """A tensor, or an array of numpy."""

    def tolist(self) -> object: ...


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
    found = given.tolist() if isinstance(given, _Array) else given
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
