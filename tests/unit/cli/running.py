"""Runs commands in the process, and reads what they print."""

import json

from typer.testing import CliRunner, Result

from clearspan.cli import app

CLEAN, CORRUPTED, ANSWERS = "import os\nimport", "import re\nimport", ("--answers", " os, re")
TEXT = "def area(self):\n    return self."


def run(*arguments: str, input: str | bytes | None = None) -> Result:
    result = CliRunner().invoke(app, list(arguments), input=input)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def printed(*arguments: str, input: str | bytes | None = None) -> str:
    result = run(*arguments, input=input)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(code: int, message: str, *arguments: str, input: str | bytes | None = None) -> None:
    result = run(*arguments, input=input)
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def as_json(text: str):
    """Returns what JSON says; NaN and Infinity are none."""

    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)
