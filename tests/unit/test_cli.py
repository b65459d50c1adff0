import json
import subprocess
import sys

import pytest
from tests.zoo import build
from typer.testing import CliRunner

import clearspan
from clearspan.cli import app

TEXT = "def area(self):\n    return self."


def run(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(code, message, *arguments):
    result = run(*arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_report_is_printed_and_its_page_written(tmp_path):
    out = tmp_path / "report.html"
    result = run("report", "--model", "tiny-bigcode", "--text", TEXT, "--out", str(out))
    assert result.exit_code == 0, result.stderr
    for title in ("Predictions", "Logit lens", "Strongest heads", "Causal effect"):
        assert title in result.stdout
    assert f"wrote {out}" in result.stderr
    page = out.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.count('class="token"') == clearspan.boot("tiny-bigcode").to_tokens(TEXT).numel()


def test_json_is_alone_on_stdout(tmp_path):
    file = tmp_path / "text.py"
    file.write_bytes(TEXT.replace("\n", "\r\n").encode())
    result = run("report", "--file", str(file), "--json")
    data = json.loads(result.stdout, parse_constant=refuse_constant)
    assert data["model"]["name"] == "tiny-bigcode"
    assert data["text"] == TEXT.replace("\n", "\r\n")


def test_verification_as_json_is_alone_on_stdout():
    data = json.loads(run("verify", "tiny-bigcode", "--json").stdout, parse_constant=refuse_constant)
    assert data["passed"] is True


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_the_version_is_printed():
    assert run("--version").stdout.startswith("clearspan 0.")


@pytest.mark.parametrize("arguments", [(), ("--text", "x", "--file", "y")])
def test_one_of_text_and_file(arguments):
    refused(2, "error: give one of --text, --file and --tokens\n", "report", *arguments)


def test_files_that_cannot_be_read(tmp_path):
    missing, binary, empty = tmp_path / "missing", tmp_path / "binary", tmp_path / "empty"
    binary.write_bytes(b"ab\xff")
    empty.touch()
    refused(2, f"error: cannot read {missing}: no such file or directory\n", "report", "--file", str(missing))
    refused(2, f"error: cannot read {tmp_path}: is a directory\n", "report", "--file", str(tmp_path))
    refused(2, f"error: cannot read {binary}: not UTF-8 text (byte 2)\n", "report", "--file", str(binary))
    refused(2, f"error: {empty} is empty\n", "report", "--file", str(empty))
    refused(2, "error: the text is empty\n", "report", "--text", "")


def test_pages_that_cannot_be_written(tmp_path):
    nowhere = tmp_path / "no" / "report.html"
    message = f"error: --out {nowhere}: there is no folder {nowhere.parent}\n"
    refused(2, message, "report", "--text", "x", "--out", str(nowhere))
    message = f"error: --out {tmp_path} is a folder; name a file, for instance {tmp_path / 'report.html'}\n"
    refused(2, message, "report", "--text", "x", "--out", str(tmp_path))


def test_a_text_longer_than_the_context():
    text = " x" * 600
    refused(1, "the input is longer than the model's context\n  expected: at most 512 tokens", "report", "--text", text)


def test_a_model_that_is_none(tmp_path):
    refused(1, f"error: {str(tmp_path)!r} is", "report", "--model", str(tmp_path), "--text", "x")


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from clearspan.cli import app\n"
        "app(['report', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'plotly', 'transformers', 'jinja2', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout


# --- token ids -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A checkpoint without tokenizer files, for which transformers makes up a tokenizer."""
    build("gpt2").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_report_on_token_ids_needs_no_tokenizer(folder, tmp_path):
    out = tmp_path / "report.html"
    result = run("report", "--model", folder, "--tokens", "5, 3,9", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    assert "#5" in result.stdout
    page = out.read_text(encoding="utf-8")
    assert page.count('class="token"') == 3
    assert "There is no tokenizer, so each is written\n  as its id." in page
    assert '<div class="strip ids">' in page
    data = json.loads(run("report", "--model", folder, "--tokens", "5 3 9", "--json").stdout)
    assert (data["text"], [token["text"] for token in data["tokens"]]) == ("", ["#5", "#3", "#9"])


def test_token_ids_of_a_model_with_a_tokenizer_show_their_text():
    ids = clearspan.boot("tiny-bigcode").to_tokens("import os")[0].tolist()
    data = json.loads(run("report", "--tokens", ",".join(map(str, ids)), "--json").stdout)
    assert data["text"] == "<|endoftext|>import os"


def test_text_for_a_model_without_a_tokenizer_names_the_option_for_ids(folder):
    refused(1, "  or: --tokens 5,3,9, with token ids in place of text\n", "report", "--model", folder, "--text", "x")


@pytest.mark.parametrize("tokens", ["", " , ", "5,x", "-1", "5.0", "²"])
def test_what_are_no_token_ids_is_refused(tokens):
    refused(2, f"error: --tokens {tokens!r}: give token ids, as 5,3,9\n", "report", f"--tokens={tokens}")


def test_token_ids_outside_the_vocabulary_are_refused(folder):
    refused(1, "token ids outside the vocabulary\n  expected: 0 to 96\n", "report", "-m", folder, "--tokens", "5,97")


def test_the_zoo_as_json_is_alone_on_stdout():
    result = run("zoo", "--type", "gpt2", "--type", "gemma4_assistant", "--level", "quick", "--json", "-p", "1")
    data = json.loads(result.stdout, parse_constant=refuse_constant)
    assert data["passed"] is True
    assert [row["outcome"] for row in data["rows"]] == ["passes", "not built"]


def test_the_zoo_in_a_table():
    result = run("zoo", "--type", "gemma4_assistant", "-p", "1")
    assert result.exit_code == 0
    assert "not built" in result.stdout
    assert "0 of 1 model types of transformers" in result.stdout


def test_a_zoo_in_which_something_fails(monkeypatch):
    monkeypatch.setattr("clearspan.zoo.models.MOST_PARAMETERS", 1000)
    result = run("zoo", "--type", "gpt2", "-p", "1")
    assert result.exit_code == 1
    assert "its config has sizes of its own" in " ".join(result.stdout.split())


def test_zoos_that_cannot_be_asked_for():
    refused(2, "error: --level deep: give quick or full\n", "zoo", "--level", "deep")
    refused(2, "error: unknown model type 'lama'\n", "zoo", "--type", "lama")
