"""What a command is given, read: texts by argument, file or pipe, token ids, lists of numbers, names and answers."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from clearspan.cli.endings import USAGE, fail, misused

STDIN = "-"
_RANGE = re.compile(r"(\d+)-(\d+)")


def read(text: str | None, file: Path | None, tokens: str | None) -> str | list[int]:
    """Returns the text, or the token ids, that a command is given in one of these ways, or by a pipe."""
    found = read_if_given(text, file, tokens)
    if found is None:
        misused("there is no text to read", expected="one of TEXT, --file and --tokens, or a text that is piped in")
    return found


def read_if_given(text: str | None, file: Path | None, tokens: str | None) -> str | list[int] | None:
    """Returns what `read` returns, or None where nothing is given and nothing is piped in."""
    if sum(given is not None for given in (text, file, tokens)) > 1:
        misused("there is more than one text to read", expected="one of TEXT, --file and --tokens")
    if tokens is not None:
        return _ids(tokens)
    if text is None and file is None:
        return _piped() or None
    if STDIN in (text, str(file)):
        found, name = _piped(), "what is piped in"
    else:
        found, name = (text, "the text") if file is None else (_decoded(file), str(file))
    if not found:
        fail(f"{name} is empty", USAGE)
    return found


def _piped() -> str:
    """Returns what is piped in, less the line break that `echo` puts behind it; nothing at a terminal."""
    stream = sys.stdin.buffer
    if stream.isatty():
        return ""
    try:
        return re.sub(r"\r?\n\Z", "", stream.read().decode("utf-8"))
    except UnicodeDecodeError as error:
        fail(f"cannot read what is piped in: not UTF-8 text (byte {error.start})", USAGE)


def _decoded(file: Path) -> str:
    """Returns a file's text as it is, line endings included."""
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        fail(f"cannot read {file}: {(error.strerror or str(error)).lower()}", USAGE)
    except UnicodeDecodeError as error:
        fail(f"cannot read {file}: not UTF-8 text (byte {error.start})", USAGE)


def _ids(tokens: str) -> list[int]:
    """Returns the token ids of a list with commas or spaces between them."""
    parts = tokens.replace(",", " ").split()
    if not parts or not all(part.isascii() and part.isdigit() for part in parts):
        fail(f"--tokens {tokens!r}: give token ids, as 5,3,9", USAGE)
    return [int(part) for part in parts]


def one_of(name: str, position: str | None, option: str | None) -> str | None:
    """Returns what is given by position or as an option."""
    if position is not None and option is not None:
        misused(f"the {name} is given twice", expected="one", got=f"{position!r} and {option!r}")
    return option if position is None else position


def names(given: str) -> list[str]:
    """Returns the names of a list with commas between them."""
    return [name for name in map(str.strip, given.split(",")) if name]


def numbers(option: str, given: str | None) -> dict[str, list[int]]:
    """Returns the whole numbers of `0-3,5,-1` under an axis' name; nothing where none are given.

    Args:
        option: The option's name, the axis' plural.
        given: What was given.
    """
    if given is None:
        return {}
    found: list[int] = []
    for part in names(given):
        ends = _RANGE.fullmatch(part)
        if ends is None and not re.fullmatch(r"-?\d+", part):
            misused(f"--{option} {given!r}", expected="whole numbers and ranges, as 0-3,5,-1", got=part)
        found += [int(part)] if ends is None else range(int(ends[1]), int(ends[2]) + 1)
    if not found:
        misused(f"--{option} {given!r} names none", expected="whole numbers and ranges, as 0-3,5,-1")
    return {option.removesuffix("s"): found}


def both_answers(given: Sequence[str]) -> tuple[str, str | None]:
    """Returns the clean prompt's answer and the corrupted one's: two values, or one with a comma between two texts."""
    first = given[0].split(",")
    several = first if len(given) == 1 and len(first) == 2 and all(first) else list(given)
    if len(several) > 2:
        misused("there are too many answers", expected="one or two, as --answers ' os, re'", got=", ".join(several))
    return several[0], several[1] if len(several) > 1 else None
