"""What the page on the command shows is what the command prints."""

import re
import shlex
from pathlib import Path

import pytest
from tests.unit.cli.running import printed

PAGE = (Path(__file__).parents[2] / "docs/command.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"```console\n\$ clearspan (.+)\n((?:.*\n)+?)```", PAGE)
WINDOW = "class Window:\n    def __init__(self, name, width):\n        self.name = name\n        self.width ="


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command.split()[0] for command, _ in SHOWN])
def test_a_command_prints_what_the_page_shows(command, output, tmp_path, monkeypatch):
    """But for numbers, and bars as long as they are, whose last digit differs from processor to processor."""
    (tmp_path / "window.py").write_text(WINDOW, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "96")
    arguments = [one.removeprefix("$").replace("\\n", "\n") for one in shlex.split(command)]
    text = printed(*arguments)
    assert _words(text) == _words(output)


def _words(text: str) -> list[list[str]]:
    """Returns the words of each line that has any, without numbers and bars."""
    lines = [re.sub(r"[+-]?\d+\.\d+|━+", "", line).split() for line in text.splitlines()]
    return [line for line in lines if line]
