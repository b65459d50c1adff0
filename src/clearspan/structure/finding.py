"""What was found of a model's structure, and how it is known; and what could not be found."""

from dataclasses import dataclass, field


class MissingStructureError(Exception):
    """Something that a structure needs was not found in the trace."""


class MissingInBlockError(MissingStructureError):
    """What was not found lies inside of a block, of which the stream is known."""


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        what: The point or part, by its canonical name.
        how: How it is known.
    """

    what: str
    how: str

    def __str__(self) -> str:
        return f"{self.what}: {self.how}"


@dataclass
class Findings:
    """What was found so far, in order."""

    found: list[Finding] = field(default_factory=list)

    def add(self, what: str, how: str, multiplier: float = 1.0) -> None:
        """Notes a finding; a multiplier that is not 1 is part of it."""
        self.found.append(Finding(what, how if multiplier == 1 else f"{how}, times {multiplier:g}"))
