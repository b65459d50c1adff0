"""What can go wrong. Every error says, one fact a line, what, expected, got, where, nearest, why and the fix."""

import contextlib
from collections.abc import Iterator, Sequence

__all__ = [
    "AbsentPointError",
    "CacheTooLargeError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ClearspanError",
    "CompiledModelError",
    "ConflictingWritesError",
    "DerivedWarning",
    "EditedEntryError",
    "GenerationRefusedError",
    "HookFailedError",
    "HookTypeError",
    "HookValueError",
    "InexactProcessingError",
    "InputError",
    "InvalidArgumentError",
    "LeftOutWarning",
    "MissingPartError",
    "MissingWeightError",
    "ModelBusyError",
    "NoTokenizerError",
    "NotCachedError",
    "NotFiniteError",
    "NotSeenError",
    "OutOfRangeError",
    "PlugInWarning",
    "PointNotReachedError",
    "RenamedError",
    "RenamedImportError",
    "TiedWeightWarning",
    "TokenRangeError",
    "TokenizerWarning",
    "UnbuildableError",
    "UnknownArgumentError",
    "UnknownPointError",
    "UnplannableError",
    "UnreadableWeightError",
    "UnsupportedArchitectureError",
    "UntestedReleaseWarning",
    "UnwritableError",
    "WholeForwardError",
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


@contextlib.contextmanager
def argument(name: str) -> Iterator[None]:
    """Has errors that are raised while the context is open say which argument they are about, of several of a kind.

    Example:
        >>> with argument("corrupted"):
        ...     raise InputError("an empty list has no rows")
        Traceback (most recent call last):
        clearspan.errors.InputError: an empty list has no rows
          argument: corrupted
    """
    try:
        yield
    except ClearspanError as error:
        error.message += f"\n  argument: {name}"
        raise


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


class ModelBusyError(ClearspanError, TimeoutError):
    """A run that waits for another on the same model, whose hook function does not return."""


class UnwritableError(ClearspanError, RuntimeError):
    """A write that could not reach everything that reads the value."""


class ConflictingWritesError(ClearspanError, RuntimeError):
    """Two writes in one run of which one would hide the other."""


class CompiledModelError(ClearspanError, RuntimeError):
    """A compiled model or module, which drops torch hooks quietly."""


class ModelChangedError(ClearspanError, RuntimeError):
    """A model whose parts are not those that it was booted with."""


class InexactProcessingError(ClearspanError, ValueError):
    """A step of weight processing that would change what the model computes."""


class NotSeenError(ClearspanError, RuntimeError):
    """An attention module in which no softmax followed by a product was seen while someone listened."""


class UnknownArgumentError(ClearspanError, TypeError):
    """A keyword that neither clearspan nor the model's forward has."""


class InvalidArgumentError(ClearspanError, ValueError):
    """An argument of the wrong value."""


class AdapterError(InvalidArgumentError):
    """An adapter that does not fit its model: a part is missing, of another kind, or not where it says."""


class OutOfRangeError(InvalidArgumentError, IndexError):
    """An index of a place that is not there."""


class InputError(ClearspanError, ValueError):
    """Text or token ids that the model cannot take."""


class TokenRangeError(InputError, IndexError):
    """Token ids outside the vocabulary."""


class NoTokenizerError(ClearspanError, ValueError):
    """Text given to a bridge that has no tokenizer."""


class UnsupportedArchitectureError(ClearspanError, ValueError):
    """A model for which there is no adapter."""


class UnbuildableError(ClearspanError, RuntimeError):
    """A model type of which no tiny model can be built."""


class CheckpointNotFoundError(ClearspanError, FileNotFoundError):
    """A name that is neither a checkpoint folder nor a model that can be fetched."""


class CheckpointError(ClearspanError, ValueError):
    """A checkpoint whose weights cannot be read, or do not fit its config."""


class NotCachedError(ClearspanError, KeyError):
    """A name that exists but is not in this cache."""


class CacheTooLargeError(ClearspanError, MemoryError):
    """A cache for which there is not enough memory."""


class UnplannableError(ClearspanError, RuntimeError):
    """A model whose forward must be run for its shapes to be known."""


class EditedEntryError(ClearspanError, RuntimeError):
    """A cache entry whose storage was written after it was kept."""


class UnreadableWeightError(ClearspanError, RuntimeError):
    """A weight that is there, but whose values cannot be read: offloaded, quantised, or of a wrapper or adapter."""


class WholeForwardError(ClearspanError, RuntimeError):
    """A run of some of the blocks, or of a part alone, of a model that computes them in its whole forward only."""


class GenerationRefusedError(ClearspanError, RuntimeError):
    """A generation of a model whose points cannot be followed through one."""


class NotPicklableError(ClearspanError, TypeError):
    """An object that pickle cannot write, or not without its model."""


class MissingPartError(ClearspanError, AttributeError):
    """A part of a block, such as attention, that this layer does not have."""


class MissingWeightError(ClearspanError, AttributeError):
    """A weight that this architecture or checkpoint does not have."""


class RenamedError(ClearspanError, AttributeError):
    """A name of TransformerLens's that is another here."""


class RenamedImportError(ClearspanError, ImportError):
    """A name of TransformerLens's module that is another here."""


class NotFiniteError(ClearspanError, ArithmeticError):
    """Values that are infinite or not numbers, from which nothing can be read."""


class HooksOnModelWarning(UserWarning):
    """Hooks of another bridge, which act on a model that is booted."""


class TokenizerWarning(UserWarning):
    """A tokenizer that may be another model's."""


class LeftOutWarning(UserWarning):
    """The model does not compute something that its config asks for."""


class UntestedReleaseWarning(UserWarning):
    """transformers is newer than what this library is tested with."""


class AdapterWarning(UserWarning):
    """An adapter that leaves parts of its model out, or says sizes that these do not have."""


class PlugInWarning(UserWarning):
    """An installed package that offers an adapter which cannot be loaded."""


class DerivedWarning(UserWarning):
    """A model's adapter was derived from a traced forward, since none is written for its class."""


class TiedWeightWarning(UserWarning):
    """A write into a parameter that is another weight too."""
