"""Runs the script of docs/transformer-lens-in-two-lines.md with TransformerLens and with clearspan.

    python benchmarks/peers/two_lines.py

Both must print what the page says, number by number. README.md says what environment it needs.
"""

import contextlib
import io
import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/transformer-lens-in-two-lines.md"
NUMBER = re.compile(r"-?\d+\.\d+")
TOLERANCE = 0.01
"""Of each number as it is printed. Between the two libraries they differ by 0.0001 at most, as measured."""


def _block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    return found


def before() -> str:
    """Returns the script for TransformerLens."""
    return _block("python")


def after() -> str:
    """Returns the script for clearspan."""
    script, changes = before(), _block("diff").splitlines()
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert script.count(old[1:]) == 1, old
        script = script.replace(old[1:], new[1:])
    return script


def shown() -> str:
    """Returns what the page says that is printed."""
    return _block("text")


def printed(script: str) -> str:
    """Returns what a script prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(script, PAGE.name, "exec"), {})
    return out.getvalue()


def compare(output: str, expected: str) -> float:
    """Returns the largest difference between the numbers of two outputs, which are otherwise the same.

    Raises:
        AssertionError: A word differs, or a number by more than the tolerance.
    """
    largest = 0.0
    for line, other in zip(output.splitlines(), expected.splitlines(), strict=True):
        numbers, others = (list(map(float, NUMBER.findall(each))) for each in (line, other))
        words, other_words = (NUMBER.sub("", each).split() for each in (line, other))
        assert words == other_words, f"{line!r}\nand not\n{other!r}"
        difference = max((abs(one - two) for one, two in zip(numbers, others, strict=True)), default=0.0)
        assert difference <= TOLERANCE, f"{line!r}\nand not\n{other!r}"
        largest = max(largest, difference)
    return largest


if __name__ == "__main__":
    os.chdir(ROOT / "src/clearspan")  # where the script's folder of a model is
    for name, script in (("TransformerLens", before()), ("clearspan", after())):
        difference = compare(printed(script), shown())
        print(f"{name}: {len(NUMBER.findall(shown()))} numbers, differing by {difference:.4f} at most")
