"""What a verification found: checks with their errors, and in words why one failed."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from clearspan.results import Shown, Summary

Group = Literal[
    "structure",
    "parity",
    "reads",
    "identities",
    "attention",
    "parts",
    "writes",
    "padding",
    "gradients",
    "generation",
    "processing",
    "tokenizer",
    "precision",
]

GROUPS: dict[Group, str] = {
    "structure": "every parameter is accounted for, once, and has the sizes that the adapter says",
    "parity": "the bridge runs the model's own code: logits equal the unbridged model's",
    "reads": "every point fires, in its axes, with the value that the cache has",
    "identities": "points and weights add up and compute to each other as the model's arithmetic says",
    "attention": "queries and keys are used as the adapter says: rotated or not, normed or not, with a sink or not",
    "parts": "components alone, and stretches of blocks, compute what they do in the whole forward",
    "writes": "a write to a point moves the logits, and is in everything computed of that point",
    "padding": "each row of a padded batch has the logits that it has alone",
    "gradients": "gradients at points are what small writes there do to the loss",
    "generation": "tokens made one by one see what one forward sees, and hooks act at their step",
    "processing": "each step of processed() keeps the log-probabilities, or is refused",
    "tokenizer": "the tokenizer's ids are the model's",
    "precision": "how far half precision is from full; no fault of a point",
}
"""The groups of checks, and what each shows."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        group: What it is about.
        what: What was checked.
        passed: Whether it holds.
        error: The relative error measured, where there is one.
        tolerance: The most allowed.
        explanation: Where it failed, what that means and what to do.
    """

    group: Group
    what: str
    passed: bool
    error: float | None = None
    tolerance: float | None = None
    explanation: str = ""


@dataclass(frozen=True, repr=False)
class Verification(Shown):
    """The result of `bridge.verify`.

    Attributes:
        model: Name of the model.
        architecture: Class of the Hugging Face model.
        level: `"quick"` or `"full"`.
        dtype: Of the weights.
        checks: All checks, in order.
        forwards: Forward passes that it took.
        not_exercised: What of the model was not tried, each with the reason, such as a window longer than the inputs.
        unexplained: Entries of the config that the model's code reads and the adapter does not speak of, in words.
    """

    model: str
    architecture: str
    level: str
    dtype: str
    checks: tuple[Check, ...]
    forwards: int
    not_exercised: tuple[str, ...] = ()
    unexplained: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def unavailable(self) -> tuple[Check, ...]:
        """What could not be checked, each with its reason: a weight that cannot be read, logits that are not finite."""
        return tuple(check for check in self.checks if check.passed and check.explanation)

    def groups(self) -> Iterator[tuple[Group, int, int, float | None]]:
        """Yields each group with its checks that hold, all its checks, and its largest error."""
        held = Counter(check.group for check in self.checks if check.passed)
        for group in GROUPS:
            own = [check for check in self.checks if check.group == group]
            errors = [check.error for check in own if check.error is not None and check.group != "writes"]
            if own:
                yield group, held[group], len(own), max(errors, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain data; an error that is no number is None."""
        checks = [asdict(check) for check in self.checks]
        for check in checks:
            if check["error"] is not None and not math.isfinite(check["error"]):
                check["error"] = None
        return {**asdict(self), "passed": self.passed, "checks": checks}

    @property
    def _heading(self) -> str:
        return f"{self.architecture} {self.model} ({self.dtype}), {self.level}, {self.forwards} forward passes: " + (
            "all checks hold" if self.passed else f"{len(self.failures)} checks fail"
        )

    def _notes(self) -> Iterator[str]:
        """Yields what could not be checked, warnings, what was not exercised, and failures with their reasons."""
        last = {check.group: check.explanation for check in self.unavailable}
        for group, count in Counter(check.group for check in self.unavailable).items():
            yield f"  {count} of {group} could not be checked. {last[group]}"
        yield from (f"  warning: {what}" for what in self.unexplained)
        yield from (f"  not exercised: {what}" for what in self.not_exercised)
        for check in self.failures:
            error = "" if check.error is None else f" (error {check.error:.1e}, allowed {check.tolerance:.1e})"
            yield f"  FAILED {check.group}: {check.what}{error}"
            yield f"    {check.explanation}"

    def __str__(self) -> str:
        lines = [self._heading]
        for group, held, count, error in self.groups():
            largest = "" if error is None else f", error at most {error:.1e}"
            lines.append(f"  {group:10}  {held} of {count}{largest}  ({GROUPS[group]})")
        return "\n".join([*lines, *self._notes()])

    def _summary(self) -> Summary:
        rows = [
            ["✓" if held == count else "✗", group, f"{held} of {count}", "" if error is None else f"{error:.1e}", what]
            for (group, held, count, error), what in ((one, GROUPS[one[0]]) for one in self.groups())
        ]
        columns = ["", "group", "hold", "largest error", "what it shows"]
        return Summary(self._heading, columns, rows, notes=[line.strip() for line in self._notes()])
