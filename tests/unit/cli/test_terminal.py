"""What the command imports, where it prints, and what becomes of pipes and colours."""

import os
import subprocess
import sys

from tests.unit.cli.running import as_json, printed, run

COMMAND = [sys.executable, "-c", "from clearspan.cli import app; app()"]


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from clearspan.cli import app\n"
        "for command in app.registered_commands:\n"
        "    app([command.name or command.callback.__name__, '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'plotly', 'transformers', 'jinja2', 'numpy', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") >= 9
    assert "--model" in done.stdout


def test_a_process_reads_a_pipe_and_prints_nothing_but_the_result():
    """Standard error is empty: no progress of loading, no report of what was loaded, no warnings."""
    arguments = [*COMMAND, "report", "tiny-bigcode", "--json"]
    done = subprocess.run(
        arguments, input="x = '東京'\n".encode(), capture_output=True, check=False, env={**os.environ, "NO_COLOR": "1"}
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert as_json(done.stdout.decode())["text"] == "x = '東京'"


def test_a_reader_that_stops_leaves_no_traceback():
    """`clearspan ... | head -1`: the pipe is closed before anything is printed."""
    arguments = [*COMMAND, "report", "tiny-bigcode", "x", "--full"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() in (0, 1)


def test_transformers_says_what_it_does_on_request():
    arguments = ("generate", "tiny-bigcode", "a", "-n", "1")
    assert "Loading weights" in run(*arguments, "--verbose").stderr
    assert run(*arguments).stderr == ""


def test_colours_come_at_a_terminal_and_go_with_no_color(monkeypatch):
    """Bold and dim are no colours, and stay."""
    arguments = ("heads", "tiny-bigcode", "--top", "2")
    assert "\x1b" not in printed(*arguments)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[36m" in printed(*arguments)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = printed(*arguments)
    assert "\x1b[1m" in plain
    assert "\x1b[36m" not in plain
