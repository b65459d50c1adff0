import os
import subprocess
import sys

import pytest

from clearspan.errors import InvalidArgumentError
from clearspan.progress import shown, silent

CODE = """
import sys
from clearspan.progress import shown
with shown(eval(sys.argv[1])) as tell:
    for done in range(1, 4):
        tell("reading texts", done, 3)
"""


def written(progress, **environment):
    """Returns what is on standard error; `FORCE_COLOR` makes it a terminal to rich."""
    known = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR")}
    done = subprocess.run(
        [sys.executable, "-c", CODE, progress],
        capture_output=True,
        text=True,
        check=True,
        env={**known, "TERM": "xterm", **environment},
    )
    assert done.stdout == ""
    return done.stderr


def test_a_bar_is_shown_on_a_terminal_alone():
    assert "reading texts" in written("True", FORCE_COLOR="1")
    assert written("True") == written("False") == written("False", FORCE_COLOR="1") == ""


def test_a_function_is_told_and_an_error_passes_through():
    steps = []
    with pytest.raises(RuntimeError), shown(lambda *step: steps.append(step)) as tell:
        tell("reading", 1, 2)
        raise RuntimeError
    assert steps == [("reading", 1, 2)]
    with shown(False) as tell:
        assert tell is silent


@pytest.mark.parametrize("wrong", [None, 1, "yes", []])
def test_what_shows_nothing_raises(wrong):
    with pytest.raises(InvalidArgumentError, match="progress="), shown(wrong):
        pass
